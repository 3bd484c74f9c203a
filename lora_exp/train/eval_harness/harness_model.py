"""A run as a model of EleutherAI's lm-evaluation-harness (the package lm-eval, extra `[harness]`).

Tokens and truncation are those of lm-eval's own class for transformers, `lm_eval.models.huggingface.HFLM`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lora_exp.config import InputError, SampleConfig
from lora_exp.runtime import console
from lora_exp.train.answers.log_likelihoods import Continuation, log_likelihoods
from lora_exp.train.compute.program import Weights
from lora_exp.train.job import Job
from lora_exp.train.plan import Plan
from lora_exp.train.sampling.sampler import Sampler

Request = tuple[Any, list[int], list[int]]  # texts, token ids of the context, and those of its continuation
MAX_TOKENS = 256  # tokens generated at most, unless the task sets another number; lm-eval's default


class HarnessModel(TemplateLM):
  """Answers lm-eval's three kinds of requests with one trial of a job."""

  def __init__(self, plan: Plan, job: Job, model: Weights):
    """`model`: params and hyperparameters, each (1, …), and the frozen arrays."""
    super().__init__()
    self.plan, self.job, self.model = plan, job, model
    self.tokens, self.max_length = plan.tokenizer, plan.cfg.model.max_len
    ways = plan.layout.batch_ways
    self.rows = -(-plan.cfg.train.batch_size // ways) * ways
    self.samplers: dict[tuple[Any, ...], Sampler] = {}

  @property
  def eot_token_id(self) -> int:
    return self.tokens.eot

  @property
  def prefix_token_id(self) -> int:
    """The token before a text without a context."""
    bos = self.tokens.template_variables.get("bos_token")
    return self.tokens.special_tokens.get(str(bos), self.tokens.eot)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    bos = [] if self.tokens.bos is None or add_special_tokens is False else [self.tokens.bos]
    return bos + self.tokens.encode(string)

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
    return result

  def _loglikelihood_tokens(
    self, requests: Sequence[Request], disable_tqdm: bool = True, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """(log-likelihood, whether it is the greedy one) of each continuation. The longest rows are computed first."""
    texts = [Continuation(context + continuation, len(continuation)) for _, context, continuation in requests]
    order = np.argsort([len(text.ids) for text in texts], kind="stable")[::-1].tolist()
    results: list[tuple[float, bool]] = []
    with console.progress("log-likelihoods", len(requests), "requests") as bar:
      batches = log_likelihoods(self.job, self.model, [texts[n] for n in order], self.rows, self.max_length)
      for values_NB, greedy_NB in batches:
        results += zip(values_NB[0].tolist(), greedy_NB[0].tolist(), strict=True)
        for _ in values_NB[0]:
          bar.advance()
    return [result for _, result in sorted(zip(order, results, strict=True))]

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
    windows: list[Request] = []
    owners: list[int] = []
    for n, request in enumerate(requests):
      (text,) = request.args
      for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
        context, continuation = make_disjoint_window(window)
        windows.append((None, context, continuation))
        owners.append(n)
    totals = [0.0] * len(requests)
    for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
      totals[owner] += value
    return totals

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    """The generated texts, up to the stop texts of each request."""
    groups: dict[str, list[int]] = {}
    for n, request in enumerate(requests):
      groups.setdefault(repr(request.args[1]), []).append(n)
    texts = [""] * len(requests)
    with console.progress("generation", len(requests), "requests") as bar:
      for numbers in groups.values():
        for n, text in zip(numbers, self._generate([requests[n].args for n in numbers]), strict=True):
          texts[n] = text
          bar.advance()
    return texts

  def _generate(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The texts of requests (context, settings) with equal settings."""
    settings: Any = normalize_gen_kwargs(requests[0][1], MAX_TOKENS)
    most, until = settings["max_gen_toks"], [stop for stop in settings["until"] if stop]
    room = self.max_length - most
    if room <= 0:
      raise InputError(f"harness: a task generates up to {most} tokens, and model.max_len={self.max_length} leaves no "
                       "room for its prompts; set generation_kwargs.max_gen_toks in the file of the task")
    sampler = self._sampler(settings, most, until)
    params, trials, frozen = self.model
    params, trial = jax.tree.map(_first, (params, trials))
    contexts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context, _ in requests]
    texts = sampler.decode(params, trial, frozen, contexts)
    return [postprocess_generated_text(text, until, None) for text in texts]

  def _sampler(self, settings: Any, most: int, until: list[str]) -> Sampler:
    """A sampler with the settings of a request. Those that are part of the compiled program are compiled once."""
    temperature = float(settings.get("temperature", 0.0)) if settings["do_sample"] else 0.0
    drawn = SampleConfig(temperature=temperature, top_k=settings.get("top_k"), top_p=settings.get("top_p"))
    key = (drawn.temperature, drawn.top_k, drawn.top_p)
    if key not in self.samplers:
      self.samplers[key] = Sampler(self.job.program, drawn, self.tokens, self.max_length)
    sampler = self.samplers[key]
    sampler.cfg = replace(drawn, max_tokens=most, stop=until)
    return sampler


def _first(x: jax.Array) -> jax.Array:
  """The part of the only trial."""
  return x[0]
