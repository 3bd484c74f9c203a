"""The training loop, for pretraining a base and for training adapters."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_exp.config import DivergedError, ReachedError, RewindError, StoppedError
from lora_exp.config.metrics import metric_values
from lora_exp.data.encoding.records import Batch
from lora_exp.runtime import console
from lora_exp.train.compiled_step import CompiledStep
from lora_exp.train.compute.program import State, Tree
from lora_exp.train.evaluating.evaluation import count_batch
from lora_exp.train.job import Job
from lora_exp.train.step_exchange import Exchange, exchange
from lora_exp.train.stop_signals import stop_signals


@dataclass(frozen=True)
class Cadence:
  """Numbers of steps between evaluations, checkpoints and samples (0: never), and a step to stop after."""

  evaluate: int
  save: int
  sample: int
  stop_at: int | None = None
  on_nan: str = "stop"  # train.on_nan


@dataclass(frozen=True)
class Hooks:
  """Callbacks of the loop. `step` counts finished steps; `metrics` maps names to arrays (N,)."""

  log: Callable[[int, dict[str, np.ndarray], float], None]  # step, metrics, seconds since the previous step
  evaluate: Callable[[int, Tree], bool]  # returns whether to save a checkpoint
  save: Callable[[int, State], None]
  sample: Callable[[int, Tree], None]
  explain: Callable[[int, Tree, np.ndarray], str]  # why the step of the trials (N,) bool is not finite; '' if unknown


def _no_checkpoint(step: int, params: Tree) -> bool:
  return False


def _ignore(*_: Any) -> None:
  """A hook that does nothing."""


def _unexplained(step: int, params: Tree, trials: np.ndarray) -> str:
  return ""


NO_HOOKS = Hooks(log=_ignore, evaluate=_no_checkpoint, save=_ignore, sample=_ignore, explain=_unexplained)
MOST_SKIPPED = 10  # steps in a row that train.on_nan=skip skips


def train_loop(step: CompiledStep, batches: Iterator[Batch], cadence: Cadence, hooks: Hooks, title: str) -> State:
  """Trains from `step.job.state` to step `step.job.steps` and returns the last state.

  The metrics of a step are read after the next step is dispatched, so that the device does not wait for the host.
  Raises StoppedError on a signal and ReachedError at `cadence.stop_at`, both after saving a checkpoint, and
  DivergedError if the step of no trial is finite, after MOST_SKIPPED such steps with `cadence.on_nan=skip`.
  """
  job = step.job
  state, steps, start = job.state, job.steps, int(job.state.step)
  with stop_signals() as stop, console.progress(title, steps, "steps", start=start) as bar:
    arrays, counts = _next_batch(job, batches) if start < steps else ({}, [])
    log = _LateLog(job, hooks, bar, "examples" if "x" in arrays else "tokens", cadence.on_nan)
    layout = job.program.layout
    for number in range(start + 1, steps + 1):
      sent = exchange(layout, stop.requested, counts)
      state, outputs = step(state, arrays)
      if number < steps:
        arrays, counts = _next_batch(job, batches)
      log.flush(state.params)
      log.hold(number, outputs, sent)
      stops = sent.stops if layout.several_processes else stop.requested  # all stop after the same step
      stopping = number < steps and (stops or number == cadence.stop_at)
      if number < steps and (stopping or _pauses(number, cadence)):
        log.flush(state.params)
        _run_hooks(number, state, cadence, hooks, save=stopping)
        if stopping:
          error = StoppedError if stops else ReachedError
          raise error(f"stopped after step {number} of {steps}; its checkpoint is saved")
        log.restart_clock()
    log.flush(state.params)
  return state


def _next_batch(job: Job, batches: Iterator[Batch]) -> tuple[dict[str, Any], list[dict[str, float]]]:
  """The next batch on the devices, and the counts of each order of its rows, in this process."""
  batch, orders, owned = next(batches), job.program.orders, job.owned_rows
  parts = [batch] if orders == 1 else [{name: x[k] for name, x in batch.items()} for k in range(orders)]
  counted = parts if owned is None else [{name: x[owned] for name, x in part.items()} for part in parts]
  return job.put_training(batch), [count_batch(part, job.byte_lengths) for part in counted]


def step_metrics(outputs: Mapping[str, Any], counts: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
  """The metrics (N,) of N trials by name, computed from the `outputs` of `train_step`.

  `counts` are those of each trial's batch. The step's `count` takes precedence; it is at least 1, so that a batch
  without targets does not divide by 0.
  """
  sums_N = {name: np.asarray(x) for name, x in outputs["sums"].items()}
  trials = []
  for n, trial_counts in enumerate(counts):
    trial_sums = {name: x[n] for name, x in sums_N.items()}
    trials.append(metric_values({**trial_counts, **trial_sums}))
  metrics = {name: np.array([trial[name] for trial in trials]) for name in trials[0]}
  others = {name: np.asarray(x) for name, x in outputs.items() if name not in ("sums", "loss")}
  return metrics | others


def _pauses(step: int, cadence: Cadence) -> bool:
  """Whether anything is due after `step`."""
  return any(is_due(step, every) for every in (cadence.evaluate, cadence.sample, cadence.save))


def _run_hooks(step: int, state: State, cadence: Cadence, hooks: Hooks, save: bool) -> None:
  """Calls the hooks that are due after `step`; `save` forces a checkpoint."""
  if is_due(step, cadence.evaluate):
    save |= hooks.evaluate(step, state.params)
  if is_due(step, cadence.sample):
    hooks.sample(step, state.params)
  if save or is_due(step, cadence.save):
    hooks.save(step, state)


def is_due(step: int, every: int) -> bool:
  """Whether `step` is a multiple of `every`; False if `every` is 0."""
  return every > 0 and step % every == 0


class _LateLog:
  """Holds the metrics of the latest step until `flush` reads and logs them."""

  def __init__(self, job: Job, hooks: Hooks, bar: Any, unit: str, on_nan: str):
    self.job, self.hooks, self.bar, self.unit, self.on_nan = job, hooks, bar, unit, on_nan
    self.skipped = 0  # steps in a row that were finite for no trial
    self.pending: tuple[int, dict[str, Any], Exchange] | None = None
    self.clock = time.monotonic()

  def hold(self, step: int, outputs: dict[str, Any], sent: Exchange) -> None:
    self.pending = (step, outputs, sent)

  def restart_clock(self) -> None:
    """Excludes the time since the previous step from the seconds of the next one."""
    self.clock = time.monotonic()

  def flush(self, params: Tree) -> None:
    """Logs the held metrics. `params` are newer ones, for an explanation. Raises DivergedError as `train_loop` does."""
    if self.pending is None:
      return
    step, outputs, sent = self.pending
    counts = sent.counts()
    metrics = step_metrics(outputs, [counts[order] for order in self.job.trial_orders])
    now = time.monotonic()
    seconds, self.clock, self.pending = now - self.clock, now, None
    self.hooks.log(step, metrics, seconds)
    loss, count = float(metrics["loss"][0]), float(np.nan_to_num(metrics["tokens"][0]))
    self.bar.advance(loss=loss, **{f"{self.unit}/s": round(count / max(seconds, 1e-9))})
    finite = metrics["finite"]
    self.skipped = 0 if finite.any() else self.skipped + 1
    if finite.all():
      return
    why = self.hooks.explain(step, params, ~finite)
    if self.on_nan == "rewind":
      raise RewindError(f"{_not_finite(metrics, ~finite)} at step {step}{why}", step)
    if self.on_nan == "skip" and self.skipped <= MOST_SKIPPED:
      names = "" if len(finite) == 1 else f" of trials {', '.join(map(str, np.flatnonzero(~finite)))}"
      console.show_warning(f"step {step}{names} is skipped: {_not_finite(metrics, ~finite)}{why}")
    elif not finite.any():
      raise DivergedError(f"{_not_finite(metrics, ~finite)} at step {step}{why}{self._advice(step)}")

  def _advice(self, step: int) -> str:
    """What to do about a step that is not finite."""
    if step == 1:
      return ", before anything is learned, so the weights, or the activations in model.dtype, are not finite"
    return (f": lower optim.lr (now {self.job.program.optim.lr:g}) or lora.alpha, or set optim.clip; earlier "
            "checkpoints remain")


def _not_finite(metrics: Mapping[str, np.ndarray], trials: np.ndarray) -> str:
  """What is not finite in the first of `trials`, (N,) bool."""
  first = int(np.flatnonzero(trials)[0])
  loss, norm = float(metrics["loss"][first]), float(metrics["grad_norm"][first])
  if not np.isfinite(loss):
    return f"the loss is {loss}"
  return f"the norm of the gradient is {norm}" if not np.isfinite(norm) else "an update is not finite"
