"""The tensors of an adapter file: their names, shapes and layout in PEFT (checked with PEFT 0.21.2).

PEFT stores lora_A (rank, in) and lora_B (out, rank), also for GPT-2's Conv1D; lora_embedding_A and lora_embedding_B for
an embedding; and the shared matrices of VeRA once. A method without a format of its own is written as LoRA: PiSSA and
OLoRA as [A, A₀] and [B; −B₀] at twice the rank, AdaLoRA as A·diag(e) and B without the pruned ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter, BaseChanges
from lora_exp.lora.methods import Method
from lora_exp.lora.peft_files.names import (
  BASE,
  OUTPUT_BIAS,
  PREFIX,
  TOKEN_ROWS,
  Naming,
  expert_modules,
  module_name,
  parameter_name,
  trained_modules,
)
from lora_exp.lora.peft_format import PeftFormat


class FileTensor(NamedTuple):
  """A tensor of a file: a leaf of the module at `path`, or, if `leaf` is empty, the parameter at `path`."""

  path: str  # empty for a leaf that all modules share
  leaf: str
  shape: tuple[int, ...]  # in the file
  transposed: bool  # the last two axes are swapped in the file
  vector: bool = False  # a vector that the file stores as a matrix with one row or column
  order: tuple[int, ...] = ()  # of the axes in the file, if two of them are joined there (experts)

  def to_file(self, x: np.ndarray) -> np.ndarray:
    """Converts an array to the layout of the file."""
    if self.order:
      return np.ascontiguousarray(x.transpose(self.order).reshape(self.shape))
    x = np.swapaxes(x, -1, -2) if self.transposed else x
    return np.ascontiguousarray(x.reshape(self.shape) if self.vector else x)

  def from_file(self, x: np.ndarray) -> np.ndarray:
    """The inverse of `to_file`."""
    x = x.reshape(-1) if self.vector else x
    return np.ascontiguousarray(np.swapaxes(x, -1, -2)) if self.transposed else x


def layout(
  method: Method,
  rows: Sequence[AdaptedModule],
  leaf_names: Mapping[str, Sequence[str]],
  full: Mapping[str, tuple[int, ...]],
  naming: Naming | None,
  leads: Mapping[str, Sequence[int]],
) -> dict[str, FileTensor]:
  """Returns every tensor of an adapter file, by its name in the file.

  `leaf_names` holds the leaves of each module, `full` the shapes of the parameters that were trained in full, and
  `leads` the leading axes of stacked kernels, all by path.
  """
  form = format_of(method)
  file_tensors = {}
  experts = expert_modules(naming, (row.path for row in rows))
  for row in rows:
    if row.path in experts:
      for leaf in leaf_names[row.path]:
        name = f"{PREFIX}{experts[row.path]}.{form.keys[leaf]}"
        file_tensors[name] = _expert_tensor(method, leaf, row, leads[row.path][0])
      continue
    is_table = naming is not None and row.path in naming.tables
    suffixes = form.table_keys if is_table and form.table_keys else form.keys
    lead = leads.get(row.path, ())
    for leaf in leaf_names[row.path]:
      name = f"{PREFIX}{module_name(naming, row.path)}.{suffixes[leaf]}"
      file_tensors[name] = _leaf_tensor(method, leaf, row.path, method.sizes(row), lead, naming is not None)
    if form.adapts_tied_head and naming is not None and naming.tied is not None and row.path == naming.tied.path:
      head = PREFIX + naming.tied.head  # A and B of the head are B and A of the table
      file_tensors[f"{head}.lora_A.weight"] = FileTensor(row.path, "lora_b", (row.rank, row.fan_out), False)
      file_tensors[f"{head}.lora_B.weight"] = FileTensor(row.path, "lora_a", (row.fan_in, row.rank), False)
  if rows:
    for leaf, name in form.shared_keys.items():
      file_tensors[name] = _leaf_tensor(method, leaf, "", largest_sizes(rows), (), naming is not None)
  return file_tensors | _full_tensors(rows, full, naming)


def _leaf_tensor(
  method: Method, leaf: str, path: str, sizes: Mapping[str, int], lead: Sequence[int], peft: bool
) -> FileTensor:
  """The tensor of one leaf; `peft`: PEFT can load the file, so its layout of vectors applies."""
  axes = method.leaves[leaf].axes
  shape = [sizes[axis] for axis in axes]
  column = format_of(method).column_axes.get(leaf) if peft else None
  if column is not None:
    return FileTensor(path, leaf, (shape[0], 1) if column == 0 else (1, shape[0]), False, True)
  transposed = len(axes) == 2
  return FileTensor(path, leaf, (*lead, *(shape[::-1] if transposed else shape)), transposed)


def _expert_tensor(method: Method, leaf: str, row: AdaptedModule, count: int) -> FileTensor:
  """The tensor of one leaf of `count` experts: A (E, I, R) as (E·R, I), and B (E, R, O) as (O, R·E)."""
  first, last = tuple(method.leaves[leaf].axes)
  sizes = row.sizes()
  if last == "R":
    return FileTensor(row.path, leaf, (count * row.rank, sizes[first]), False, order=(0, 2, 1))
  return FileTensor(row.path, leaf, (sizes[last], row.rank * count), False, order=(2, 1, 0))


def largest_sizes(rows: Sequence[AdaptedModule]) -> dict[str, int]:
  """Returns I, O and R of shared leaves: the largest of all modules."""
  return {axis: max(row.sizes()[axis] for row in rows) for axis in "IOR"}


def format_of(method: Method) -> PeftFormat:
  """Returns the file format of `method`. Raises ValueError for a method that has none of its own."""
  form = method.peft or method.peft_reads
  if form is None:
    raise ValueError(f"{method.name} has no file format of its own; it is written as {method.peft_name}")
  return form


def _full_tensors(
  rows: Sequence[AdaptedModule], full: Mapping[str, tuple[int, ...]], naming: Naming | None
) -> dict[str, FileTensor]:
  """The tensors of the parameters that were trained in full; a tied table has two, as table and as head."""
  adapted, file_tensors = {row.path for row in rows}, {}
  for path, shape in full.items():
    name, transposed = parameter_name(naming, path)
    owner, _, leaf = path.rpartition(".")
    if naming is not None and owner in adapted:  # PEFT wraps adapted modules
      name = f"{module_name(naming, owner)}.{BASE}.{leaf}"
    file_tensors[PREFIX + name] = FileTensor(path, "", shape[::-1] if transposed else shape, transposed)
    if naming is not None and naming.tied is not None and path == f"{naming.tied.path}.embedding":
      file_tensors[f"{PREFIX}{naming.tied.head}.weight"] = FileTensor(path, "", shape, False)
  return file_tensors


# Conversion of an adapter to the leaves that a file stores


class PeftTensors(NamedTuple):
  """An adapter converted to a method that has a file format."""

  method: Method  # the method that defines the format
  rows: list[AdaptedModule]  # with the ranks in the file
  leaves: dict[str, dict[str, np.ndarray]]
  leads: dict[str, list[int]]  # leading axes of stacked kernels
  start: bool  # the second half of the ranks holds A₀ and −B₀

  @property
  def leaf_names(self) -> dict[str, list[str]]:
    """The leaves of each module that are stored per module."""
    stored_names = format_of(self.method).keys
    return {path: [name for name in stored_names if name in leaves] for path, leaves in self.leaves.items()}


def convert(adapter: Adapter, rslora: bool) -> PeftTensors:
  """Converts `adapter` to the leaves that PEFT supports, and sets each row's alpha to the value that gives its scale.

  A module without any rank left (AdaLoRA) is omitted.
  """
  kind = adapter.kind
  method = kind if kind.peft is not None else methods.get(kind.peft_name)
  rows: list[AdaptedModule] = []
  leaves: dict[str, dict[str, np.ndarray]] = {}
  leads: dict[str, list[int]] = {}
  for row in adapter.rows:
    arrays = {name: np.asarray(x) for name, x in adapter.leaves[row.path].items()}
    arrays = kind.peft_leaves(arrays, f"{row.path}.bias" in adapter.full)
    rank = row.rank if method.shared_leaves else method.rank_of(arrays)
    if not rank:
      continue
    lead = method.lead_of(arrays)
    if lead:
      leads[row.path] = list(lead)
    alpha = row.alpha
    if rank != row.rank or not _yields_scale(row.alpha, rank, rslora, row.scale):
      alpha = row.scale * (math.sqrt(rank) if rslora else rank)
    rows.append(replace(row, rank=rank, alpha=alpha))
    leaves[row.path] = arrays
  return PeftTensors(method, rows, leaves, leads, kind.init_of is not None and bool(adapter.rows))


def _yields_scale(alpha: float, rank: int, rslora: bool, scale: float) -> bool:
  """Whether alpha and rank result in `scale`."""
  return math.isclose(alpha / (math.sqrt(rank) if rslora else rank), scale, rel_tol=1e-6)


def arrays(adapter: Adapter, converted: PeftTensors, file_tensors: Mapping[str, FileTensor]) -> dict[str, np.ndarray]:
  """Returns the arrays of `file_tensors` in the layout of the file, as float32 or wider."""
  shared = _shared_arrays(converted)
  tensors = {}
  for name, file_tensor in file_tensors.items():
    if not file_tensor.leaf:
      x = np.asarray(adapter.full[file_tensor.path])
    else:
      leaves = converted.leaves[file_tensor.path] if file_tensor.path else shared
      x = np.asarray(leaves[file_tensor.leaf])
    tensors[name] = file_tensor.to_file(x.astype(np.promote_types(x.dtype, np.float32)))
    if tensors[name].shape != file_tensor.shape:
      raise ValueError(f"{name} is {tensors[name].shape}, but the layout requires {file_tensor.shape}")
  return tensors


def base_arrays(base: BaseChanges, rows: Sequence[AdaptedModule], naming: Naming | None) -> dict[str, np.ndarray]:
  """Returns the changed parameters of the base and the rows of single tokens, by name in the file."""
  adapted, tensors = {row.path for row in rows}, {}
  for path, value in base.parameters.items():
    name, transposed = parameter_name(naming, path)
    owner, _, leaf = name.rpartition(".")
    part = f"{BASE}." if naming is not None and path.rpartition(".")[0] in adapted else ""
    x = np.asarray(value, np.float32)
    tensors[f"{PREFIX}{owner}.{part}{leaf}"] = np.ascontiguousarray(x.T if transposed else x)
  for path, (_, rows_TD) in base.token_rows.items():
    tensors[f"{PREFIX}{module_name(naming, path)}.{TOKEN_ROWS}"] = np.ascontiguousarray(rows_TD, np.float32)
  for row in rows if base.biases else ():
    if naming is None or row.path not in naming.tables:
      bias = np.asarray(base.biases.get(row.path, np.zeros(row.fan_out)), np.float32) / np.float32(row.scale)
      tensors[f"{PREFIX}{module_name(naming, row.path)}.{OUTPUT_BIAS}"] = bias
  return tensors


def _shared_arrays(converted: PeftTensors) -> dict[str, np.ndarray]:
  """The shared leaves, assembled from the parts that the modules hold."""
  if not converted.rows:
    return {}
  largest, shared = largest_sizes(converted.rows), {}
  for name in converted.method.shared_leaves:
    axes = converted.method.leaves[name].axes
    x = np.zeros([largest[axis] for axis in axes], converted.leaves[converted.rows[0].path][name].dtype)
    for row in converted.rows:
      x[tuple(slice(row.sizes()[axis]) for axis in axes)] = converted.leaves[row.path][name]
    shared[name] = x
  return shared


def unsupported_reason(adapter: Adapter, converted: PeftTensors, naming: Naming | None) -> str | None:
  """Returns the reason why PEFT cannot compute the same as this adapter, or None if it can."""
  if naming is None:
    return "PEFT does not support this kind of model"
  if not converted.rows:
    return "no module is adapted, which PEFT does not allow"
  stacked = [path for path in converted.leads if path not in expert_modules(naming, converted.leads)]
  if stacked:
    return f"{stacked[0]} is a stack of kernels, which PEFT does not adapt"
  if converted.leads and not format_of(converted.method).adapts_experts:
    return f"PEFT's {converted.method.title} does not adapt experts"
  form, title = format_of(converted.method), converted.method.title
  tables = [row.path for row in converted.rows if row.path in naming.tables]
  if tables and form.table_keys is None:
    return f"{tables[0]} is an embedding, which PEFT's {title} does not adapt"
  if converted.method.one_rank and len({row.rank for row in converted.rows}) > 1:
    return f"PEFT's {title} has one rank for all modules"
  if not form.adapts_tied_head and naming.tied is not None and naming.tied.path in tables:
    return f"{naming.tied.path} is tied to the head, which PEFT's {title} cannot adapt with it"
  if naming.conv1d and not form.adapts_conv1d:
    return f"PEFT's {title} does not adapt GPT-2's Conv1D layers"
  if form.bias_word is None and trained_modules(adapter.full)[1]:
    return f"PEFT's {title} trains no biases"
  return converted.method.peft_reason(tuple(converted.rows), converted.leaves)
