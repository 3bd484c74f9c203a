"""The floating-point operations of a training step, from shapes alone: 2 for each multiply-add. No jax.

Only matrix products are counted, as in `runtime/flops.py`, which counts those of the traced program.
"""

from dataclasses import dataclass

from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.train.costs.block_shapes import Product, Stage, block_number, blocks_of
from lora_exp.train.costs.step_memory import head_of, lowest_trained_block
from lora_exp.train.costs.workload import Workload


@dataclass(frozen=True)
class StepFlops:
  """FLOPs of one optimizer step of one trial, on all devices together."""

  forward: int
  backward: int
  adapters: int  # the thin products and the merged kernels, in both passes
  recomputed: int  # by remat

  @property
  def total(self) -> int:
    """All FLOPs."""
    return self.forward + self.backward + self.adapters + self.recomputed


def step_flops(work: Workload) -> StepFlops:
  """The FLOPs of one step, of all its microbatches."""
  tokens, model = work.step_tokens, work.cfg.model
  blocks = blocks_of(work)
  if not blocks:
    return _dense_flops(work)
  lowest = lowest_trained_block(work, blocks)
  norm_follows = model.arch is None or model.arch.post_norms  # otherwise the last product is not needed again
  attention = 4 * tokens * work.length * _query_features(blocks)  # q·k and weights·v
  forward = backward = recomputed = adapters = 0
  for i, stages in enumerate(blocks):
    block = attention + sum(_product_flops(product, tokens) for stage in stages for product in stage.products)
    forward += block
    if i < lowest:
      continue  # nothing in it is trained
    trained_before = i > lowest or work.method.trains_everything
    for stage in stages:
      if stage.attention and stage.last:
        backward += 2 * attention
      rows = [work.adapted[product.path] for product in stage.products if product.path in work.adapted]
      adapters += sum(_adapter_flops(work, row, tokens, trained_before) for row in rows)
      if trained_before:  # the gradient of the stage's input
        backward += sum(_product_flops(product, tokens) for product in stage.products)
      trained_before = trained_before or bool(rows)
      if work.method.trains_everything:
        backward += sum(_product_flops(product, tokens) for product in stage.products)
    if model.remat:
      last = sum(_product_flops(product, tokens) for product in stages[-1].products)
      recomputed += block - (0 if norm_follows else last)
  head, shape = head_of(work)
  head_product = 2 * tokens * shape[0] * shape[1]
  forward += head_product
  if not work.method.trains_nothing:
    backward += head_product * (2 if work.method.trains_everything else 1)
  outside = [row for row in work.table if block_number(row.path) is None]
  adapters += sum(_adapter_flops(work, row, tokens, trained_before=True) for row in outside)
  return StepFlops(forward, backward, adapters, recomputed)


def _product_flops(product: Product, tokens: int) -> int:
  return 2 * tokens * product.fan_in * product.fan_out * product.count


def _query_features(blocks: list[list[Stage]]) -> int:
  """H·h: the input of the attention's output projection."""
  return next((stage.fan_in for stage in blocks[0] if stage.attention and stage.last), 0)


def _adapter_flops(work: Workload, row: AdaptedModule, tokens: int, trained_before: bool) -> int:
  """FLOPs of x·A and ·B, and of the gradients of A, B and x; or of W + s·A·B and the gradients."""
  shape = work.shapes.get(f"{row.path}.kernel", ())
  count = shape[0] if len(shape) == 3 else 1
  if f"{row.path}.embedding" in work.shapes:
    return 2 * tokens * row.rank * row.fan_out * 3  # A is looked up
  into, out = 2 * tokens * row.rank * row.fan_in, 2 * tokens * row.rank * row.fan_out
  if work.merges(row):
    return count * (2 * row.fan_in * row.rank * row.fan_out * work.cfg.optim.accumulate + 2 * into + 2 * out)
  return count * ((3 if trained_before else 2) * into + 3 * out)


def _dense_flops(work: Workload) -> StepFlops:
  """FLOPs of a multi-layer perceptron."""
  tokens, everything = work.step_tokens, work.method.trains_everything
  forward = backward = adapters = 0
  trained_before = False
  for path, shape in work.shapes.items():
    if not path.endswith(".kernel"):
      continue
    product = 2 * tokens * shape[0] * shape[1]
    row = work.adapted.get(path.removesuffix(".kernel"))
    forward += product
    backward += product * (trained_before + everything)
    adapters += _adapter_flops(work, row, tokens, trained_before) if row is not None else 0
    trained_before = trained_before or everything or row is not None
  return StepFlops(forward, backward, adapters, 0)
