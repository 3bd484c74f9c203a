"""Finds the quantised tensors of a checkpoint, and dequantises them when they are read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.models.weights.locate import stored_quantisation
from lora_exp.models.weights.quantised_tensors import (
  CODES,
  FourBitTensor,
  QuantisedTensor,
  ScaledTensor,
  is_count,
  parsed_state,
)
from lora_exp.models.weights.stored_tensor import Checkpoint, StoredTensor, read_whole
from lora_exp.runtime.safetensors_reader import ELEMENTS, Slice

FLOAT8 = ("F8_E4M3", "F8_E5M2")
BLOCK = 128  # rows and columns of a block, if config.json does not say
STATE = "quant_state.bitsandbytes__"  # name of a 4-bit tensor's JSON, without its quantisation type
LONGEST_STATE = 10**6  # bytes
# scales of activations, which are not quantised here
ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".input_scale_ub", ".output_scale", ".q_scale", ".k_scale",
                     ".v_scale")  # fmt: skip


@dataclass
class QuantisedTensors:
  """The quantised tensors of a checkpoint by name. `config` is the `quantization_config` of config.json."""

  checkpoint: Checkpoint
  config: Mapping[str, Any]
  found: dict[str, QuantisedTensor] = field(default_factory=dict)
  problems: list[str] = field(default_factory=list)

  def read(self) -> "QuantisedTensors":
    """Finds them; returns self. `problems` has a sentence for each one that is incomplete or invalid."""
    readers: Mapping[str, Callable[[str], None]] = {
      "weight_scale_inv": self._add_scaled, "weight_scale": self._add_scaled, "SCB": self._add_eight_bits,
      "absmax": self._add_four_bits,
    }  # fmt: skip
    for name in self.checkpoint.tensors:
      add = readers.get(name.rpartition(".")[2])
      if add is not None:
        add(name)
    if self.found or self.problems or self.config:
      self.problems += [
        f"{name} is float8, and its scale {name}_scale is missing; download the checkpoint again"
        for name, tensor in self.checkpoint.tensors.items() if tensor.dtype in FLOAT8 and name not in self.found
      ]  # fmt: skip
    return self

  def _stored(self, name: str, quantised: str) -> StoredTensor | None:
    """The tensor `name` that belongs to the quantised tensor `quantised`; None, and a problem, if it is missing."""
    tensor = self.checkpoint.tensors.get(name)
    if tensor is None:
      self.problems.append(f"{quantised} is quantised, and {name} is missing; download the checkpoint again")
    return tensor

  def _add_scaled(self, scale: str) -> None:
    name = f"{scale.rpartition('.')[0]}.weight"
    stored = self._stored(name, scale)
    if stored is None:
      return
    shape = self.checkpoint.tensors[scale].shape
    block = self._block(stored.shape, shape)
    if block is None or stored.dtype not in (*FLOAT8, "I8"):
      self.problems.append(f"{scale} is {shape}, which is no shape for scales of {name}, {stored.dtype} {stored.shape}")
      return
    self.found[name] = ScaledTensor(name, StoredTensor(stored.shape, "F32"), scale, block, parts=(scale,))

  def _block(self, shape: Sequence[int], scales: Sequence[int]) -> tuple[int, int] | None:
    """The rows and columns of a tensor of `shape` that have one of the `scales`; None if these do not fit."""
    if len(shape) != 2:
      return None
    counts = {0: (1, 1), 1: (*scales, 1), 2: tuple(scales)}.get(len(scales), (0, 0))
    rows, columns = map(_block_size, shape, counts, self._block_sizes())
    fits = (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)) == counts
    return (rows, columns) if fits else None

  def _block_sizes(self) -> tuple[int, int]:
    """Rows and columns of a block by config.json; (128, 128) if it does not say."""
    groups = self.config.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    given = self.config.get("weight_block_size") or weights.get("block_structure")
    if isinstance(given, list) and len(given) == 2 and all(map(is_count, given)):
      return given[0], given[1]
    return BLOCK, weights["group_size"] if is_count(weights.get("group_size")) else BLOCK

  def _add_eight_bits(self, scale: str) -> None:
    name, layout = f"{scale.removesuffix('SCB')}weight", f"{scale.removesuffix('SCB')}weight_format"
    stored = self._stored(name, scale)
    if stored is None:
      return
    if stored.dtype != "I8" or len(stored.shape) != 2 or self.checkpoint.tensors[scale].shape != stored.shape[:1]:
      self.problems.append(f"{scale} is {self.checkpoint.tensors[scale].shape}, which is no shape for scales of "
                           f"{name}, {stored.dtype} {stored.shape}")
      return
    if layout in self.checkpoint.tensors and read_whole(self.checkpoint, layout, np.uint8).any():
      self.problems.append(f"{name} is in a layout for one kind of GPU; save the model with a current bitsandbytes")
    tensor, parts = StoredTensor(stored.shape, "F32"), [x for x in (scale, layout) if x in self.checkpoint.tensors]
    self.found[name] = ScaledTensor(name, tensor, scale, (1, stored.shape[1]), 1 / 127, parts)

  def _add_four_bits(self, absmax: str) -> None:
    name = absmax.removesuffix(".absmax")
    states = [x for x in self.checkpoint.tensors if x.startswith(f"{name}.{STATE}")]
    stored, state_name = self._stored(name, absmax), states[0] if states else f"{name}.{STATE}nf4"
    if stored is None or self._stored(state_name, name) is None:
      return
    state = parsed_state(read_whole(self.checkpoint, state_name, np.uint8)[:LONGEST_STATE])
    nested = ["nested_absmax", "nested_quant_map"] if state and "nested_blocksize" in state else []
    parts = [absmax, state_name, *(f"{name}.{part}" for part in ("quant_map", *nested))]
    missing = [part for part in parts if self._stored(part, name) is None]
    if missing:
      return
    if state is None or not self._fits(name, stored, state):
      self.problems.append(f"{state_name} does not describe the stored {name}, {stored.dtype} {stored.shape}")
      return
    tensor = StoredTensor(tuple(state["shape"]), CODES[state["dtype"]])
    self.found[name] = FourBitTensor(name, tensor, state, parts)

  def _fits(self, name: str, stored: StoredTensor, state: Mapping[str, Any]) -> bool:
    """Whether the sizes of a 4-bit tensor's parts agree with its `state`."""
    size = math.prod(state["shape"])
    expected = {"absmax": math.ceil(size / state["blocksize"]), "quant_map": 16}
    if "nested_blocksize" in state:
      expected |= {"nested_absmax": math.ceil(expected["absmax"] / state["nested_blocksize"]), "nested_quant_map": 256}
    sizes = {part: math.prod(self.checkpoint.tensors[f"{name}.{part}"].shape) for part in expected}
    width = ELEMENTS[stored.dtype].itemsize if stored.dtype in ELEMENTS else 0
    return sizes == expected and 0 <= math.prod(stored.shape) * width - math.ceil(size / 2) < width


