"""`task=generate`: completes prompts with a run or a base. A single completion is streamed."""

import sys
from contextlib import ExitStack

from lora_exp.config import Config, InputError
from lora_exp.data.prompts import Prompt, lines_of, read_prompts, shown_prompt, text_of
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.train.loaded_run import open_run, plan_of
from lora_exp.train.merging.merged_run import open_merged
from lora_exp.train.sampling.prompt_encoding import encode_prompts, prompt_format
from lora_exp.train.sampling.sampler import make_sampler


def run(cfg: Config) -> None:
  """Prints a completion of each prompt by the run `cfg.run`, or by the base if there is none."""
  prompts = prompts_of(cfg)
  start_jax(cfg.cache, show_device=False)
  with console.phase("load the model"):
    plan = plan_of(cfg)
    encode_prompts(prompts, prompt_format(cfg, plan.tokenizer), plan.tokenizer, cfg.model.max_len)  # raises InputError
    loaded = open_merged(cfg).run if cfg.sample.merged else open_run(cfg, plan=plan)
  sampler = make_sampler(loaded.job.program, cfg, loaded.plan.tokenizer)
  ids, model = sampler.encode(prompts), (*loaded.single(), loaded.frozen)
  end = "\n" if sampler.format.has_turns else sampler.format.separator
  if len(prompts) == 1:
    with ExitStack() as waiting:  # until the first token
      waiting.enter_context(console.phase("read the prompt"))
      begun: list[str] = []

      def show(piece: str) -> None:
        waiting.close()
        console.write(piece if begun else f"{shown_prompt(prompts[0])}{end}{piece}")
        begun.append(piece)

      sampler.decode(*model, ids, show)
    console.write("\n")
    return
  with console.phase("generate"):
    texts = sampler.decode(*model, ids)
  for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
    console.write(f"{'' if n == 0 else chr(10)}{shown_prompt(prompt)}{end}{text}\n")


def prompts_of(cfg: Config) -> list[Prompt]:
  """Returns `prompt`, or the prompts of `prompt_file`, or the lines of standard input.

  A terminal is asked for one prompt; without any input, `sample.prompts` are used. Raises InputError if there is no
  prompt, or the text is not UTF-8.
  """
  if cfg.prompt is not None:
    return [cfg.prompt.encode(errors="replace").decode()]
  if cfg.prompt_file is not None:
    return read_prompts(cfg.prompt_file)
  if sys.stdin is not None and sys.stdin.isatty():
    prompts = _asked_for()
  else:
    text = "" if sys.stdin is None else text_of(sys.stdin.buffer.read(), "standard input")
    prompts = lines_of(text) or [prompt for prompt in cfg.sample.prompts if prompt.strip()]
  if not prompts:
    raise InputError("no prompt is given; give 'prompt=\"Once upon a time\"', prompt_file= or standard input")
  return prompts


def _asked_for() -> list[Prompt]:
  """The prompt that is typed in the terminal; none if it is empty."""
  try:
    return lines_of(input("Prompt: "))
  except EOFError:
    console.write("\n")
    return []
