"""Where a NaN or infinity comes from: a row of the data, the trial's parameters or rate, or neither of them."""


import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import batch_rows, train_rows
from lora_exp.train.compute.hyperparameters import data_orders
from lora_exp.train.compute.program import Tree
from lora_exp.train.pack import Pack
from lora_exp.train.trial import Trial

MOST_NAMED = 8  # rows named in a message


def nan_source(pack: Pack, trial: Trial, step: int, params: Tree, passed: int = 0) -> str:
  """Why `step` of `trial` was not finite, after a comma. `params` (N, …) are those that the step did not change.

  The rows of the step's batch are evaluated one at a time, without dropout. `passed`: the number of batches skipped
  before.
  """
  job, cfg = pack.job, trial.plan.cfg
  trial_params, hyperparameters = trial.select((params, job.trials))
  if wrong := _not_finite(trial_params):
    return f", because the trial's parameter {wrong} is not finite"
  if wrong := _not_finite(hyperparameters._replace(clip=jnp.zeros(()))):  # an infinite clip is none
    return f", because the trial's {wrong.removeprefix('.')} is not finite"
  chosen = batch_rows(pack.rows, cfg.data, cfg.train.batch_size, step - 1 + passed, data_orders([cfg])[0][0])
  batch, bad = train_rows(pack.rows, chosen), []
  for place, row in enumerate(chosen):
    loss = job.evaluate(trial_params, hyperparameters, job.frozen, job.put(_only_row(batch, place)))["loss"]
    if not np.isfinite(np.asarray(loss)).all():
      bad.append(row)
  if len(bad) == len(chosen):
    return ", for every row of its batch: the weights or activations of the trial overflow"
  if bad:
    more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    return f", because of the training rows {', '.join(map(str, bad[:MOST_NAMED]))}{more} (from 0)"
  return (", but the loss of each row of its batch is finite when it is evaluated again: the gradient or the update "
          "overflows, or the device failed")


def _not_finite(tree: Tree) -> str | None:
  """The dotted path of an array of `tree` with a value that is not finite, or None."""
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(x.dtype, jnp.inexact) and not jnp.isfinite(x).all():
      return jax.tree_util.keystr(path, simple=True, separator=".")
  return None


def _only_row(batch: Batch, place: int) -> Batch:
  """`batch` with the row at `place` in every position, so that no other row can be the reason."""
  return {name: np.repeat(x[place : place + 1], len(x), axis=0) for name, x in batch.items()}
