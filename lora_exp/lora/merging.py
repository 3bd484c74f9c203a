"""Adapters off, or merged into the kernels, for a while or for good.

    with disabled(model): …    the base answers        kept = merge(model)      a plain model with g ⊙ (W + ΔW)
    with merged(model): …      one product a kernel    unmerge(model, kept)     the base and its adapter again

The base is never recomputed: what was kept comes back, so that afterwards not a bit differs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from lora_exp.lora import kernels, layers
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.inject import adapted_modules, attach, eject, trained_in_full
from lora_exp.lora.quantization import dense


@contextmanager
def disabled(model: nnx.Module) -> Iterator[None]:
  """Inside, the adapters of `model` are off: its outputs are the base's, bit for bit."""
  full = [(owner, name, getattr(owner, name)) for owner, name in trained_in_full(model).values()]
  try:
    for owner, name, _ in full:
      setattr(owner, name, getattr(owner, layers.FROZEN_PREFIX + name))
    with _as_base_classes(model):
      yield
  finally:
    for owner, name, trained in full:
      setattr(owner, name, trained)


@contextmanager
def merged(model: nnx.Module) -> Iterator[None]:
  """Inside, each adapted kernel is g ⊙ (W + ΔW) and the adapters are off; the kept W comes back."""
  adapted = list(adapted_modules(model).values())
  kept = [(kernels.of(module), kernels.of(module).get_value()) for module in adapted]
  try:
    for module, (kernel, w) in zip(adapted, kept, strict=True):
      kernel.set_value(merged_value(module, w))
    with _as_base_classes(model):
      yield
  finally:
    for kernel, w in kept:
      kernel.set_value(w)


@contextmanager
def _as_base_classes(model: nnx.Module) -> Iterator[None]:
  adapted = [(m, type(m)) for m in adapted_modules(model).values()]
  try:
    for module, _ in adapted:
      object.__setattr__(module, "__class__", layers.base_class(module))  # see `layers.attach`
    yield
  finally:
    for module, kind in adapted:
      object.__setattr__(module, "__class__", kind)


@dataclass(frozen=True)
class MergeUndo:
  """What `merge` took off a model: the adapter, and the base's arrays that it replaced, by their paths."""

  adapter: Adapter
  base: Mapping[str, Any]


def merge(model: nnx.Module) -> MergeUndo:
  """Makes `model` a plain one of the base's classes whose kernels hold the update, in their own dtype.

  A quantised kernel becomes a dense one. Returns what `unmerge` needs.
  """
  replaced: dict[str, Any] = {}
  new: list[tuple[nnx.Variable, Any]] = []
  for path, module in adapted_modules(model).items():
    kernel = kernels.of(module)
    replaced[path] = kernel.get_value()
    new.append((kernel, merged_value(module, replaced[path])))
  for path, (owner, name) in trained_in_full(model).items():
    base = getattr(owner, layers.FROZEN_PREFIX + name)
    replaced[path] = base.get_value()
    new.append((base, getattr(owner, name)[...].astype(base.get_value().dtype)))
  adapter = eject(model)
  for variable, value in new:
    variable.set_value(value)
  return MergeUndo(adapter, replaced)


def unmerge(model: nnx.Module, kept: MergeUndo) -> None:
  """Undoes `merge`: the base's kept arrays return, and the adapter beside them."""
  for row in kept.adapter.rows:
    kernels.of(_at(model, row.path)).set_value(kept.base[row.path])
  for path in kept.adapter.full:
    owner, _, name = path.rpartition(".")
    getattr(_at(model, owner), name).set_value(kept.base[path])
  attach(model, kept.adapter)


def merged_value(module: Any, kernel: Any) -> jax.Array:
  """The kernel of an adapted module with its update added, in the shape that the module's base class takes."""
  w_IO = kernels.to_IO(module, dense(kernel, module.param_dtype))
  return kernels.from_IO(module, module.adapted_kernel(w_IO))


def _at(model: nnx.Module, path: str) -> Any:
  node: Any = model
  for part in path.split(".") if path else []:
    node = node[int(part)] if part.isdigit() else getattr(node, part)
  return node
