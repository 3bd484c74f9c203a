"""Training of a pack: evaluation, training, and a complete run directory for every trial."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import DivergedError, LoraExpError, ReachedError, StoppedError
from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import train_batches
from lora_exp.data.sources import is_numeric
from lora_exp.runtime import console
from lora_exp.runtime.process_group import lost_processes, meet
from lora_exp.train.background_logger import wait_for
from lora_exp.train.compiled_step import CompiledStep, abstract_batch, compile_step
from lora_exp.train.compute.hyperparameters import data_orders
from lora_exp.train.compute.program import State, Tree
from lora_exp.train.costs.memory import check_fits
from lora_exp.train.costs.trial_cost import TrialCost, trial_costs
from lora_exp.train.evaluating.retention import show_limit
from lora_exp.train.loop import Cadence, Hooks, train_loop
from lora_exp.train.nan_source import nan_source
from lora_exp.train.pack import Pack
from lora_exp.train.pack_evaluation import PackEvaluation, evaluate_pack
from lora_exp.train.records.background_saves import BackgroundSaves
from lora_exp.train.run_summary import read_summary
from lora_exp.train.step_exchange import any_process
from lora_exp.train.stop_signals import StopRequest, stop_signals
from lora_exp.train.trained_weights import check_frozen, frozen_digest
from lora_exp.train.trial_writer import TrialResult, TrialWriter


def train_pack(pack: Pack) -> list[TrialResult]:
  """Trains a pack, or continues a restored one. Writes the files of its active trials even if training fails.

  An error of a single trial and a stop at `train.stop_at` are in the trial's result. Errors that end all trials are
  raised: StoppedError on a signal, DivergedError if no loss is finite, MemoryFullError if the step does not fit.
  """
  if _is_finished(pack):
    console.show(f"The run is already finished: all {pack.job.steps} steps are trained.")
    return [TrialResult(trial, "done", summary=read_summary(trial.run_dir)) for trial in pack.trials]
  if pack.resumed:
    console.show(f"Resumed at step {int(pack.job.state.step)} of {pack.job.steps}.")
    if pack.plan.cfg.eval.metric_file is None and any("custom" in r.scores.get("base", {}) for r in pack.records):
      console.show_warning("the run began with eval.metric_file=FILE.py, which only the command line can name; without "
                           "it, the custom metric is no longer computed")
  with stop_signals() as stop:
    return _train_and_write(pack, stop)


def _train_and_write(pack: Pack, stop: StopRequest) -> list[TrialResult]:
  """`train_pack` for a pack with steps or files left."""
  with console.phase("checksum of the base"):
    base_digest = frozen_digest(pack.job)
  writers = [TrialWriter(pack, trial, base_digest) for trial in pack.trials if trial.active]
  costs: list[TrialCost | None] = [None] * len(pack.trials)
  end: LoraExpError | None = None
  try:
    with closing(_batches(pack)) as batches:
      first = next(batches, None)
      step = _compile(pack, first)
      if step is not None:
        with console.phase("cost of each trial"):
          costs = [*trial_costs(pack.job, pack.table, pack.trials, step)]
      batches_left = chain(() if first is None else (first,), batches)
      with BackgroundSaves() as saves:
        state = _train(pack, step, batches_left, _hooks(pack, writers, saves), stop)
    with console.phase("check that the base is unchanged"):
      check_frozen(pack.job, base_digest)
    exports = [(writer, *writer.state_to_export(state)) for writer in _live(writers)]
    _score_best(pack, state, exports)
    _export(pack, exports)
  except ReachedError as error:
    end = error
  except LoraExpError as error:
    end = error
    raise
  finally:
    results = {writer.trial.index: writer.close(costs[writer.trial.index], end) for writer in writers}
    with console.phase("finish logging"):
      wait_for([writer.logger for writer in writers])
  return [results.get(trial.index) or TrialResult(trial, "inactive") for trial in pack.trials]


def _is_finished(pack: Pack) -> bool:
  """Whether a restored pack has all its steps and files. A kill after the last step may leave files missing."""
  if not pack.resumed or int(pack.job.state.step) < pack.job.steps:
    return False
  done = all(read_summary(trial.run_dir).get("status") == "done" for trial in pack.trials)
  return any_process(pack.job.program.layout, done)  # only the first process has the files


def _batches(pack: Pack) -> Generator[Batch, None, None]:
  """The training batches from the pack's current step on; none if no steps are left."""
  cfg, start = pack.plan.cfg, int(pack.job.state.step)
  if start < pack.job.steps:
    seeds, _ = data_orders([trial.plan.cfg for trial in pack.trials])
    start += pack.records[0].passed_batches  # 0 in a pack of several trials
    size, layout = cfg.train.batch_size, pack.job.program.layout
    part = layout.process_rows(size) if layout.several_processes else None
    with closing(train_batches(pack.rows, cfg.data, size, start, seeds, part)) as batches:
      yield from batches


def _compile(pack: Pack, first: Batch | None) -> CompiledStep | None:
  """Compiles the step; None if nothing is trained, as with lora=frozen. Raises MemoryFullError."""
  job = pack.job
  if job.steps == 0:
    return None
  # Without a batch, only files are missing. summary.json also needs the cost of the step.
  step = compile_step(job, abstract_batch(pack.plan, job.program.orders) if first is None else job.put_training(first))
  if first is not None and len(pack.trials) > 1:  # a narrower pack may fit
    check_fits(step)
  meet()
  return step


