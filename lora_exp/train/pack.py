"""A pack in training: build, train, evaluate, and leave for every trial a directory that is complete by itself."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import DataConfig, DivergedError, LoraExpError, ReachedError, StoppedError
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows, make_rows
from lora_exp.runtime import console
from lora_exp.runtime.mesh import keep_programs
from lora_exp.train import checkpoint, outputs
from lora_exp.train.base import make_base
from lora_exp.train.compiled_step import CompiledStep, abstract_batch, compile_step
from lora_exp.train.evaluation import EvalBatch, byte_lengths, held_out, put_eval_batches
from lora_exp.train.job import make_job
from lora_exp.train.logger import wait_for
from lora_exp.train.loop import Cadence, Hooks, train_loop
from lora_exp.train.memory import check_fits, memory_errors
from lora_exp.train.plan import Plan, steps_of
from lora_exp.train.plan_tables import show_config, show_parameters
from lora_exp.train.sampler import make_sampler
from lora_exp.train.step import State, Tree
from lora_exp.train.trial_run import TrialRun
from lora_exp.train.trials import union


def run(plan: Plan, run_dir: Path) -> None:
  """Trains the adapter of `plan` into `run_dir`, or resumes where `train.resume` stopped."""
  began, cfg = time.monotonic(), plan.cfg
  keep_programs(cfg.cache)
  show_config(plan.saved_cfg, run_dir)
  show_parameters(plan)
  with memory_errors(plan):
    pack = Pack([plan], [run_dir], began)
    pack.train(resumed=cfg.train.resume is not None)
  [trial] = pack.trials
  if trial.error is not None:
    raise trial.error


def rows_of(cfg: DataConfig, plan: Plan) -> Rows:
  """The rows of one source, in the tokens of the plan's base."""
  return make_rows(cfg, plan.tokenizer, plan.cfg.cache)


