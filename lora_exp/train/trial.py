"""One trial of a pack, and its part of the pack's arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lora_exp.train import checkpoint
from lora_exp.train.plan import Plan
from lora_exp.train.program import State, Tree
from lora_exp.train.trial_padding import Table, padded_trial, solo_trial


@dataclass(frozen=True)
class Trial:
  """A trial's place in a pack, its plan and its run directory."""

  index: int  # on the axis of trials of the pack's arrays
  plan: Plan
  run_dir: Path
  active: bool = True  # an inactive trial has ended before: it keeps its place in the program, and is not written

  def select(self, tree: Tree) -> Tree:
    """This trial's part (1, …) of a tree of arrays (N, …)."""
    return jax.tree.map(lambda x: x[self.index : self.index + 1], tree)


def solo_state(trial: Trial, method: str, table: Table, state: State) -> dict[str, jax.Array]:
  """The arrays of one trial by dotted path, as a run of its own has them; `table` is the pack's."""
  return solo_trial(checkpoint.named_leaves(state), method, trial.plan.table, table, trial.index)


def restore_trial(
  trial: Trial, method: str, table: Table, state: State, step: int | None
) -> tuple[int, dict[str, Any], dict]:
  """(step, arrays (1, …) by dotted path, meta) of a trial's checkpoint, the newest one if `step` is None.

  The arrays are padded to the shapes of the pack, of which `state` is any state and `table` the modules.
  """
  template = checkpoint.named_leaves(state)
  abstract = jax.eval_shape(lambda state: solo_state(trial, method, table, state), state)
  for name, leaf in abstract.items():  # an array that needs no padding is read straight into its place on the mesh
    if leaf.shape == template[name].shape:
      sharding = getattr(template[name], "sharding", None)
      abstract[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  step, arrays, meta = checkpoint.restore(trial.run_dir, abstract, step)
  return step, padded_trial(arrays, template), meta


def common_steps(trials: Sequence[Trial]) -> set[int]:
  """The steps of which every active trial has a checkpoint."""
  return set.intersection(*(set(checkpoint.steps(trial.run_dir)) for trial in trials if trial.active))
