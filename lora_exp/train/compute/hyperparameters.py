"""The hyperparameters of the trials of a pack as arrays. A single run is a pack of one trial.

Nothing that differs between trials is a Python constant of the compiled step: scales, rates and decays are arrays with
a leading axis N of trials.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import Config
from lora_exp.train.compute.trial_padding import Table, union


class Hyperparameters(NamedTuple):
  """Hyperparameters of N trials, each of shape (N,); without the axis N inside the mapped step.

  All are float32 except `order`.
  """

  lr: jax.Array  # peak learning rate
  weight_decay: jax.Array
  clip: jax.Array  # largest global norm of the gradient; inf: no clipping
  dropout: jax.Array  # dropout rate on the input of the adapter
  steps: jax.Array  # length of the schedule; equal for all trials, an array so that a new length does not recompile
  lr_ratio: jax.Array  # learning rate of B divided by that of A (LoRA+)
  budget: jax.Array  # average rank per module that AdaLoRA ends with
  scale: jax.Array  # (N, modules); 0 where a trial does not adapt the module
  order: jax.Array  # int32, index of the trial's order of rows among those of the pack


def make_hyperparameters(cfgs: Sequence[Config], tables: Sequence[Table], steps: int) -> Hyperparameters:
  """Collects the hyperparameters of a pack.

  `cfgs` and `tables` hold one entry for each trial, in the order of the trials. `steps` is the length of the run.
  """
  paths = [row.path for row in union(tables)]
  scale = np.zeros((len(cfgs), len(paths)), np.float32)
  for n, table in enumerate(tables):
    for row in table:
      scale[n, paths.index(row.path)] = row.scale

  return Hyperparameters(
    lr=_as_array(cfg.optim.lr for cfg in cfgs),
    weight_decay=_as_array(cfg.optim.weight_decay for cfg in cfgs),
    clip=_as_array(np.inf if cfg.optim.clip is None else cfg.optim.clip for cfg in cfgs),
    dropout=_as_array(cfg.lora.dropout for cfg in cfgs),
    steps=_as_array(steps for _ in cfgs),
    lr_ratio=_as_array(cfg.lora.lr_ratio for cfg in cfgs),
    budget=_as_array(cfg.lora.budget or 0 for cfg in cfgs),
    scale=jnp.asarray(scale),
    order=jnp.array(data_orders(cfgs)[1], jnp.int32),
  )


def data_orders(cfgs: Sequence[Config]) -> tuple[list[int], list[int]]:
  """(seed of each distinct order of rows, index of each trial's order). Without shuffling, there is one order."""
  seeds = [cfg.data.seed if cfg.data.shuffle else 0 for cfg in cfgs]
  distinct = list(dict.fromkeys(seeds))
  return distinct, [distinct.index(seed) for seed in seeds]


def _as_array(values: Iterable[float]) -> jax.Array:
  """One value for each trial as a float32 array (N,)."""
  return jnp.array(list(values), jnp.float32)
