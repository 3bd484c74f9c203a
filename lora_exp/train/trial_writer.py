"""Writing of a trial's run directory: metrics, samples and checkpoints, and the results at the end."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from lora_exp.config import DivergedError, LoraExpError, NoCheckpointError, StoppedError
from lora_exp.config.errors import BUG, DONE
from lora_exp.config.metrics import REQUESTED
from lora_exp.lora import Adapter
from lora_exp.runtime import console
from lora_exp.runtime.json_lines import read_metrics
from lora_exp.runtime.saved_config import saved_settings
from lora_exp.train.background_logger import make_logger
from lora_exp.train.compute.program import State, Tree
from lora_exp.train.costs.trial_cost import TrialCost
from lora_exp.train.evaluating.document_loss_file import open_document_loss_file
from lora_exp.train.evaluating.evaluation import Evaluation
from lora_exp.train.evaluating.metrics_file import MetricsFile
from lora_exp.train.loop import MOST_SKIPPED, is_due
from lora_exp.train.pack import Pack
from lora_exp.train.probing import token_probabilities
from lora_exp.train.records import checkpoint
from lora_exp.train.run_summary import run_summary, write_summary
from lora_exp.train.sampling.samples import append_samples, show_samples
from lora_exp.train.trained_weights import export_trained
from lora_exp.train.trial import Trial, restore_trial, solo_state


@dataclass(frozen=True)
class TrialResult:
  """How a trial of a pack ended."""

  trial: Trial
  status: str  # done | stopped | diverged | failed | inactive
  error: LoraExpError | None = None
  summary: Mapping[str, Any] | None = None  # summary.json
  params: Tree = None  # exported, (1, …)


class TrialWriter:
  """Writes the files of one trial, from the first evaluation until `close`.

  `failure` is set when the loss of a trial in a pack is not finite. Nothing is written for the trial after that.
  """

  def __init__(self, pack: Pack, trial: Trial, base_digest: str):
    self.pack, self.trial, self.base_digest = pack, trial, base_digest
    self.cfg = trial.plan.cfg
    self.record = pack.records[trial.index]
    step = int(pack.job.state.step)
    self.metrics = MetricsFile(trial.run_dir, step if pack.resumed else None)
    self.documents = open_document_loss_file(trial.run_dir, pack.documents, step if pack.resumed else None)
    rows = read_metrics(trial.run_dir) if pack.resumed else []
    self.logger = make_logger(self.cfg.logger, trial.run_dir, trial.run_dir.name, asdict(self.cfg), rows)
    self.sources = pack.sources_of(trial)
    self.failure: DivergedError | None = None
    self.skipped = 0  # steps in a row that were not finite
    self.not_finite_at = 0  # the latest of them
    self.adapter: Adapter | None = None
    self.exported: Tree = None

  def log_step(self, step: int, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
    """Logs a training step if it is due. `seconds` is the trial's share of the duration of the pack's step."""
    values = {name: float(x[self.trial.index]) for name, x in metrics.items()}
    count, loss, finite = values.pop("tokens"), values["loss"], bool(values.pop("finite"))
    if finite:
      self.record, self.skipped = self.record.after_step(loss, int(count), seconds), 0
    else:
      self.record, self.skipped = replace(self.record, skipped=self.record.skipped + 1), self.skipped + 1
      self.not_finite_at = step
    if step == 1 or is_due(step, self.cfg.train.log_every) or not finite:
      self._log(step, "train", **values, tokens_per_s=round(count / max(seconds, 1e-9), 1))
    if not self.pack.solo and self.skipped > (MOST_SKIPPED if self.cfg.train.on_nan == "skip" else 0):
      rate, what = self.cfg.optim.lr, "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
      self.failure = DivergedError(f"the {what} at step {step}: lower optim.lr (now {rate:g})")

  def log_evaluation(self, step: int, held_out: Evaluation, retained: Evaluation | None) -> bool:
    """Logs an evaluation. Returns whether the held-out loss (of the tuning half) is the best so far."""
    before, scores, halves = self.record, held_out.row(), None
    if self.documents is not None:
      self.documents.add(step, held_out.documents)
      halves = self.pack.documents.half_metrics(held_out.documents, held_out.sums)
    self.record = self.record.after_evaluation(step, scores, halves)
    improved = self.record.best_step != before.best_step
    columns = {f"{half}_{name}": x for half, metrics in (halves or {}).items() for name, x in metrics.items()}
    self._log(step, "eval", **scores, **columns)
    if retained is not None:
      self._log(step, "retain", **retained.row())
      self.record = self.record.after_retention(step, retained.metrics["loss"])
    return improved

  def lacks_answers(self, step: int) -> bool:
    """Whether the state at `step` is the best one, and its answers were not generated during training."""
    base, best = self.record.scores.get("base", {}), self.record.scores.get("best", {})
    return step == self.record.best_step != 0 and any(name in base and name not in best for name in REQUESTED)

  def log_best(self, evaluation: Evaluation) -> None:
    """Records the generated answers of the best state."""
    halves = None
    if self.documents is not None:
      self.documents.add(self.record.best_step, evaluation.documents)
      halves = self.pack.documents.half_metrics(evaluation.documents, evaluation.sums)
    scores = {name: value for name, value in evaluation.metrics.items() if name in REQUESTED}
    more = {half: {name: values[name] for name in scores} for half, values in (halves or {}).items()}
    self.record = self.record.after_scoring(scores, more)

  def log_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Appends to samples.jsonl. A single run also shows the samples."""
    append_samples(self.trial.run_dir, step, prompts, texts)
    if self.pack.solo:
      show_samples(step, prompts, texts)

  def _log(self, step: int, split: str, **values: Any) -> None:
    row = {"step": step, "tokens": self.record.tokens, "split": split, **values}
    self.metrics.log(row)
    self.logger.log(row)

  def checkpoint(self, step: int, state: State) -> Callable[[], None]:
    """Returns the call that saves a checkpoint of this trial at its ranks; first writes what must be on disk before it.

    A checkpoint holds the trained leaves, the optimizer state, the step and the position in the data.
    """
    data = {**self.sources, "position": step}
    meta = {"data": data, "record": asdict(self.record), "settings": saved_settings(self.trial.plan.saved_cfg)}
    best = self.record.best_step if self.cfg.train.export == "best" else None
    if self.documents is not None:
      self.documents.write()
    arrays = solo_state(self.trial, self.pack.job.program.method, self.pack.table, state)
    self.metrics.sync()  # a resumed run has the rows of all steps before its checkpoint
    return partial(checkpoint.save, self.trial.run_dir, step, arrays, meta, best_step=best)

  def export(self, step: int, params: Tree) -> None:
    """Writes the trained weights of the state of `state_to_export`, and the plots."""
    self.record = replace(self.record, exported_step=step)
    self.adapter = export_trained(self.trial.run_dir, self.trial.plan, params, step, self.base_digest)
    from lora_exp.report.plots.run_plots import plot_loss  # Altair takes half a second to import

    plot_loss(self.trial.run_dir)
    if self.pack.rows.eval_examples:
      trials, batches = self.trial.select(self.pack.job.trials), [batch.arrays for batch in self.pack.held_out]
      token_probabilities.draw(
        self.trial.run_dir, self.pack.job, trials, params, batches, self.trial.plan.tokenizer
      )
    self.exported = params

  def state_to_export(self, state: State) -> tuple[int, Tree]:
    """(step, params) of the state to export; params are (1, …), padded to the shapes of the pack."""
    last, best = int(state.step), self.record.best_step
    if self.cfg.train.export == "best" and best not in (0, last):
      try:
        _, arrays, _ = restore_trial(self.trial, self.pack.job.program.method, self.pack.table, state, best)
        leaves = [arrays[f"params.{name}"] for name in checkpoint.named_leaves(state.params)]
        return best, jax.tree.unflatten(jax.tree.structure(state.params), leaves)
      except NoCheckpointError as error:
        console.show_warning(f"exporting the last state instead of the best one: {error}")
    return last, self.trial.select(state.params)

  def close(self, cost: TrialCost | None, end: LoraExpError | None) -> TrialResult:
    """Writes summary.json and ends logging. `end` is the error that ended the pack, or None."""
    done = self.exported is not None
    error = None if done else self.failure or end
    status = "done" if done else _status(error)
    seconds = time.monotonic() - self.pack.started
    summary = run_summary(status, self.trial.plan, cost, self.record, self.base_digest, seconds)
    summary["data_notes"] = list(self.pack.rows.notes)
    summary["not_learned"] = [asdict(count) for count in self.pack.rows.not_learned]
    if self.record.skipped:
      summary["skipped_steps"] = self.record.skipped
    if self.adapter is not None:
      summary |= self.adapter.kind.summary(self.adapter.leaves)
    self.metrics.close()
    if self.documents is not None:
      self.documents.write()
    write_summary(self.trial.run_dir, summary)
    self.logger.summary(summary)
    self.logger.finish(DONE if done else BUG if error is None else error.code)
    return TrialResult(self.trial, status, error, summary, self.exported)


def _status(error: LoraExpError | None) -> str:
  """The status of a trial that did not finish."""
  if isinstance(error, StoppedError):
    return "stopped"
  return "diverged" if isinstance(error, DivergedError) else "failed"
