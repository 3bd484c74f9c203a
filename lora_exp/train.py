"""One run: build, train, evaluate, and leave a directory that is complete without the program."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

from lora_exp import answers, checkpoint, outputs, promises, screen
from lora_exp.base import make_base
from lora_exp.build import Plan, check_built, make_job
from lora_exp.config import Config, DataConfig, DivergedError, InputError, LoraExpError, NoCheckpointError, StoppedError
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows, make_rows
from lora_exp.generate import make_sampler
from lora_exp.logger import Metrics, make_logger
from lora_exp.loop import Cadence, Hooks, Job, due, fit, held_out
from lora_exp.mesh import keep_programs
from lora_exp.outputs import Record
from lora_exp.plan import show_config, show_parameters, steps_of
from lora_exp.promises import End
from lora_exp.step import State, Tree


def run(cfg: Config, run_dir: Path) -> None:
  """Trains the adapter of `cfg` into `run_dir`, or goes on where `train.resume` stopped."""
  began = time.monotonic()
  keep_programs(cfg.cache)
  plan = check_built(cfg)
  show_config(cfg, run_dir)
  show_parameters(plan)
  rows = rows_of(cfg.data, plan)
  retain = rows_of(cfg.retain, plan) if cfg.retain else None
  base, base_facts = make_base(plan)
  job = make_job(plan, base, steps_of(cfg, rows.train_rows))
  run = Run(plan, run_dir, job, rows, retain, began)
  run.record.base = base_facts
  run.train()


def rows_of(cfg: DataConfig, plan: Plan) -> Rows:
  """The rows of one source, in the tokens of the plan's base."""
  return make_rows(cfg, plan.tokenizer, plan.cfg.cache)


