"""Reads LoRA on the experts of a layer, whose kernels are one array (E, I, O) here, in the layouts of PEFT's releases.

- stacked, since PEFT 0.19: A (E·r, I) and B (O, r·E) of all experts, in `mlp.experts`. If two parameters are adapted,
  those of the first are in `mlp.experts.base_layer`.
- stacked, PEFT 0.17 and 0.18: the same with I and O exchanged, because the parameter is stored as (E, O, I).
- single, with transformers 4: A (r, I) and B (o, r) for each expert and each stored module. The outputs o of gate and
  up are concatenated here, so their A and B are combined block by block, and their ranks add up.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.peft_files.adapter_config import PeftConfig
from lora_exp.lora.peft_files.config_fields import shortened
from lora_exp.lora.peft_files.names import BASE, ExpertNames, Naming, module_name
from lora_exp.lora.peft_format import LORA_KEYS
from lora_exp.runtime.safetensors_reader import TensorEntry

CURRENT_LAYOUT = (0, 19)  # the first release of PEFT with the current stacked layout


class Factors(NamedTuple):
  """The tensors of one A and B."""

  module: str  # PEFT's name of the module
  expert: int | None  # None: all experts
  part: int  # index of the stored module
  names: dict[str, str]  # "lora_a" and "lora_b" -> name in the file


@dataclass
class ExpertTensors:
  """The tensors of experts in a file, by our path of the kernels."""

  naming: Naming
  shapes: Mapping[str, tuple[int, ...]]  # of kernels (E, I, O), by path
  config: PeftConfig
  entries: Mapping[str, TensorEntry]  # by name in the file
  factors: dict[str, list[Factors]] = field(default_factory=dict)
  used: set[str] = field(default_factory=set)  # names in the file
  problems: list[str] = field(default_factory=list)

  def read(self, names: Sequence[str]) -> "ExpertTensors":
    """Adds the tensors of experts among `names`; returns self."""
    found: dict[tuple[str, int | None, int, str], dict[str, str]] = {}
    stacked: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
      split = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight", name)
      leaf = next((leaf for leaf, key in LORA_KEYS.items() if split and key.startswith(f"{split[2]}.")), None)
      if split is None or leaf is None:
        continue
      single = self._single(split[1])
      if single is not None:
        found.setdefault((*single, split[1]), {})[leaf] = name
        continue
      container, depth = self._container(split[1])
      if container:
        stacked.setdefault(container, {}).setdefault(depth, {})[leaf] = name
    for (path, expert, part, module), leaves in found.items():
      self.factors.setdefault(path, []).append(Factors(_without_prefix(module), expert, part, leaves))
    for container, by_depth in stacked.items():
      self._add_stacked(container, by_depth)
    for pairs in self.factors.values():
      for pair in pairs:
        self.used.update(pair.names.values())
        if len(pair.names) < 2:
          self.problems.append(f"the other factor of {next(iter(pair.names.values()))} is missing")
    return self

  def _single(self, module: str) -> tuple[str, int, int] | None:
    """(our path, expert, index of the stored module) of the module of one expert."""
    for row in self.naming.experts:
      for part, stored in enumerate(row.stored):
        ending = re.escape(stored).replace(r"\{\}", r"(\d+)")
        match = re.fullmatch(rf"(.*\.|)(layers\.\d+\.){ending}", module)
        if match is not None and f"{match[2]}{row.ours}" in self.shapes:
          return f"{match[2]}{row.ours}", int(match[3]), part
    return None

  def _container(self, module: str) -> tuple[str, int]:
    """(our path of the experts of a layer, depth of the wrapper); ("", 0) for another module."""
    depth = 0
    while module.endswith(f".{BASE}"):
      module, depth = module.removesuffix(f".{BASE}"), depth + 1
    for row in self.naming.experts:
      match = re.fullmatch(rf"(.*\.|)(layers\.\d+\.{re.escape(row.ours.rpartition('.')[0])})", module)
      if match is not None:
        return match[2], depth
    return "", 0

  def _add_stacked(self, container: str, by_depth: Mapping[int, dict[str, str]]) -> None:
    """Adds the factors of the parameters of one layer; PEFT wraps the first parameter innermost."""
    parameters = [row.ours.rpartition(".")[2] for row in self.naming.experts]
    chosen = [x for x in parameters if self._is_target(module_name(self.naming, f"{container}.{x}"))]
    if len(chosen) != len(by_depth):
      names = ", ".join(chosen) or "none"
      count = "one parameter" if len(by_depth) == 1 else f"{len(by_depth)} parameters"
      self.problems.append(f"{container} has the factors of {count}, but target_parameters of the config names {names}")
      self.used.update(name for leaves in by_depth.values() for name in leaves.values())
      return
    for parameter, depth in zip(chosen, sorted(by_depth, reverse=True), strict=True):
      path = f"{container}.{parameter}"
      self.factors[path] = [Factors(module_name(self.naming, path), None, 0, by_depth[depth])]

  def _is_target(self, parameter: str) -> bool:
    """Whether target_parameters names the parameter, by the end of its name as in PEFT."""
    return any(f".{parameter}".endswith(f".{target}") for target in self.config.target_parameters)

  def rows(self) -> list[AdaptedModule]:
    """Returns the adapted modules; the rank is the sum over stored modules. Adds a problem for what does not fit."""
    rows = []
    for path, pairs in self.factors.items():
      count, fan_in, fan_out = self.shapes[path]
      parts = {pair.part for pair in pairs}
      for pair in pairs:
        self._check(path, pair)
      for part in parts:
        self._check_absent(path, [pair for pair in pairs if pair.part == part])
      rank = sum(max(self._rank(pair) for pair in pairs if pair.part == part) for part in parts)
      scale = self._scale(pairs[0])
      alpha = scale * (rank**0.5 if self.config.rslora else rank)
      rows.append(AdaptedModule(path, fan_in, fan_out, rank, alpha, scale, count * rank * (fan_in + fan_out)))
    return rows

  def _check_absent(self, path: str, pairs: Sequence[Factors]) -> None:
    """Adds a problem if the config adapts experts that have no tensors. `pairs` are those of one stored module."""
    present = {pair.expert for pair in pairs}
    if present == {None}:
      return
    count, stored = self.shapes[path][0], self._row(path).stored[pairs[0].part]
    prefix = pairs[0].module.removesuffix(stored.format(pairs[0].expert))
    named = {i for i in range(count) if self.config.adapts(prefix + stored.format(i))}
    if not present.issuperset(named):
      self.problems.append(f"{path}: {len(present)} of {count} experts have tensors, although target_modules names "
                           f"{len(named)}")

  def leaves(self, row: AdaptedModule, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns A (E, I, R) and B (E, R, O) of one module; `arrays` are the tensors by name in the file."""
    count, fan_in, fan_out = self.shapes[row.path]
    pairs = self.factors[row.path]
    if pairs[0].expert is None:
      return self._unstacked(row, pairs[0], arrays)
    a, b = np.zeros((count, fan_in, row.rank), np.float32), np.zeros((count, row.rank, fan_out), np.float32)
    width, start = fan_out // self._parts(row.path), 0
    for part in sorted({pair.part for pair in pairs}):
      own = [pair for pair in pairs if pair.part == part]
      for pair in own:
        rank, ratio = self._rank(pair), np.float32(self._scale(pair) / row.scale)
        a[pair.expert, :, start : start + rank] = arrays[pair.names["lora_a"]].T
        outputs = slice(part * width, (part + 1) * width)
        b[pair.expert, start : start + rank, outputs] = ratio * arrays[pair.names["lora_b"]].T
      start += max(self._rank(pair) for pair in own)
    return {"lora_a": a, "lora_b": b}

  def _unstacked(self, row: AdaptedModule, pair: Factors, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A and B of a stacked layout."""
    count = self.shapes[row.path][0]
    a, b = arrays[pair.names["lora_a"]], arrays[pair.names["lora_b"]]
    a_ERi = a.reshape(count, row.rank, -1)
    b_oRE = b.reshape(-1, row.rank, count)
    if self._exchanged(row.path, pair):
      return {"lora_a": np.ascontiguousarray(b_oRE.transpose(2, 0, 1)), "lora_b": np.ascontiguousarray(a_ERi)}
    return {
      "lora_a": np.ascontiguousarray(a_ERi.transpose(0, 2, 1)), "lora_b": np.ascontiguousarray(b_oRE.transpose(2, 1, 0))
    }  # fmt: skip

  def _check(self, path: str, pair: Factors) -> None:
    """Adds the problems of one pair of factors."""
    if len(pair.names) < 2:
      return
    rank, (count, fan_in, fan_out) = self._rank(pair), self.shapes[path]
    a, b = (self.entries[pair.names[leaf]].shape for leaf in ("lora_a", "lora_b"))
    if pair.expert is None:
      expected = [((count * rank, x), (y, count * rank)) for x, y in ((fan_in, fan_out), (fan_out, fan_in))]
    else:
      expected = [((rank, fan_in), (fan_out // self._parts(path), rank))]
      if not self.config.adapts(pair.module):
        given = shortened(self.config.values.get("target_modules"))
        self.problems.append(f"target_modules={given} does not name {pair.module}, whose tensors are in the file")
    if (a, b) not in expected:
      self.problems.append(f"{shortened(pair.names['lora_a'], 200)} is {a} and its lora_B is {b}, expected "
                           f"{' and '.join(map(str, expected[0]))} (r is {rank})")

  def _exchanged(self, path: str, pair: Factors) -> bool:
    """Whether the stacked factors have I and O exchanged; by the release of PEFT if I = O."""
    count, fan_in, fan_out = self.shapes[path]
    if fan_in != fan_out or self.config.extra:  # this program writes the current layout
      a_shape = self.entries[pair.names["lora_a"]].shape
      return a_shape[1] != fan_in
    numbers = re.match(r"(\d+)\.(\d+)", str(self.config.values.get("peft_version")))
    return numbers is None or (int(numbers[1]), int(numbers[2])) < CURRENT_LAYOUT

  def _parts(self, path: str) -> int:
    """The number of stored modules of one expert whose outputs are concatenated."""
    return len(self._row(path).stored)

  def _row(self, path: str) -> ExpertNames:
    return next(row for row in self.naming.experts if path.endswith(row.ours))

  def _rank(self, pair: Factors) -> int:
    return self.config.rank_of([pair.module])

  def _scale(self, pair: Factors) -> float:
    return self.config.scale(self.config.alpha_of([pair.module]), self._rank(pair))


def expert_kernels(naming: Naming | None, full_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes (E, I, O) of the kernels of experts, by path."""
  rows: Sequence[ExpertNames] = naming.experts if naming is not None else ()
  kernels = {path.removesuffix(".kernel"): shape for path, shape in full_shapes.items() if path.endswith(".kernel")}
  return {path: shape for path, shape in kernels.items() if any(path.endswith(f".{row.ours}") for row in rows)}


def _without_prefix(module: str) -> str:
  while module.startswith("base_model.model."):
    module = module.removeprefix("base_model.model.")
  return module