def _export(pack: Pack, exports: Sequence[tuple[TrialWriter, int, Tree]]) -> None:
  """Writes the trained weights and the plots of every trial: (writer, step, params)."""
  title = "export and draw plots"
  with console.phase(title) if pack.solo else console.progress(title, len(exports), "trials") as bar:
    for writer, step, params in exports:
      writer.export(step, params)
      bar.advance()


def _live(writers: Sequence[TrialWriter]) -> list[TrialWriter]:
  """The writers of trials that have not diverged. Diverged trials stay in the program without being written."""
  return [writer for writer in writers if writer.failure is None]


@lost_processes()
def _train(
  pack: Pack, step: CompiledStep | None, batches: Iterator[Batch], hooks: Hooks, stop: StopRequest
) -> State:
  """Evaluates the base, trains to the last step, evaluates and saves. Returns the last state.

  Raises StoppedError if `stop` is requested, after the last step too.
  """
  job, cfg = pack.job, pack.plan.cfg
  state, start = job.state, int(job.state.step)
  if not pack.resumed:
    show_limit(pack.plan, pack.records[0].retain_limit)
    hooks.evaluate(0, state.params)
    hooks.sample(0, state.params)
  if step is None or start >= job.steps:
    return state
  stop_at = cfg.train.stop_at
  if pack.resumed and stop_at is not None and start >= stop_at:
    raise ReachedError(f"the run has already reached train.stop_at={stop_at}: it is at step {start} of {job.steps}")
  cadence = Cadence(cfg.train.eval_every, cfg.train.save_every, cfg.sample.every, stop_at, cfg.train.on_nan)
  state = train_loop(step, batches, cadence, hooks, "train")
  hooks.evaluate(job.steps, state.params)
  hooks.save(job.steps, state)
  if any_process(job.program.layout, stop.requested):
    raise StoppedError("stopped after the last step; its checkpoint is saved, and the results are not written yet")
  hooks.sample(job.steps, state.params)
  return state


def _hooks(pack: Pack, writers: Sequence[TrialWriter], saves: BackgroundSaves) -> Hooks:
  """The hooks of the loop. Each computes once for the pack and writes the results of every live trial."""
  job, prompts = pack.job, pack.plan.cfg.sample.prompts
  evaluation = PackEvaluation(pack)

  def log(step: int, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
    for writer in _live(writers):
      writer.log_step(step, metrics, seconds / len(pack.trials))

  def evaluate(step: int, params: Tree) -> bool:
    scores, retained = evaluation(step, params)
    improved = [
      writer.log_evaluation(step, scores[writer.trial.index], retained[writer.trial.index])
      for writer in _live(writers)
    ]
    return any(improved)

  def save(step: int, state: State) -> None:
    with console.phase("save a checkpoint" if pack.solo else "save checkpoints"):
      saves.wait()
      if len(pack.trials) > 1:
        # One transfer instead of one per trial and array; a copy, because the next step overwrites the buffers.
        state = jax.tree.map(np.array, jax.device_get(state))
      for writer in _live(writers):
        write = writer.checkpoint(step, state)
        if len(pack.trials) == 1:  # `state` is not copied, and the next step overwrites its buffers
          write()
        else:
          saves.submit(write)

  def sample(step: int, params: Tree) -> None:
    if not prompts or is_numeric(pack.plan.cfg.data):
      return
    texts: list[str] = []
    with console.phase("generate samples"):
      for writer in _live(writers):
        trial = writer.trial
        if not texts or step > 0 or trial.plan.start is not None:  # at step 0, trials without `init_from` are the base
          trial_params, hyperparameters = jax.tree.map(_first, trial.select((params, job.trials)))
          texts = pack.sampler(trial_params, hyperparameters, job.frozen, prompts)
        writer.log_samples(step, prompts, texts)

  def explain(step: int, params: Tree, trials: np.ndarray) -> str:
    failed = [writer for writer in writers if trials[writer.trial.index] and writer.not_finite_at == step]
    if not failed or job.teacher is not None:
      return ""
    why = nan_source(pack, failed[0].trial, step, params, failed[0].record.passed_batches)
    for writer in failed:
      if writer.failure is not None:
        writer.failure = DivergedError(f"{writer.failure}{why}")
    return why

  return Hooks(log, evaluate, save, sample, explain)


def _score_best(pack: Pack, state: State, exports: Sequence[tuple[TrialWriter, int, Tree]]) -> None:
  """Computes the requested metrics of the exported states (writer, step, params) that lack them."""
  best = [(writer, params) for writer, step, params in exports if writer.lacks_answers(step)]
  if not pack.evaluators or not best:
    return
  by_trial = {writer.trial.index: params for writer, params in best}
  trials = [by_trial.get(n, jax.tree.map(partial(_part, n), state.params)) for n in range(len(pack.job.keys))]
  params = jax.tree.map(_concatenated, state.params, *trials)
  evaluations = evaluate_pack(pack, params, pack.held_out, pack.documents.sum)
  for evaluator in pack.evaluators:
    with console.phase(evaluator.title):
      evaluations = evaluator(params, pack.job.trials, pack.job.frozen, evaluations, strict=False)
  for writer, _ in best:
    writer.log_best(evaluations[writer.trial.index])


def _part(n: int, x: jax.Array) -> jax.Array:
  """The part (1, …) of trial `n`."""
  return x[n : n + 1]


def _concatenated(template: jax.Array, *parts: jax.Array) -> jax.Array:
  """The parts (1, …) of all trials as one array, with the sharding of `template`."""
  return jax.device_put(jnp.concatenate(parts), template.sharding)


def _first(x: jax.Array) -> jax.Array:
  return x[0]
