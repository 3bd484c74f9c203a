"""Evaluation of a pack on the held-out and the retained batches: of every trial, and of the shared base only once."""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from lora_exp.lora import methods
from lora_exp.runtime import console
from lora_exp.runtime.console_text import duration
from lora_exp.train.compute.program import Tree
from lora_exp.train.evaluating.evaluation import DocumentSums, EvalBatch, Evaluation, held_out
from lora_exp.train.loop import is_due
from lora_exp.train.pack import Pack

SLOW_SECONDS, SLOW_SHARE = 20.0, 0.1  # of an evaluation, and of the batches of training


class PackEvaluation:
  """The evaluations of a pack during training."""

  def __init__(self, pack: Pack):
    self.pack = pack
    self._timed = pack.resumed  # whether an evaluation of all trials was timed

  def __call__(self, step: int, params: Tree) -> tuple[list[Evaluation], Sequence[Evaluation | None]]:
    """The evaluation of each trial at `step` on the held-out batches, and on the retained ones if there are any."""
    pack, began = self.pack, time.monotonic()
    base_only = step == 0 and _starts_as_base(pack)
    scores = evaluate_pack(pack, params, pack.held_out, pack.documents.sum, base_only)
    if step in (0, pack.job.steps) or is_due(step, pack.plan.cfg.eval.every):
      for evaluator in pack.evaluators:
        with console.phase(evaluator.title):
          scores = evaluator(params, pack.job.trials, pack.job.frozen, scores, strict=step == 0)
    retained: Sequence[Evaluation | None] = [None] * len(scores)
    if pack.retained:
      retained = evaluate_pack(pack, params, pack.retained, None, base_only, "evaluate on retain")
    if not self._timed and not base_only:
      self._timed = True
      _show_slow_evaluation(pack, time.monotonic() - began)
    return scores, retained


def _starts_as_base(pack: Pack) -> bool:
  """Whether several trials compute the same at step 0, bit for bit: the base, plus an update of exactly 0."""
  new = all(trial.plan.start is None for trial in pack.trials)
  return new and len(pack.job.keys) > 1 and methods.get(pack.job.program.method).additive


def _show_slow_evaluation(pack: Pack, seconds: float) -> None:
  """Says how long an evaluation takes, and what shortens it, if it reads more than a tenth of the training tokens."""
  cfg, batches = pack.plan.cfg, len(pack.held_out) + len(pack.retained)
  if seconds > SLOW_SECONDS and batches > SLOW_SHARE * pack.job.steps > 0:
    console.show(f"An evaluation takes about {duration(seconds)} and reads as much as {batches} of the "
                 f"{pack.job.steps} steps: train.eval_tokens={cfg.train.eval_tokens} and "
                 f"train.eval_every={cfg.train.eval_every} set how much and how often.")


def evaluate_pack(
  pack: Pack,
  params: Tree,
  batches: list[EvalBatch],
  document_sums: DocumentSums | None = None,
  base_only: bool = False,
  title: str = "evaluate",
) -> list[Evaluation]:
  """The evaluation of each trial on `batches` and, with `document_sums`, on each document.

  `base_only`: all trials get the results of the first one. A loop over trials then computes no other.
  """
  job = pack.job
  # Retained batches have no documents, but share the program of the held-out ones.
  compute = partial(job.evaluate, segments=pack.documents.segments)
  if len(job.keys) > 1:
    compute = partial(compute, live=np.arange(len(job.keys)) < (1 if base_only else len(job.keys)))
  evaluations = held_out(compute, params, job.trials, job.frozen, batches, document_sums, title)
  return evaluations[:1] * len(evaluations) if base_only else evaluations
