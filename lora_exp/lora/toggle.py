"""Adapters off, or merged into the kernels, for a while: `with disabled(model):`, `with merged(model):`.

The base is never recomputed: what was kept comes back, so that afterwards not a bit differs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flax import nnx

from lora_exp.lora import layers, product
from lora_exp.lora.inject import modules


@contextmanager
def disabled(model: nnx.Module) -> Iterator[None]:
  """Inside, the adapters of `model` are off: its outputs are the base's, bit for bit."""
  adapted = [(m, type(m)) for m in modules(model).values() if isinstance(m, layers.Adapter)]
  try:
    for module, _ in adapted:
      object.__setattr__(module, "__class__", layers.base_class(module))  # see `attach`
    yield
  finally:
    for module, kind in adapted:
      object.__setattr__(module, "__class__", kind)


@contextmanager
def merged(model: nnx.Module) -> Iterator[None]:
  """Inside, each adapted kernel is W + s·A·B and the adapters are off; the kept W comes back."""
  adapted: list[Any] = [m for m in modules(model).values() if isinstance(m, layers.Adapter)]
  kernels = [m.embedding if isinstance(m, nnx.Embed) else m.kernel for m in adapted]
  kept = [kernel.get_value() for kernel in kernels]
  try:
    for module, kernel, w in zip(adapted, kernels, kept, strict=True):
      w_IO, a, b = w.reshape(layers.kernel_shape(module)), module.lora_a[...], module.lora_b[...]
      kernel.set_value(product.merge_kernel(w_IO, a, b, module.scale[...]).reshape(w.shape))
    with disabled(model):
      yield
  finally:
    for kernel, w in zip(kernels, kept, strict=True):
      kernel.set_value(w)