class Run:
  """One arm in its directory: the loop's hooks and what they write."""

  def __init__(self, plan: Plan, run_dir: Path, job: Job, rows: Rows, retain: Rows | None, began: float):
    self.plan, self.cfg, self.dir, self.job = plan, plan.cfg, run_dir, job
    self.rows, self.began = rows, began
    self.held = self._put(rows, self.cfg.train.eval_tokens)
    self.retain = self._put(retain, self.cfg.train.retain_tokens) if retain else []
    self.sample = make_sampler(job.program, self.cfg, plan.tokenizer)
    self.record = Record(steps=job.steps, data=rows.fingerprint)

  def _put(self, rows: Rows, most: int | None) -> list[dict[str, jax.Array]]:
    batches = eval_batches(rows, self.cfg.train.batch_size, most)
    return [self.plan.layout.put_batch(b) for b in batches]

  def train(self) -> None:
    """Restores or starts, trains, and writes the outputs whatever the end is."""
    cfg, resumed = self.cfg, self.cfg.train.resume is not None
    if resumed:
      step, self.job.state, meta = checkpoint.restore(self.dir, self.job.state)
      self._check_same_data(meta)
      self.record = Record(**{**meta["record"], "steps": self.job.steps})
      if self._finished():
        screen.show(f"The run is finished: all of its {step} steps are trained, and nothing is left to do.")
        return
      screen.show(f"Resumed at step {step} of {self.record.steps}.")
    self.metrics = Metrics(self.dir, int(self.job.state.step) if resumed else None)
    self.logger = make_logger(cfg.logger, self.dir, self.dir.name, asdict(cfg))
    self.before = outputs.frozen_digest(self.job)
    status, code = "failed", 1
    try:
      state = self._train(resumed)
      state = self._finish(state)
      status, code = "done", 0
    except StoppedError as error:
      status, code = "stopped", error.code
      raise StoppedError(f"{error}; go on with train.resume={outputs.short(self.dir)}") from None
    except LoraExpError as error:
      status, code = "diverged" if isinstance(error, DivergedError) else "failed", error.code
      raise
    finally:
      self.metrics.close()
      summary = self._summary(status)
      outputs.write_json(self.dir / "summary.json", summary)
      self.logger.summary(summary)
      self.logger.finish(code)
    asked = next((p.strip() for p in cfg.sample.prompts if '"' not in p), "Once upon a time")
    outputs.show_result(summary, self.dir, None if cfg.data.numbers else asked)
    if cfg.promises:
      summary["promises"] = promises.check(cfg.promises, End(self.job, state, summary, self.dir, self.held[0]))
      outputs.write_json(self.dir / "summary.json", summary)
      promises.show(summary["promises"])

  def _train(self, resumed: bool) -> State:
    cfg, job, start = self.cfg, self.job, int(self.job.state.step)
    batches = train_batches(self.rows, cfg.data, cfg.train.batch_size, start)
    try:
      if not resumed:
        self.evaluate(0, job.state.params)
        self.draw(0, job.state.params)
      if start >= job.steps:
        return job.state
      first = next(batches)
      job.compile(self.plan.layout.put_batch(first))
      stop_at = None if cfg.train.stop_at is not None and cfg.train.stop_at <= start else cfg.train.stop_at
      cadence = Cadence(cfg.train.eval_every, cfg.train.save_every, cfg.sample.every, stop_at)
      hooks = Hooks(self.log, self.evaluate, self.save, self.draw)
      state = fit(job, _again(first, batches), cadence, hooks, "train")
    finally:
      batches.close()
    self.evaluate(job.steps, state.params)
    self.save(job.steps, state)
    self.draw(job.steps, state.params)
    return state

  def log(self, step: int, metrics: dict[str, np.ndarray], seconds: float) -> None:
    """A line of metrics.jsonl for a training step."""
    values = {k: float(v[0]) for k, v in metrics.items()}
    counted = values.pop("tokens")
    self.record.tokens += int(counted)
    self.record.train_seconds += seconds
    self.record.first = values["loss"] if self.record.first is None else self.record.first
    if step == 1 or due(step, self.cfg.train.log_every) or not math.isfinite(values["loss"]):
      self._row(step, "train", **values, tokens_per_s=round(counted / max(seconds, 1e-9), 1))

  def evaluate(self, step: int, params: Tree) -> bool:
    """Held-out and retained loss; returns whether the held-out one is the best so far."""
    [scores] = held_out(self.job, params, self.held)
    self._row(step, "eval", **scores)
    best = self.record.note(step, scores)
    if self.retain:
      [kept] = held_out(self.job, params, self.retain)
      self._row(step, "retain", **kept)
      self.record.retain_base = kept["loss"] if step == 0 else self.record.retain_base
      self.record.retain_final = kept["loss"]
    return best

  def draw(self, step: int, params: Tree) -> None:
    """Samples into samples.jsonl and onto the screen."""
    prompts = self.cfg.sample.prompts
    if not prompts or self.cfg.data.numbers:
      return
    arm = lambda tree: jax.tree.map(lambda x: x[0], tree)
    texts = self.sample(arm(params), arm(self.job.arms), self.job.frozen, prompts)
    outputs.add_samples(self.dir, step, prompts, texts)
    outputs.show_samples(step, prompts, texts)

  def save(self, step: int, state: State) -> None:
    """A checkpoint of the trained leaves, the optimizer, the step and the position in the data."""
    meta = {"data": {"fingerprint": self.rows.fingerprint, "position": step}, "record": asdict(self.record)}
    best = self.record.best_step if self.cfg.train.export == "best" else None
    checkpoint.save(self.dir, step, state, meta, best_step=best)

  def _row(self, step: int, split: str, **values) -> None:
    row = {"step": step, "tokens": self.record.tokens, "split": split, **values}
    self.metrics.log(row)
    self.logger.log(row)

  def _finished(self) -> bool:
    """Whether every step is trained and every output written: a kill may come between the two."""
    file = self.dir / "summary.json"
    whole = file.is_file() and json.loads(file.read_text())["status"] == "done"
    return whole and int(self.job.state.step) >= self.job.steps

  def _check_same_data(self, meta: dict) -> None:
    if meta["data"]["fingerprint"] != self.rows.fingerprint:
      raise InputError(
        f"train.resume={self.cfg.train.resume}: the data is not what the run was trained on "
        "(the file or the standard library changed); start a new run"
      )

  def _finish(self, state: State) -> State:
    """adapter/ (or model.safetensors) from the best or the last state, after the base proved unchanged; that state."""
    outputs.check_frozen(self.job, self.before)
    best = self.record.best_step
    if self.cfg.train.export == "best" and best not in (0, int(state.step)):
      try:
        _, state, _ = checkpoint.restore(self.dir, state, best)
      except NoCheckpointError as error:
        screen.show_warning(f"the last state is exported instead of the best: {error}")
    self.record.exported_step = int(state.step)
    outputs.export(self.dir, self.plan, state, self.before)
    from lora_exp.report import plot_loss  # matplotlib takes half a second to import

    plot_loss(self.dir)
    if self.rows.eval_examples:
      answers.draw(self.dir, self.job, state.params, self.held, self.plan.tokenizer)
    return state

  def _summary(self, status: str) -> dict:
    return outputs.summary(status, self.plan, self.job, self.record, self.before, time.monotonic() - self.began)


def _again(first, batches):
  yield first
  yield from batches
