"""Adapters disabled, or merged into the kernels, temporarily or until `unmerge`.

    with disabled(model): …    the outputs of the base
    with merged(model): …      one product per kernel, with g ⊙ (W + ΔW)

    undo = merge(model)        a plain model whose kernels are g ⊙ (W + ΔW)
    unmerge(model, undo)       the base and its adapter again

The base's arrays are saved and put back. They are never recomputed by subtraction, so they are restored bit for bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from lora_exp.lora import kernels, layers
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.full_parameters import module_at, trained_in_full
from lora_exp.lora.injection import attach, eject
from lora_exp.lora.module_table import adapted_modules
from lora_exp.lora.quantization import dense


@contextmanager
def disabled(model: nnx.Module) -> Iterator[None]:
  """Context in which the adapters of `model` are off; its outputs are those of the base, bit for bit."""
  trained = [(owner, name, getattr(owner, name)) for owner, name in trained_in_full(model).values()]
  try:
    for owner, name, _ in trained:
      setattr(owner, name, getattr(owner, layers.FROZEN_PREFIX + name))
    with _base_classes(model):
      yield
  finally:
    for owner, name, parameter in trained:
      setattr(owner, name, parameter)


@contextmanager
def merged(model: nnx.Module) -> Iterator[None]:
  """Context in which every adapted kernel of `model` holds g ⊙ (W + ΔW), and the adapters are off."""
  adapted = list(adapted_modules(model).values())
  base_kernels = [(kernels.of(module), kernels.of(module).get_value()) for module in adapted]
  try:
    for module, (kernel, w) in zip(adapted, base_kernels, strict=True):
      kernel.set_value(merged_value(module, w))
    with _base_classes(model):
      yield
  finally:
    for kernel, w in base_kernels:
      kernel.set_value(w)


@contextmanager
def _base_classes(model: nnx.Module) -> Iterator[None]:
  """Context in which every adapted module has its base class."""
  adapted = [(module, type(module)) for module in adapted_modules(model).values()]
  try:
    for module, _ in adapted:
      object.__setattr__(module, "__class__", layers.base_class(module))  # see `layers.attach`
    yield
  finally:
    for module, adapted_class in adapted:
      object.__setattr__(module, "__class__", adapted_class)


@dataclass(frozen=True)
class MergeUndo:
  """What `unmerge` needs: the adapter, and the base's arrays that `merge` replaced, by dotted path."""

  adapter: Adapter
  base: Mapping[str, Any]


def merge(model: nnx.Module) -> MergeUndo:
  """Merges the adapter of `model` into its kernels, in place, and returns what `unmerge` needs to undo it.

  Afterwards `model` has the classes, the graph and the parameter paths of its base. Its adapted kernels hold
  g ⊙ (W + ΔW) in the dtype of W; quantised kernels become dense. Parameters that were trained in full replace those of
  the base. Pass a copy (`nnx.clone`) to keep the adapted model.
  """
  base_values: dict[str, Any] = {}
  merged_values: list[tuple[nnx.Variable, Any]] = []
  for path, module in adapted_modules(model).items():
    kernel = kernels.of(module)
    base_values[path] = kernel.get_value()
    merged_values.append((kernel, merged_value(module, base_values[path])))
  for path, (owner, name) in trained_in_full(model).items():
    parameter = getattr(owner, layers.FROZEN_PREFIX + name)
    base_values[path] = parameter.get_value()
    merged_values.append((parameter, getattr(owner, name)[...].astype(parameter.get_value().dtype)))
  adapter = eject(model)
  for variable, value in merged_values:
    variable.set_value(value)
  return MergeUndo(adapter, base_values)


def unmerge(model: nnx.Module, undo: MergeUndo) -> None:
  """Undoes `merge` in place: restores the base's arrays and attaches the adapter again."""
  for row in undo.adapter.rows:
    kernels.of(module_at(model, row.path)).set_value(undo.base[row.path])
  for path in undo.adapter.full:
    owner, _, name = path.rpartition(".")
    getattr(module_at(model, owner), name).set_value(undo.base[path])
  attach(model, undo.adapter)


def merged_value(module: Any, kernel: Any) -> jax.Array:
  """Returns g ⊙ (W + ΔW) of an adapted module, in the shape of its base class's kernel; `kernel` may be quantised."""
  w_IO = kernels.to_IO(module, dense(kernel, module.param_dtype))
  return kernels.from_IO(module, module.adapted_kernel(w_IO))
