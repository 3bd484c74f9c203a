"""A trial of a pack, and the selection of its arrays from those of the pack."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lora_exp.train.compute.program import State, Tree
from lora_exp.train.compute.trial_padding import Table, padded_trial, solo_trial
from lora_exp.train.plan import Plan
from lora_exp.train.records import checkpoint
from lora_exp.train.records.resume_checks import meta_problem


@dataclass(frozen=True)
class Trial:
  """A trial of a pack: its index, its plan and its run directory."""

  index: int  # on the axis of trials of the pack's arrays
  plan: Plan
  run_dir: Path
  active: bool = True  # False if it ended earlier; it remains in the program but nothing is written

  def select(self, tree: Tree) -> Tree:
    """This trial's part (1, …) of a tree of arrays (N, …)."""
    return jax.tree.map(lambda x: x[self.index : self.index + 1], tree)


def solo_state(trial: Trial, method: str, table: Table, state: State) -> dict[str, jax.Array]:
  """The arrays of one trial by dotted path, with the shapes of a single run. `table` holds the pack's modules."""
  return solo_trial(checkpoint.named_leaves(state), method, trial.plan.table, table, trial.index)


def restore_trial(
  trial: Trial, method: str, table: Table, state: State, step: int | None
) -> tuple[int, dict[str, Any], dict]:
  """Restores (step, arrays (1, …) by dotted path, meta) of a trial; the newest checkpoint if `step` is None.

  The arrays are padded to the shapes of the pack. `state` is any state of the pack, and `table` holds its modules.
  """
  template = checkpoint.named_leaves(state)
  foreign = partial(meta_problem, cfg=trial.plan.saved_cfg)
  abstract = jax.eval_shape(partial(solo_state, trial, method, table), state)
  for name, leaf in abstract.items():  # an array that needs no padding is read directly into its shards
    if leaf.shape == template[name].shape:
      sharding = getattr(template[name], "sharding", None)
      abstract[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  step, arrays, meta = checkpoint.restore(trial.run_dir, abstract, step, foreign)
  return step, padded_trial(arrays, template), meta


def common_steps(trials: Sequence[Trial]) -> set[int]:
  """The steps for which every active trial has a checkpoint."""
  return set.intersection(*(set(checkpoint.steps(trial.run_dir)) for trial in trials if trial.active))