def _block_size(size: int, count: int, given: int) -> int:
  """The length of a block along an axis of `size` values with `count` scales; `given` is that of the config."""
  if count == 1:
    return size
  return 1 if count == size else given


class DequantisingCheckpoint:
  """A checkpoint whose quantised tensors are dequantised when they are read."""

  def __init__(self, checkpoint: Checkpoint, quantised: Mapping[str, QuantisedTensor]):
    self.checkpoint, self.quantised = checkpoint, quantised
    parts = {part for tensor in quantised.values() for part in tensor.parts}
    self.tensors = {
      name: quantised[name].tensor if name in quantised else tensor
      for name, tensor in checkpoint.tensors.items()
      if name not in parts and not name.endswith(ACTIVATION_SCALES)
    }

  @property
  def files(self) -> Sequence[Path]:
    """All files of the checkpoint."""
    return self.checkpoint.files

  def read(self, name: str, slices: Sequence[Slice]) -> None:
    """Fills the arrays of `slices` with their parts of the tensor. One dequantised tensor is in memory."""
    if name not in self.quantised:
      self.checkpoint.read(name, slices)
      return
    values = self.quantised[name].values(self.checkpoint)
    for index, out in slices:
      out[...] = values[index]


def dequantising(checkpoint: Checkpoint, config: Mapping[str, Any], where: str) -> Checkpoint:
  """Returns `checkpoint` with its quantised tensors dequantised, or itself if it has none that are supported.

  Raises InputError, with the path `where`, for every quantised tensor that is incomplete or invalid.
  """
  if stored_quantisation(checkpoint.tensors) is not None:
    return checkpoint  # loading reports it
  if config.get("transform_config"):
    raise InputError(f"{where}: transform_config of its quantization_config rotates activations, which is not "
                     "supported; use the model in bfloat16, float16 or float32")
  quantised = QuantisedTensors(checkpoint, config).read()
  if quantised.problems:
    raise InputError([f"{where}: {problem}" for problem in quantised.problems])
  return DequantisingCheckpoint(checkpoint, quantised.found) if quantised.found else checkpoint
