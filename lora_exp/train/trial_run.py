"""One trial of a pack and its directory: what a run of its own would have written there."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from lora_exp.config import InputError, LoraExpError, NoCheckpointError
from lora_exp.data.rows import Rows
from lora_exp.lora import Adapter
from lora_exp.runtime import console
from lora_exp.runtime.files import write_json
from lora_exp.train import checkpoint, expectations, outputs, token_probabilities
from lora_exp.train.compiled_step import CompiledStep
from lora_exp.train.evaluation import EvalBatch
from lora_exp.train.expectations import End
from lora_exp.train.job import Job
from lora_exp.train.logger import Metrics, make_logger
from lora_exp.train.loop import is_due
from lora_exp.train.outputs import Record
from lora_exp.train.plan import Plan
from lora_exp.train.step import State, Tree
from lora_exp.train.trials import Table, TrialHypers, padded_trial, solo_trial

Batches = list[EvalBatch]


class TrialRun:
  """Trial `number` of `job` in `run_dir`: its record, its files, its outcome.

  `whole` is the pack's table of modules, to which the trial's own arrays are padded.
  """

  def __init__(self, number: int, plan: Plan, run_dir: Path, job: Job, whole: Table, rows: Rows, began: float):
    self.number, self.plan, self.cfg, self.dir = number, plan, plan.cfg, run_dir
    self.job, self.whole, self.rows, self.began = job, whole, rows, began
    self.record = Record(steps=job.steps, data=rows.fingerprint)
    self.status = "failed"  # until it is known better
    self.inactive = False  # done before: it goes along in the program, so that the others are what they would have been
    self.error: LoraExpError | None = None
    self.adapter: Adapter | None = None  # as exported

  # what the loop tells

  def open(self, step: int | None, before: str) -> None:
    """Begins to write, anew or (`step`) after that step; `before` is the digest of the base."""
    self.before = before
    self.metrics = Metrics(self.dir, step)
    self.logger = make_logger(self.cfg.logger, self.dir, self.dir.name, asdict(self.cfg))

  def log(self, step: int, metrics: Mapping[str, Any], seconds: float) -> None:
    """A line of metrics.jsonl for a training step; `seconds` are this trial's share of the pack's."""
    values = {k: float(v[self.number]) for k, v in metrics.items()}
    counted = values.pop("tokens")
    self.record.tokens += int(counted)
    self.record.train_seconds += seconds
    self.record.first = values["loss"] if self.record.first is None else self.record.first
    if step == 1 or is_due(step, self.cfg.train.log_every) or not math.isfinite(values["loss"]):
      self._row(step, "train", **values, tokens_per_s=round(counted / max(seconds, 1e-9), 1))

  def evaluate(self, step: int, scores: dict[str, Any], kept: dict[str, Any] | None) -> bool:
    """Held-out and retained scores; returns whether the held-out loss is the best so far."""
    self._row(step, "eval", **scores)
    best = self.record.note(step, scores)
    if kept is not None:
      self._row(step, "retain", **kept)
      self.record.retain_base = kept["loss"] if step == 0 else self.record.retain_base
      self.record.retain_final = kept["loss"]
    return best

  def draw(self, step: int, prompts: list[str], texts: list[str], show: bool) -> None:
    """Samples into samples.jsonl, and with `show` onto the screen."""
    outputs.add_samples(self.dir, step, prompts, texts)
    if show:
      outputs.show_samples(step, prompts, texts)

  def save(self, step: int, state: State) -> None:
    """A checkpoint of this trial alone, at its own ranks: trained leaves, optimizer, step, position in the data."""
    meta = {"data": {"fingerprint": self.rows.fingerprint, "position": step}, "record": asdict(self.record)}
    best = self.record.best_step if self.cfg.train.export == "best" else None
    checkpoint.save(self.dir, step, self._own(state), meta, best_step=best)

  def _row(self, step: int, split: str, **values) -> None:
    row = {"step": step, "tokens": self.record.tokens, "split": split, **values}
    self.metrics.log(row)
    self.logger.log(row)

  # its part of the pack's state

  def _own(self, state: Any) -> dict[str, jax.Array]:
    return solo_trial(checkpoint.named_leaves(state), self.job.program.method, self.plan.table, self.whole, self.number)

  def restore(self, step: int | None = None) -> tuple[int, dict[str, Any], dict]:
    """(step, state by dotted path as padded for the pack, meta) of its newest checkpoint, or that of `step`."""
    pack = checkpoint.named_leaves(self.job.state)
    abstract = jax.eval_shape(self._own, self.job.state)
    for name, leaf in abstract.items():  # where nothing is padded, straight into its place on the mesh
      if leaf.shape == pack[name].shape:
        abstract[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(pack[name], "sharding", None))
    step, found, meta = checkpoint.restore(self.dir, abstract, step)
    return step, padded_trial(found, pack), meta

  def resume(self, meta: dict) -> None:
    """Takes up the record of a checkpoint; raises InputError if the data is another."""
    if meta["data"]["fingerprint"] != self.rows.fingerprint:
      raise InputError(
        f"train.resume={self.dir}: the data is not what the run was trained on "
        "(the file or the standard library changed); start a new run"
      )
    self.record = Record(**{**meta["record"], "steps": self.job.steps})

  def finished(self) -> bool:
    """Whether every output is written: a kill may come between the last step and them."""
    file = self.dir / "summary.json"
    self.summary = json.loads(file.read_text()) if file.is_file() else {}
    return self.summary.get("status") == "done"

  # the end

  def finish(self, state: State, held: Batches) -> None:
    """adapter/ (or model.safetensors) from the best or the last state, pictures, and what was promised."""
    step, params = self._exported(state)
    self.record.exported_step = step
    self.adapter = outputs.export(self.dir, self.plan, params, step, self.before)
    from lora_exp.report.plots.run_plots import plot_loss  # matplotlib takes half a second to import

    plot_loss(self.dir)
    if self.rows.eval_examples:
      token_probabilities.draw(self.dir, self.job, self.trials, params, [batch.arrays for batch in held], self.plan.tokenizer)
    self.status, self.params = "done", params

  def _exported(self, state: State) -> tuple[int, Tree]:
    """The step and the params (1, …), in the pack's own structure, of the state to export."""
    last, best = int(state.step), self.record.best_step
    if self.cfg.train.export == "best" and best not in (0, last):
      try:
        _, found, _ = self.restore(best)
        leaves = [found[f"params.{name}"] for name in checkpoint.named_leaves(state.params)]
        return best, jax.tree.unflatten(jax.tree.structure(state.params), leaves)
      except NoCheckpointError as error:
        console.show_warning(f"the last state is exported instead of the best: {error}")
    return last, jax.tree.map(lambda x: x[self.number : self.number + 1], state.params)

  @property
  def trials(self) -> TrialHypers:
    """Its numbers, as a pack of one."""
    return jax.tree.map(lambda x: x[self.number : self.number + 1], self.job.trials)

  def close(self, step: CompiledStep | None, code: int) -> None:
    """summary.json, whatever the end was; wandb is told the exit `code`."""
    self.metrics.close()
    self.summary = outputs.summary(
      self.status, self.plan, step, self.record, self.before, time.monotonic() - self.began
    )
    if self.adapter is not None:
      self.summary |= self.adapter.kind.summary(self.adapter.leaves)
    write_json(self.dir / "summary.json", self.summary)
    self.logger.summary(self.summary)
    self.logger.finish(code)

  def check_expectations(self, held: Batches) -> None:
    """What its experiment promised, into summary.json and onto the screen; raises if it is broken."""
    if not self.cfg.expectations:
      return
    end = End(self.job, self.trials, self.params, self.summary, self.dir, held[0].arrays)
    self.summary["promises"] = expectations.check(self.cfg.expectations, end)
    write_json(self.dir / "summary.json", self.summary)
    expectations.show(self.summary["promises"])
