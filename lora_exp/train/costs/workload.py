"""What a training step works on: parameters, adapted modules, mesh and batch, from the settings alone. No jax.

All estimates of memory, operations and communication take a `Workload`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lora_exp.config import Config, InputError
from lora_exp.data.sources import is_numeric
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.declared_methods import declared_of
from lora_exp.lora.method_declaration import MethodDeclaration
from lora_exp.lora.target_table import kernels_of_parameters
from lora_exp.models.registry import get_family
from lora_exp.runtime.axis_rules import BATCH, AxisRules, mesh_sizes
from lora_exp.train.compute.selected_targets import SelectedTargets, select_targets

BYTES = {"float32": 4, "bfloat16": 2}  # of one value
VOCABULARY = {"bytes": 257, "gpt2": 50257, "gpt2_4096": 4096}  # tokens of the built-in tokenizers


@dataclass(frozen=True)
class Workload:
  """One optimizer step of one trial on a mesh."""

  cfg: Config  # with the resolved rank
  shapes: Mapping[str, tuple[int, ...]]  # of the base's parameters, by dotted path
  table: Sequence[AdaptedModule]  # adapted modules
  full: Sequence[str]  # paths of parameters that are trained in full, in addition to the adapters
  method: MethodDeclaration
  vocab_size: int  # V
  rules: AxisRules  # how arrays are split over the mesh

  @property
  def numeric(self) -> bool:
    """Whether the data are numbers instead of text."""
    return is_numeric(self.cfg.data)

  @property
  def length(self) -> int:
    """T, the tokens of a row; 1 for numbers."""
    return 1 if self.numeric else self.cfg.data.seq_len

  @property
  def batch_ways(self) -> int:
    """The number of parts that a batch is split into."""
    return math.prod(self.rules.sizes[axis] for axis in BATCH)

  @property
  def tensor_ways(self) -> int:
    """The number of parts that heads, feed-forward and vocabulary are split into."""
    return self.rules.sizes["tensor"]

  @property
  def devices(self) -> int:
    """All devices of the mesh."""
    return math.prod(self.rules.sizes.values())

  @property
  def microbatch(self) -> int:
    """The rows of a microbatch, on all devices together."""
    return max(1, self.cfg.train.batch_size // self.cfg.optim.accumulate)

  @property
  def rows(self) -> int:
    """The rows of a microbatch on one device."""
    return max(1, math.ceil(self.microbatch / self.batch_ways))

  @property
  def tokens(self) -> int:
    """The tokens of a microbatch on one device."""
    return self.rows * self.length

  @property
  def step_tokens(self) -> int:
    """The tokens of an optimizer step, on all devices together."""
    return self.cfg.train.batch_size * self.length

  @cached_property
  def base_parameters(self) -> int:
    """The number of the base's parameters."""
    return sum(math.prod(shape) for shape in self.shapes.values())

  @cached_property
  def trained_parameters(self) -> int:
    """The number of trained parameters."""
    if self.method.trains_everything:
      return self.base_parameters
    return sum(row.parameters for row in self.table) + sum(math.prod(self.shapes[path]) for path in self.full)

  @cached_property
  def adapted(self) -> Mapping[str, AdaptedModule]:
    """The adapted modules by path."""
    return {row.path: row for row in self.table}

  def merges(self, row: AdaptedModule) -> bool:
    """Whether the adapted kernel is formed in each step, by `lora.compute` and the shapes; see lora/matmul.py."""
    lora = self.cfg.lora
    if lora.dropout > 0 or f"{row.path}.embedding" in self.shapes:
      return False
    if lora.compute != "auto":
      return lora.compute == "merged"
    rows = self.microbatch * self.length
    if any(segment.isdigit() for segment in row.path.split(".")):  # a layer's kernel, which is kept
      rows //= 2
    wide = row.fan_in * row.fan_out < rows * (row.fan_in + row.fan_out)
    return wide and lora.quant is None and self.cfg.model.param_dtype == "float32"

  def with_settings(self, **groups: Mapping[str, object]) -> "Workload":
    """The workload with other settings of some config groups: `train={"batch_size": 16}`."""
    cfg = replace(self.cfg, **{name: replace(getattr(self.cfg, name), **values) for name, values in groups.items()})
    return replace(self, cfg=cfg)


def make_workload(cfg: Config, devices: int) -> Workload:
  """The workload of `cfg` on `devices` devices. Raises InputError that lists every problem."""
  problems = list[str]()
  family, method, vocab_size = get_family(cfg.model.family), declared_of(cfg.lora), vocabulary_of(cfg)
  shapes = family.parameter_shapes(cfg.model, vocab_size)
  parameters = {path: math.prod(shape) for path, shape in shapes.items()}
  selected = SelectedTargets(cfg.lora, [], [])
  try:
    selected = select_targets(cfg.lora, method, kernels_of_parameters(shapes), parameters, family.presets)
  except InputError as error:
    problems += error.problems
  cfg = replace(cfg, lora=selected.lora)
  try:
    sizes = mesh_sizes(cfg.mesh, devices)
  except InputError as error:
    problems += [problem.partition(", or on a CPU")[0] + ", or plan.devices" for problem in error.problems]
    raise InputError(problems) from None
  rules = AxisRules(sizes, family.axes, family.units(cfg.model), method.split_axes)
  workload = Workload(cfg, shapes, selected.table, selected.full, method, vocab_size, rules)
  rows, ways = cfg.train.batch_size // cfg.optim.accumulate, workload.batch_ways
  if rows % ways:
    problems.append(f"train.batch_size={cfg.train.batch_size}: {rows} rows do not divide over the mesh's {ways} batch "
                    f"shards (data × fsdp); use a multiple of {ways * cfg.optim.accumulate}, or lower mesh.data or "
                    "mesh.fsdp")
  if problems:
    raise InputError(problems)
  return workload


def vocabulary_of(cfg: Config) -> int:
  """V: `model.vocab_size`, or the tokens of a built-in tokenizer; other tokenizers are read from their files."""
  model = cfg.model
  if model.vocab_size is not None:
    return model.vocab_size
  if model.tokenizer in VOCABULARY:
    return VOCABULARY[model.tokenizer]
  from lora_exp.data.tokenization import get_tokenizer

  return get_tokenizer(model.tokenizer, model.weights).vocab_size
