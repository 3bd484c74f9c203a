"""The communication between devices in a training step, by the sharding of arrays. No jax."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lora_exp.train.costs.block_shapes import blocks_of
from lora_exp.train.costs.step_memory import lowest_trained_block, stage_ways
from lora_exp.train.costs.workload import BYTES, Workload


@dataclass(frozen=True)
class Collective:
  """Operations of one kind over one mesh axis in a step."""

  name: str  # all-gather | all-reduce | reduce-scatter
  of: str  # what is communicated
  axis: str  # mesh axes
  count: int  # operations in a step
  bytes: int  # sent by each device in a step, with ring algorithms


def collectives_of(work: Workload) -> list[Collective]:
  """The collectives of one optimizer step of one trial, without those of single numbers."""
  return [*_gathers(work), *_gradients(work), *_tensor(work)]


def _gathers(work: Workload) -> Iterator[Collective]:
  """All-gathers of the parameters over fsdp, once for each microbatch."""
  ways = work.rules.sizes["fsdp"]
  if ways == 1:
    return
  everything = work.method.trains_everything
  width = 4 if everything else BYTES[work.cfg.model.param_dtype]
  sent, count = 0, 0
  for path, shape in work.shapes.items():
    own, whole = work.rules.local_size(path, shape), work.rules.local_size(path, shape, gathered=True)
    if whole > own:
      sent, count = sent + width * (whole - own), count + 1
  parts = work.cfg.optim.accumulate
  yield Collective("all-gather", "parameters", "fsdp", parts * count, parts * sent)
  if everything:
    yield Collective("reduce-scatter", "gradients", "fsdp", parts * count, parts * sent)


def _gradients(work: Workload) -> Iterator[Collective]:
  """All-reduces of the gradients of the adapters over the batch."""
  ways = work.batch_ways
  if ways == 1 or work.method.trains_nothing:
    return
  everything = work.method.trains_everything
  ways = work.rules.sizes["data"] if everything else ways
  if ways == 1:
    return
  arrays = len(work.shapes) if everything else len(work.table) * len(work.method.leaves) + len(work.full)
  size = 4 * work.trained_parameters / (work.tensor_ways * (work.rules.sizes["fsdp"] if everything else 1))
  axis = "data" if everything else "data × fsdp"
  parts = work.cfg.optim.accumulate
  yield Collective("all-reduce", "gradients", axis, parts * arrays, int(parts * _ring(ways) * size))


def _tensor(work: Workload) -> Iterator[Collective]:
  """All-reduces of features over tensor: after each projection to the residual stream, and of its gradients."""
  ways, blocks = work.tensor_ways, blocks_of(work)
  if ways == 1 or not blocks:
    return
  lowest = lowest_trained_block(work, blocks)
  split = [[stage for stage in stages if stage_ways(work, stage) > 1] for stages in blocks]
  forward = sum(stage.last for stages in split for stage in stages)
  backward = sum(not stage.last for stages in split[lowest:] for stage in stages)
  parts, width = work.cfg.optim.accumulate, BYTES[work.cfg.model.dtype]
  size = width * work.tokens * work.cfg.model.width
  count = parts * (forward + backward + 2)  # and of the embeddings, and of the gradient of the head's input
  yield Collective("all-reduce", "features", "tensor", count, int(count * _ring(ways) * size))


def _ring(ways: int) -> float:
  """The share of an array that each device sends in a ring all-reduce over `ways` devices."""
  return 2 * (ways - 1) / ways


def sent_bytes(collectives: list[Collective]) -> int:
  """The bytes that each device sends in a step."""
  return math.ceil(sum(item.bytes for item in collectives))
