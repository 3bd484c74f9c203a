"""The learning rate schedule and the optimizer of one trial. Rates may be traced arrays."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lora_exp.config import OptimConfig
from lora_exp.lora import methods
from lora_exp.runtime.mesh import Layout, dotted
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Program, Tree

ADAMW_RMS = 0.2  # root mean square of an AdamW update, for which Muon's is scaled


def schedule(cfg: OptimConfig, steps: jax.Array, step: jax.Array) -> jax.Array:
  """The factor on the peak learning rate at `step` (from 0): linear warmup, then constant, linear or cosine decay."""
  step_f32 = jnp.asarray(step, jnp.float32)
  progress = jnp.clip((step_f32 - cfg.warmup) / jnp.maximum(1, steps - cfg.warmup), 0, 1)
  if cfg.schedule == "linear":
    decay = 1 - progress
  elif cfg.schedule == "cosine":
    decay = 0.5 * (1 + jnp.cos(jnp.pi * progress))
  else:
    decay = jnp.ones(())
  return jnp.minimum(1, (step_f32 + 1) / max(1, cfg.warmup)) * decay


def make_optimizer(
  program: Program, trial: Hyperparameters, lr: jax.Array, norm: jax.Array | None = None
) -> optax.GradientTransformation:
  """The optax transformation of one trial. Weight decay is decoupled (arXiv 1711.05101) and applies only to matrices.

  The method may scale some updates (LoRA+) or wrap the optimizer (AdaLoRA). `norm` is the norm of the gradient by which
  it is clipped; by default, the optimizer computes it.
  """
  cfg, method = program.optim, methods.get(program.method)
  b1, b2 = cfg.betas
  if cfg.name == "sgd":
    rule = optax.sgd(lr, momentum=cfg.momentum or None)
  elif cfg.name == "adam":
    rule = optax.adam(lr, b1=b1, b2=b2, eps=cfg.eps)
  elif cfg.name == "muon":
    rule = _muon(cfg, program.layout, trial.weight_decay, lr)
  else:
    rule = optax.adamw(lr, b1=b1, b2=b2, eps=cfg.eps, weight_decay=trial.weight_decay, mask=_is_matrix)
  rule = optax.chain(rule, method.update_factors(trial))
  if cfg.clip is not None:
    rule = optax.chain(clip(norm, trial.clip), rule)
  return method.wrap_optimizer(rule, trial)


def clip(norm: jax.Array | None, largest: jax.Array) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, by a `norm` that is already known if there is one."""
  if norm is None:
    return optax.clip_by_global_norm(largest)

  def clip_all(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    def clipped(x: jax.Array) -> jax.Array:
      return jnp.where(norm < largest, x, x / norm.astype(x.dtype) * largest)

    return jax.tree.map(clipped, updates)

  return optax.stateless(clip_all)


def _muon(cfg: OptimConfig, layout: Layout, weight_decay: jax.Array, lr: jax.Array) -> optax.GradientTransformation:
  """Muon for hidden matrices, AdamW for all other parameters.

  Muon's updates have the root mean square of AdamW's, so one rate suits both (arXiv 2502.16982, equation 4).
  """

  def dimensions(params: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(partial(_muon_dimensions, layout), params)

  b1, b2 = cfg.betas
  return muon(
    lr,
    eps=cfg.eps,
    weight_decay=weight_decay,
    adam_b1=b1,
    adam_b2=b2,
    muon_weight_dimension_numbers=dimensions,
    consistent_rms=ADAMW_RMS,
  )


def _muon_dimensions(layout: Layout, key_path: Sequence[Any], x: jax.Array) -> MuonDimensionNumbers | None:
  """The axes of a kernel (…, I, O); None for the head, for embeddings and for vectors."""
  path = dotted(key_path)
  is_hidden = path.endswith("kernel") and "vocab" not in layout.rules.logical_axes(path, x.ndim)
  return MuonDimensionNumbers(-2, -1) if is_hidden and x.ndim > 1 else None


def _is_matrix(params: Tree) -> Tree:
  """A mask of the arrays with more than one axis."""
  return jax.tree.map(lambda x: x.ndim > 1, params)