class Pack:
  """Trials that train in one program over one base and one stream of data; a run is a pack of one.

  `plans` agree on all that the program and the data take from a config (`build.make_job` checks the former). `alone`: a
  run by itself, which shows its samples and its result.
  """

  def __init__(self, plans: Sequence[Plan], run_dirs: Sequence[Path], began: float, alone: bool = True):
    self.plan, self.cfg, self.alone = plans[0], plans[0].cfg, alone
    cfg = self.cfg
    self.rows = rows_of(cfg.data, self.plan)
    retain = rows_of(cfg.retain, self.plan) if cfg.retain else None
    base, base_facts = make_base(self.plan)
    steps = steps_of(cfg, self.rows.train_rows)
    self.job = make_job(self.plan, base, steps, _filled(plans))
    self.step: CompiledStep | None = None
    held = eval_batches(self.rows, cfg.train.batch_size, cfg.train.eval_tokens)
    self.held = list(put_eval_batches(held, self.job.put, byte_lengths(cfg.data, self.plan.tokenizer)))
    self.retain: list[EvalBatch] = []
    if cfg.retain is not None and retain is not None:
      kept = eval_batches(retain, cfg.train.batch_size, cfg.train.retain_tokens)
      lengths = byte_lengths(cfg.retain, self.plan.tokenizer)
      self.retain = list(put_eval_batches(kept, self.plan.layout.put_batch, lengths))
    self.sample = make_sampler(self.job.program, cfg, self.plan.tokenizer)
    whole = union([plan.table for plan in plans])
    pairs = enumerate(zip(plans, run_dirs, strict=True))
    self.trials = [TrialRun(n, plan, path, self.job, whole, self.rows, began) for n, (plan, path) in pairs]
    for trial in self.trials:
      trial.record.base = base_facts

  @property
  def live(self) -> list[TrialRun]:
    """The trials that are written: a diverged one, and one that was done before, only go along in the program."""
    return [trial for trial in self.trials if trial.error is None and not trial.inactive]

  def train(self, resumed: bool = False) -> None:
    """Restores or starts, trains, and writes the outputs whatever the end is.

    What ends one trial alone is kept as its `error`; what ends all of them is raised.
    """
    if resumed and self._restore():
      return
    start = int(self.job.state.step)
    before = outputs.frozen_digest(self.job)
    writing = self.live
    for trial in writing:
      trial.open(start if resumed else None, before)
    try:
      state = self._train(resumed)
      outputs.check_frozen(self.job, before)
      for trial in self.live:
        trial.finish(state, self.held)
    except StoppedError as error:
      self._mark("stopped", error)
      where = outputs.short(self.trials[0].dir)
      raise type(error)(f"{error}; go on with train.resume={where}" if self.alone else str(error)) from None
    except LoraExpError as error:
      self._mark("diverged" if isinstance(error, DivergedError) else "failed", error)
      raise
    finally:
      for trial in writing:
        done = trial.status == "done"
        trial.close(self.step, 0 if done else trial.error.code if isinstance(trial.error, LoraExpError) else 1)
      wait_for([trial.logger for trial in writing])
    for trial in self.live:
      self._show(trial)

  def _mark(self, status: str, error: LoraExpError) -> None:
    for trial in self.live:
      if trial.status != "done":
        trial.status, trial.error = status, error

  def _show(self, trial: TrialRun) -> None:
    if not self.alone:
      return
    asked = next((p.strip() for p in trial.cfg.sample.prompts if '"' not in p), "Once upon a time")
    outputs.show_result(trial.summary, trial.dir, trial.cfg.data, asked)
    trial.check_expectations(self.held)

  def _restore(self) -> bool:
    """Puts the trials' checkpoints together as the pack's state; returns whether nothing is left to do."""
    common = set.intersection(*(set(checkpoint.steps(trial.dir)) for trial in self.live))
    step = None if self.alone else max(common)  # a kill may come between the checkpoints of two trials
    like, found = checkpoint.named_leaves(self.job.state), []
    fresh = lambda n: {name: x[n : n + 1] if x.ndim else x for name, x in like.items()}
    for trial in self.trials:
      if trial.inactive and step not in checkpoint.steps(trial.dir):  # it failed before; what it holds does not matter
        found.append(fresh(trial.number))
        continue
      step, own, meta = trial.restore(step)
      trial.resume(meta)
      found.append(own)
    found += [fresh(n) for n in range(len(self.trials), len(self.job.trials.lr))]
    scalar = found[self.live[0].number]
    join = lambda name: scalar[name] if like[name].ndim == 0 else _stacked([own[name] for own in found])
    state = jax.tree.unflatten(jax.tree.structure(self.job.state), [join(name) for name in like])
    state = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), state, self.job.state)
    self.job = replace(self.job, state=state)
    for trial in self.trials:
      trial.job = self.job
    assert step is not None
    if step >= self.job.steps and all(trial.finished() for trial in self.trials):
      console.show(f"The run is finished: all of its {step} steps are trained, and nothing is left to do.")
      return True
    console.show(f"Resumed at step {step} of {self.job.steps}.")
    return False

  def _train(self, resumed: bool) -> State:
    cfg, job, start = self.cfg, self.job, int(self.job.state.step)
    batches = train_batches(self.rows, cfg.data, cfg.train.batch_size, start)
    try:
      if not resumed:
        self.evaluate(0, job.state.params)
        self.draw(0, job.state.params)
      if start >= job.steps:
        if resumed and job.steps:  # killed before its outputs were written: they tell of the compiled step too
          self.step = compile_step(job, abstract_batch(self.plan))
        return job.state
      if resumed and cfg.train.stop_at is not None and start >= cfg.train.stop_at:
        raise ReachedError(f"stopped after step {start} of {job.steps} already, at train.stop_at={cfg.train.stop_at}")
      first = next(batches)
      self.step = compile_step(job, job.put(first))
      if len(self.trials) > 1:  # narrower ones can do with less
        check_fits(self.step)
      cadence = Cadence(cfg.train.eval_every, cfg.train.save_every, cfg.sample.every, cfg.train.stop_at)
      hooks = Hooks(self.log, self.evaluate, self.save, self.draw)
      state = train_loop(self.step, _again(first, batches), cadence, hooks, "train")
    finally:
      batches.close()
    self.evaluate(job.steps, state.params)
    self.save(job.steps, state)
    self.draw(job.steps, state.params)
    return state

  def log(self, step: int, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
    """A line of metrics.jsonl for every trial; one whose loss is no number is marked, and the others go on."""
    for trial in self.live:
      trial.log(step, metrics, seconds / len(self.trials))
      if not self.alone and not np.isfinite(loss := float(metrics["loss"][trial.number])):
        trial.status = "diverged"
        trial.error = DivergedError(f"the loss is {loss} at step {step}: lower optim.lr (now {trial.cfg.optim.lr:g})")

  def evaluate(self, step: int, params: Tree) -> bool:
    """Held-out and retained loss of every trial; returns whether a held-out one is the best so far."""
    job = self.job
    held = held_out(job.evaluate, params, job.trials, job.frozen, self.held)
    kept = held_out(job.evaluate, params, job.trials, job.frozen, self.retain) if self.retain else []
    best = [
      trial.evaluate(step, held[trial.number].row(), kept[trial.number].row() if kept else None) for trial in self.live
    ]
    return any(best)

  def draw(self, step: int, params: Tree) -> None:
    """Samples of every trial; before the first step all are the base, which is asked once."""
    prompts = self.cfg.sample.prompts
    if not prompts or self.cfg.data.numbers:
      return
    texts: list[str] = []
    for trial in self.live:
      one = lambda tree, n=trial.number: jax.tree.map(lambda x: x[n], tree)
      if not texts or step > 0 or trial.plan.start is not None:
        texts = self.sample(one(params), one(self.job.trials), self.job.frozen, prompts)
      trial.draw(step, prompts, texts, show=self.alone)

  def save(self, step: int, state: State) -> None:
    """A checkpoint of every trial."""
    if len(self.trials) > 1:
      state = jax.device_get(state)  # at once: each trial's part of each array would be fetched by itself
    for trial in self.live:
      trial.save(step, state)


def _filled(plans: Sequence[Plan]) -> list[Plan]:
  """`plans`, and the last one again until the mesh axis `trial` divides several: nobody reads what these become."""
  ways = plans[0].layout.mesh.shape["trial"]
  return [*plans, *[plans[-1]] * (-len(plans) % ways if len(plans) > 1 else 0)]


def _stacked(trials: Sequence[jax.Array]) -> jax.Array:
  return trials[0] if len(trials) == 1 else jnp.concatenate(trials)


def _again(first, batches):
  yield first
  yield from batches
