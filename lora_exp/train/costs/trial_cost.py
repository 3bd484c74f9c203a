"""The cost of each trial of a pack if it ran alone, rather than its share of a program padded to larger ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax

from lora_exp.lora import methods
from lora_exp.train.compiled_step import CompiledStep, abstract_batch, count_step_flops, solo_flops
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.step import joins_leaves
from lora_exp.train.compute.trial_padding import Table
from lora_exp.train.job import Job
from lora_exp.train.records.checkpoint import named_leaves
from lora_exp.train.trial import Trial, solo_state


@dataclass(frozen=True)
class TrialCost:
  """The cost of one optimizer step of one trial, and of compiling it."""

  flops: int  # of all matrix products, at the trial's own ranks and targets
  peak_memory_bytes: int  # on one device
  compile_seconds: float  # of the pack's step


def trial_costs(job: Job, table: Table, trials: Sequence[Trial], step: CompiledStep) -> list[TrialCost]:
  """The cost of each trial of a pack, in order. `table` holds the modules of the pack, `step` is its compiled step.

  FLOPs are counted in the step of the trial alone (`_all_flops`). The memory is that of the pack's step without what
  the other trials add (`_memory`). The seconds of a training step are not attributed here; they are divided by the
  number of trials.
  """
  if len(trials) == 1:
    return [TrialCost(step.flops, step.peak_memory_bytes, step.seconds)]
  flops = _all_flops(job, table, trials)
  return [TrialCost(flops[_shapes(trial)], _memory(job, table, trial, step), step.seconds) for trial in trials]


Shapes = tuple[tuple[str, int], ...]  # (path, rank) of each module


def _shapes(trial: Trial) -> Shapes:
  """The modules that a trial adapts, with their ranks."""
  return tuple((row.path, row.rank) for row in trial.plan.table)


def _has_one_rank(shapes: Shapes, table: Table) -> bool:
  """Whether a trial adapts all modules of `table`, with one rank."""
  return len(shapes) == len(table) and len({rank for _, rank in shapes}) == 1


def _all_flops(job: Job, table: Table, trials: Sequence[Trial]) -> dict[Shapes, int]:
  """The FLOPs of one step of each trial alone, by its modules and ranks.

  Each step is traced. But where the trials differ only in one rank for all modules, and the smallest, a middle and the
  largest rank show that FLOPs are linear in the rank, those of the other ranks are interpolated.
  """
  by_shapes = {_shapes(trial): trial for trial in trials}
  by_rank = {shapes[0][1]: shapes for shapes in by_shapes if shapes and _has_one_rank(shapes, table)}
  counted: dict[Shapes, int] = {}
  if len(by_rank) > 3:
    ranks = sorted(by_rank)
    low, middle, high = ranks[0], ranks[len(ranks) // 2], ranks[-1]
    first, second, last = (_flops(job, table, by_shapes[by_rank[rank]]) for rank in (low, middle, high))
    counted = {by_rank[low]: first, by_rank[middle]: second, by_rank[high]: last}
    if (second - first) * (high - low) == (last - first) * (middle - low):
      counted |= {by_rank[rank]: first + (last - first) * (rank - low) // (high - low) for rank in ranks}
  for shapes, trial in by_shapes.items():
    if shapes not in counted:
      counted[shapes] = _flops(job, table, trial)
  return counted


def _flops(job: Job, table: Table, trial: Trial) -> int:
  """The FLOPs of one step of the trial alone.

  If the trial adapts all modules of a pack that is a loop over trials, the program of the pack is traced with the
  trial's shapes. This takes half the time of making the trial's own program.
  """
  adapted = {row.path for row in trial.plan.table}
  if job.program.mapping != "map" or len(adapted) < len(table) or methods.get(job.program.method).shared_leaves:
    return solo_flops(trial.plan)
  shapes = jax.eval_shape(partial(solo_state, trial, job.program.method, table), job.state)
  state = jax.tree.unflatten(jax.tree.structure(job.state), [shapes[name] for name in named_leaves(job.state)])
  trials, keys = jax.eval_shape(trial.select, (job.trials, job.keys))
  alone = replace(job, program=replace(job.program, orders=1), state=state, trials=trials, keys=keys)
  return count_step_flops(alone, abstract_batch(trial.plan))


def _memory(job: Job, table: Table, trial: Trial, step: CompiledStep) -> int:
  """The bytes of the pack's step on one device, without the state of the other trials and the padding of this one.

  A loop over trials holds the state of all of them twice, as its input and its output, and the temporaries of one
  trial. Under vmap every trial has temporaries, and a trial counts its share of them. The padding of a trial is in its
  state and again in its temporaries: once as gradient, update and new state, which have about the size of the state,
  and once as joined arrays if the update joins small leaves.
  """
  program, state = job.program, job.state
  ways = program.layout.mesh.shape["trial"]
  trials_here = len(job.keys) // ways
  here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
  solo = jax.eval_shape(partial(solo_state, trial, program.method, table), state)
  own = here * ways * _nbytes(solo) // _nbytes(state)
  temporaries = step.working_bytes
  if program.mapping == "map":
    temporaries -= here
  else:
    temporaries //= trials_here
  copies = 2 if joins_leaves(program) else 1
  padding = copies * (here // trials_here - own)
  return step.peak_memory_bytes - step.working_bytes + temporaries - (here - own) - padding


def _nbytes(tree: Tree) -> int:
  """The bytes of all arrays of a tree, on all devices together."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
