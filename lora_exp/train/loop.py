"""The visible loop, for the base and for the adapters alike, and the compiled programs that it runs."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lora_exp.config import DivergedError, ReachedError, StoppedError
from lora_exp.data.records import Batch
from lora_exp.runtime import console
from lora_exp.runtime.flops import count_flops
from lora_exp.train.evaluation import eval_step
from lora_exp.train.step import Program, State, Tree, state_shardings, train_step
from lora_exp.train.trials import TrialHypers


@dataclass
class Job:
  """A pack ready to train: the program, its arrays on the mesh, and the compiled step."""

  program: Program
  steps: int
  trials: TrialHypers
  frozen: Tree
  state: State
  keys: jax.Array  # (N,) of dropout
  teacher: Any = None  # whose words are learned, or None: a Teacher
  step: Callable[[State, dict], tuple[State, dict]] = field(init=False)
  compiled: Any = field(init=False)
  compile_seconds: float = field(init=False)
  flops: int = field(init=False)  # of the matrix products of one step

  def __post_init__(self):
    self.evaluate = jax.jit(lambda params, trials, frozen, batch: eval_step(self.program, params, trials, frozen, batch))

  def compile(self, batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> None:
    """Compiles the train step for batches like `batch`, with donated state."""
    began = time.monotonic()
    out = (state_shardings(self.program, self.state), self.program.layout.replicated)
    if self.teacher is not None and "teacher" not in batch:
      batch = self.teacher.abstract(batch)
    function = lambda state, trials, frozen, batch, keys: train_step(self.program, state, trials, frozen, batch, keys)
    jitted = jax.jit(function, donate_argnums=0, out_shardings=out)
    traced = jitted.trace(self.state, self.trials, self.frozen, batch, self.keys)
    self.flops = count_flops(traced.jaxpr.jaxpr)
    self.compiled = traced.lower().compile()
    self.step = lambda state, batch: self.compiled(state, self.trials, self.frozen, batch, self.keys)
    self.compile_seconds = time.monotonic() - began

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch on the devices, with what the teacher says of it if there is one."""
    placed = self.program.layout.put_batch(batch)
    return placed if self.teacher is None else self.teacher(placed)

  @property
  def peak_memory_bytes(self) -> int:
    """XLA's own figure for the step: arguments, outputs that are not donated, and temporaries, on one device."""
    return self.compiled.memory_analysis().argument_size_in_bytes + self.working_bytes

  @property
  def working_bytes(self) -> int:
    """The same without the arguments: what a step takes beside the arrays that are there."""
    m = self.compiled.memory_analysis()
    return m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


@dataclass
class Cadence:
  """When the loop pauses; a number of steps of 0 means never."""

  evaluate: int
  save: int
  sample: int
  stop_at: int | None = None


@dataclass
class Hooks:
  """What the loop does beside training. `step` counts finished steps; `metrics` hold an entry for each trial."""

  log: Callable[[int, dict[str, np.ndarray], float], None]  # step, metrics, seconds since the step before
  evaluate: Callable[[int, Tree], bool]  # whether the state is worth saving
  save: Callable[[int, State], None]
  sample: Callable[[int, Tree], None]


def fit(job: Job, batches: Iterator[Batch], cadence: Cadence, hooks: Hooks, title: str) -> State:
  """Trains from `job.state` to `job.steps` and returns the last state; metrics are read while the next step runs.

  Raises StoppedError on a signal, after a checkpoint, and DivergedError when no trial's loss is a finite number.
  """
  state, steps = job.state, job.steps
  first = int(state.step)
  waiting: tuple[int, dict] | None = None
  clock = time.monotonic()

  def flush() -> None:
    nonlocal waiting, clock
    if waiting is None:
      return
    step, metrics = waiting[0], {k: np.asarray(v) for k, v in waiting[1].items()}
    now = time.monotonic()
    seconds, clock, waiting = now - clock, now, None
    hooks.log(step, metrics, seconds)
    loss, tokens = float(metrics["loss"][0]), float(metrics["tokens"][0])
    bar.advance(loss=loss, **{f"{unit}/s": round(tokens / max(seconds, 1e-9))})
    if not np.isfinite(metrics["loss"]).any():
      raise DivergedError(
        f"the loss is {loss} at step {step}: lower optim.lr (now {job.program.optim.lr:g}) or lora.alpha, "
        "or set optim.clip; checkpoints before it remain"
      )

  with signals() as stop, console.progress(title, steps, "steps", start=first) as bar:
    put, batch = job.put, {}
    if first < steps:
      batch = put(next(batches))
    unit = "examples" if "x" in batch else "tokens"
    for step in range(first + 1, steps + 1):
      state, metrics = job.step(state, batch)
      if step < steps:
        batch = put(next(batches))
      flush()
      waiting = (step, metrics)
      if step == steps:
        flush()
        break
      stopping = stop.requested or step == cadence.stop_at
      evaluating, sampling = due(step, cadence.evaluate), due(step, cadence.sample)
      saving = due(step, cadence.save) or stopping
      if not (evaluating or sampling or saving):
        continue
      flush()
      if evaluating:
        saving |= hooks.evaluate(step, state.params)
      if sampling:
        hooks.sample(step, state.params)
      if saving:
        hooks.save(step, state)
      if stopping:
        kind = StoppedError if stop.requested else ReachedError
        raise kind(f"stopped after step {step} of {steps}; its checkpoint is saved")
      clock = time.monotonic()
  return state


def due(step: int, every: int) -> bool:
  """Whether `step` is a multiple of `every`; never where that is 0."""
  return every > 0 and step % every == 0


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # a queue warns with one of the last two


class _Stop:
  requested = False


@contextmanager
def signals() -> Iterator[_Stop]:
  """SIGTERM, the first Ctrl-C and a queue's warning ask for a stop after this step; a second Ctrl-C ends it at once."""
  stop, old = _Stop(), {}

  def ask(number, frame):
    if stop.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    stop.requested = True
    console.show("stopping after this step; Ctrl-C again to stop at once and lose it")

  with suppress(ValueError):  # not the main thread: whoever runs us there handles signals
    old = {s: signal.signal(s, ask) for s in STOPS}
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
