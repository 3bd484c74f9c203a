"""The part `generate`: the time to the first token, and tokens per second of one prompt and of several together."""

from dataclasses import replace

import jax
import numpy as np

from lora_exp.config.schema.task_settings import BenchConfig
from lora_exp.train.benchmarks.bench_rows import Row
from lora_exp.train.benchmarks.bench_step import rates
from lora_exp.train.benchmarks.bench_subject import Subject
from lora_exp.train.benchmarks.turns import WARM_UPS, FirstCalls, Side, spread, take_turns
from lora_exp.train.compute.program import Weights
from lora_exp.train.sampling.sampler import Sampler, make_sampler

GENERATE, TOGETHER = "generate", "together"  # sides
PROMPT = "Once upon a time"
PROMPTS = 8  # that are completed together


def measure_generation(subject: Subject, settings: BenchConfig) -> list[Row]:
  """The rows of the part, with the settings in `sample`. No token ends a completion, so that all have one length."""
  cfg = subject.plan.cfg
  sampler = make_sampler(subject.solo.step.job.program, replace(cfg, sample=replace(cfg.sample, stop=[])),
                         subject.plan.tokenizer)  # fmt: skip
  sampler.decoder.stops = ()
  [prompt] = sampler.encode([cfg.sample.prompts[0] if cfg.sample.prompts else PROMPT])
  tokens = min(cfg.sample.max_tokens, cfg.model.max_len - len(prompt))
  job = subject.solo.step.job
  params, trial = jax.tree.map(_first, (subject.solo.state.params, job.trials))
  weights = params, trial, job.frozen
  firsts = FirstCalls()
  sides = {GENERATE: _alone(sampler, weights, prompt, firsts), TOGETHER: _together(sampler, weights, prompt)}
  times = take_turns(sides, settings.turns, settings.seconds)
  waits = np.array(firsts.seconds[WARM_UPS:]).reshape(settings.turns, -1).mean(axis=1).tolist()
  return [
    Row(GENERATE, "first_token_seconds", f"the first of {tokens} tokens, ms", spread(waits), 1e3),
    Row(GENERATE, "tokens_per_s", "tokens/s, one prompt", rates(tokens, times[GENERATE])),
    Row(GENERATE, f"tokens_per_s_of_{PROMPTS}", f"tokens/s, {PROMPTS} prompts together",
        rates(PROMPTS * tokens, times[TOGETHER])),
  ]  # fmt: skip


def _first(x: jax.Array) -> jax.Array:
  """The first of the trials."""
  return x[0]


def _alone(
  sampler: Sampler, weights: Weights, prompt: list[int], firsts: FirstCalls
) -> Side:
  """Completes one prompt, as task=generate streams it."""

  def work(count: int) -> None:
    for _ in range(count):
      firsts.begin()
      sampler.stream(weights, prompt, firsts.called)

  return Side(work)


def _together(sampler: Sampler, weights: Weights, prompt: list[int]) -> Side:
  """Completes several prompts in one batch."""

  def work(count: int) -> None:
    for _ in range(count):
      sampler.continuations(*weights, [prompt] * PROMPTS)

  return Side(work)
