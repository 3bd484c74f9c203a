"""Text from a model: prompts in, completions out, shown while they are drawn where there is one."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax

from lora_exp.config import Config, InputError
from lora_exp.runtime import console
from lora_exp.runtime.mesh import keep_programs
from lora_exp.tasks.merge import merge
from lora_exp.train.loaded_run import LoadedRun, open_run
from lora_exp.train.sampler import make_sampler
from lora_exp.train.step import Tree
from lora_exp.train.trials import TrialHypers


def run(cfg: Config) -> None:
  """Prints a completion of each prompt by the run `run`, or by the base alone."""
  prompts = prompts_of(cfg)
  keep_programs(cfg.cache)
  run = merge(open_run(cfg))[0] if cfg.sample.merged else open_run(cfg)
  sample = make_sampler(run.job.program, cfg, run.plan.tokenizer)
  ids = sample.encode(prompts)
  end = "" if sample.asks == "plain" else "\n"
  if len(prompts) == 1:
    console.write(prompts[0] + end)
    sample.decode(*trial_of(run), ids, console.write)
    console.write("\n")
    return
  for n, (prompt, text) in enumerate(zip(prompts, sample.decode(*trial_of(run), ids), strict=True)):
    console.write(f"{'' if n == 0 else chr(10)}{prompt}{end}{text}\n")


def trial_of(run: LoadedRun) -> tuple[Tree, TrialHypers, Tree]:
  """What a sampler is called with: params and trial of the run's one trial, and the frozen arrays."""
  params, trial = jax.tree.map(lambda x: x[0], (run.params, run.job.trials))
  return params, trial, run.frozen


def prompts_of(cfg: Config) -> list[str]:
  """What was asked: `prompt`, or the lines of `prompt_file` or of standard input, or the run's own sample prompts."""
  if cfg.prompt is not None:
    return [cfg.prompt.encode(errors="replace").decode()]
  if cfg.prompt_file is not None:
    text, where = _read(Path(cfg.prompt_file).read_bytes, f"prompt_file={cfg.prompt_file}")
  elif sys.stdin is not None and not sys.stdin.isatty():
    text, where = _read(sys.stdin.buffer.read, "standard input")
  else:
    text, where = "", ""
  if not text.strip() and cfg.prompt_file is None:
    text, where = "\n".join(cfg.sample.prompts), "sample.prompts"
  prompts = [line for line in text.splitlines() if line.strip()]
  if not prompts:
    raise InputError(f"{where} holds no prompt; give 'prompt=\"Once upon a time\"', prompt_file= or standard input")
  return prompts


def _read(read: Callable[[], bytes], where: str) -> tuple[str, str]:
  try:
    return read().decode(), where
  except UnicodeDecodeError as error:
    raise InputError(f"{where} is no UTF-8 text: byte {error.start} cannot be read") from None
