"""The kernels of each block of a model, in the order in which they are computed. No jax."""

import math
from dataclasses import dataclass

from lora_exp.lora.targets import matches
from lora_exp.models.registry import get_family
from lora_exp.train.costs.workload import Workload


@dataclass(frozen=True)
class Product:
  """One product of features with a kernel (I, O), for each of `count` kernels."""

  path: str
  fan_in: int
  fan_out: int
  count: int = 1  # kernels that each token passes through: experts


@dataclass(frozen=True)
class Stage:
  """Products with the same input: q, k and v; or gate and up."""

  products: tuple[Product, ...]
  attention: bool  # in the attention, or in the feed-forward
  last: bool  # the projection back to the residual stream

  @property
  def fan_in(self) -> int:
    """The features of the input, for all kernels of a stack together."""
    return self.products[0].fan_in * self.products[0].count

  @property
  def fan_out(self) -> int:
    """The features of all outputs."""
    return sum(product.fan_out * product.count for product in self.products)


def blocks_of(work: Workload) -> list[list[Stage]]:
  """The stages of each block: inputs of the attention, its output, inputs of the feed-forward, its output."""
  attention = get_family(work.cfg.model.family).presets.get("attention", ())
  blocks: dict[int, dict[tuple[bool, bool], list[Product]]] = {}
  for path, shape in work.shapes.items():
    owner, _, leaf = path.rpartition(".")
    block = block_number(owner)
    if leaf != "kernel" or block is None:
      continue
    inside = any(matches(pattern, owner) for pattern in attention)
    to_stream = work.rules.logical_axes(path, len(shape))[-1] == "embed"
    product = Product(owner, shape[-2], shape[-1], math.prod(shape[:-2]))
    blocks.setdefault(block, {}).setdefault((inside, to_stream), []).append(product)
  order = [(True, False), (True, True), (False, False), (False, True)]
  return [
    [Stage(tuple(blocks[number][key]), *key) for key in order if key in blocks[number]] for number in sorted(blocks)
  ] if attention else []


def block_number(path: str) -> int | None:
  """The first number in a dotted path: that of the block."""
  return next((int(segment) for segment in path.split(".") if segment.isdigit()), None)
