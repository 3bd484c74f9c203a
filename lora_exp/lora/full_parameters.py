"""Parameters of the base that are trained in full, in addition to the adapters: biases and complete modules."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.lora import layers
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.full_targets import select_full_paths


def full_paths(
  model: nnx.Module,
  table: Sequence[AdaptedModule],
  bias: str = "none",
  train_modules: str | Sequence[str] | None = None,
) -> list[str]:
  """Returns the dotted paths of the parameters to train in full; see `select_full_paths`."""
  parameters = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  return select_full_paths(parameters, table, bias, train_modules)


def train_in_full(model: nnx.Module, paths: Sequence[str]) -> None:
  """Makes the parameters at `paths` trainable, in float32 or wider.

  The base's parameter stays in the same module, under its name with the prefix `frozen_`. An abstract parameter becomes
  zeros, which the caller replaces once the base is loaded.
  """
  for path in paths:
    owner, name = _owner(model, path)
    base = getattr(owner, name)
    value = base.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
      value = jnp.zeros(value.shape, jnp.float32)
    setattr(owner, layers.FROZEN_PREFIX + name, base)
    setattr(owner, name, layers.Trained(value.astype(jnp.promote_types(value.dtype, jnp.float32))))


def trained_in_full(model: nnx.Module) -> dict[str, tuple[Any, str]]:
  """Returns {dotted path: (module, attribute)} of the parameters that `train_in_full` made trainable."""
  owners = {}
  for path, _ in nnx.to_flat_state(nnx.state(model, layers.Trained)):
    dotted = ".".join(map(str, path))
    owners[dotted] = _owner(model, dotted)
  return owners


def module_at(model: nnx.Module, path: str) -> Any:
  """Returns the module at a dotted path; the model itself for the empty path."""
  node: Any = model
  for segment in path.split(".") if path else []:
    node = node[int(segment)] if segment.isdigit() else getattr(node, segment)
  return node


def _owner(model: nnx.Module, path: str) -> tuple[Any, str]:
  """The module that holds the parameter at `path`, and the name of its attribute."""
  owner, _, name = path.rpartition(".")
  return module_at(model, owner), name
