"""The cost of each trial of a pack: what it would cost alone, and not its part of a program padded to larger ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax

from lora_exp.train.compiled_step import CompiledStep, solo_flops
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.trial_padding import Table
from lora_exp.train.job import Job
from lora_exp.train.trial import Trial, solo_state


@dataclass(frozen=True)
class TrialCost:
  """The cost of one optimizer step of one trial, and of compiling it."""

  flops: int  # of all matrix products, at the trial's own ranks and targets
  peak_memory_bytes: int  # on one device
  compile_seconds: float  # of the pack's step


def trial_costs(job: Job, table: Table, trials: Sequence[Trial], step: CompiledStep) -> list[TrialCost]:
  """The cost of each trial of a pack, in order. `table` holds the modules of the pack, `step` is its compiled step.

  FLOPs are counted in the step of the trial alone, which is traced once for each set of ranks and targets. The memory
  is that of the pack's step without what the other trials add (`_memory`). A training step's seconds are not told apart
  here: they are divided by the number of trials.
  """
  if len(trials) == 1:
    return [TrialCost(step.flops, step.peak_memory_bytes, step.seconds)]
  flops: dict[tuple, int] = {}
  costs = []
  for trial in trials:
    shapes = tuple((row.path, row.rank) for row in trial.plan.table)
    if shapes not in flops:
      flops[shapes] = solo_flops(trial.plan)
    costs.append(TrialCost(flops[shapes], _memory(job, table, trial, step), step.seconds))
  return costs


def _memory(job: Job, table: Table, trial: Trial, step: CompiledStep) -> int:
  """The bytes of the pack's step on one device, without the state of the other trials and the padding of this one.

  A loop over trials holds the state of all of them twice, as its input and its output, and the temporaries of one
  trial. Under vmap every trial has temporaries, and a trial counts its share of them. The padding of a trial is in its
  state and once more in its temporaries (gradient, update, new state: about the size of the state).
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
  padding = here // trials_here - own
  return step.peak_memory_bytes - step.working_bytes + temporaries - (here - own) - padding


def _nbytes(tree: Tree) -> int:
  """The bytes of all arrays of a tree, on all devices together."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
