"""`task=generate`: completions of prompts by a run or a base. A single completion is streamed."""

import sys
from collections.abc import Callable
from pathlib import Path

from lora_exp.config import Config, InputError
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.train.loaded_run import open_run
from lora_exp.train.merged_run import open_merged
from lora_exp.train.sampler import make_sampler


def run(cfg: Config) -> None:
  """Prints a completion of each prompt by the run `cfg.run`, or by the base if there is none."""
  prompts = prompts_of(cfg)
  start_jax(cfg.cache, show_device=False)
  loaded = open_merged(cfg).run if cfg.sample.merged else open_run(cfg)
  sampler = make_sampler(loaded.job.program, cfg, loaded.plan.tokenizer)
  ids, model = sampler.encode(prompts), (*loaded.single(), loaded.frozen)
  end = "\n" if sampler.format.chat else sampler.format.separator
  if len(prompts) == 1:
    console.write(prompts[0] + end)
    sampler.decode(*model, ids, console.write)
    console.write("\n")
    return
  for n, (prompt, text) in enumerate(zip(prompts, sampler.decode(*model, ids), strict=True)):
    console.write(f"{'' if n == 0 else chr(10)}{prompt}{end}{text}\n")


def prompts_of(cfg: Config) -> list[str]:
  """Returns `prompt`, or the lines of `prompt_file` or standard input, or `sample.prompts`.

  Raises InputError if there is no prompt, or the text is not UTF-8.
  """
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
    raise InputError(f"{where} contains no prompt; give 'prompt=\"Once upon a time\"', prompt_file= or standard input")
  return prompts


def _read(read: Callable[[], bytes], where: str) -> tuple[str, str]:
  """Returns the text from `read`, and where it is from. Raises InputError if it is not UTF-8."""
  try:
    return read().decode(), where
  except UnicodeDecodeError as error:
    raise InputError(f"{where} is not UTF-8 text: byte {error.start} cannot be read") from None
