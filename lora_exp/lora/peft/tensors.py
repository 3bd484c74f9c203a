"""How PEFT calls an adapter's arrays, and the config that makes PEFT compute what we do (checked with PEFT 0.21.2).

PEFT stores lora_A (rank, in) and lora_B (out, rank), for GPT-2's Conv1D too; of a table lora_embedding_A and _B; VeRA's
random pair once. What PEFT has no name for is written as plain LoRA: PiSSA and OLoRA as [A, A₀] and [B; −B₀] at twice
the rank, AdaLoRA with its e folded into A and without the columns whose e is 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.methods import Method
from lora_exp.lora.peft.names import PREFIX, Naming, module_name, parameter_name, trained_modules
from lora_exp.lora.peft_format import PeftFormat


class Place(NamedTuple):
  """What one tensor of a file holds: `leaf` of the module at `path`, or (without a leaf) the parameter `path`."""

  path: str
  leaf: str
  shape: tuple[int, ...]  # in the file
  turned: bool  # its last two axes are swapped there
  vector: bool = False  # a vector that the file holds as a matrix of one row or column

  def stored(self, x: np.ndarray) -> np.ndarray:
    """An array of ours as the file holds it."""
    x = np.swapaxes(x, -1, -2) if self.turned else x
    return np.ascontiguousarray(x.reshape(self.shape) if self.vector else x)

  def loaded(self, x: np.ndarray) -> np.ndarray:
    """The inverse of `stored`."""
    x = x.reshape(-1) if self.vector else x
    return np.ascontiguousarray(np.swapaxes(x, -1, -2)) if self.turned else x


def layout(
  method: Method,
  rows: Sequence[AdaptedModule],
  leaf_names: Mapping[str, Sequence[str]],
  full: Mapping[str, tuple[int, ...]],
  naming: Naming | None,
  leads: Mapping[str, Sequence[int]],
) -> dict[str, Place]:
  """Every tensor of an adapter's file, by its name there.

  `leaf_names` are the leaves of each module, `full` the parameters trained in full with their shapes, `leads` the
  leading axes of stacked kernels.
  """
  form = format_of(method)
  places = {}
  for row in rows:
    is_table = naming is not None and row.path in naming.tables
    ends = form.table_keys if is_table and form.table_keys else form.keys
    for leaf in leaf_names[row.path]:
      name = f"{PREFIX}{module_name(naming, row.path)}.{ends[leaf]}"
      places[name] = _leaf_place(method, leaf, row.path, row.sizes(), leads.get(row.path, ()), naming is not None)
    if form.adapts_tied_head and naming is not None and naming.tied is not None and row.path == naming.tied[0]:
      head = PREFIX + naming.tied[1]  # its A and B are the table's B and A
      places[f"{head}.lora_A.weight"] = Place(row.path, "lora_b", (row.rank, row.fan_out), False)
      places[f"{head}.lora_B.weight"] = Place(row.path, "lora_a", (row.fan_in, row.rank), False)
  if rows:
    for leaf, name in form.shared_keys.items():
      places[name] = _leaf_place(method, leaf, "", largest_sizes(rows), (), naming is not None)
  return places | _full(rows, full, naming)


def _leaf_place(
  method: Method, leaf: str, path: str, sizes: Mapping[str, int], lead: Sequence[int], peft: bool
) -> Place:
  axes = method.leaves[leaf].axes
  shape = [sizes[axis] for axis in axes]
  column = format_of(method).column_axes.get(leaf) if peft else None
  if column is not None:
    return Place(path, leaf, (shape[0], 1) if column == 0 else (1, shape[0]), False, True)
  turned = len(axes) == 2
  return Place(path, leaf, (*lead, *(shape[::-1] if turned else shape)), turned)


def largest_sizes(rows: Sequence[AdaptedModule]) -> dict[str, int]:
  """I, O and R of the leaves that all modules share."""
  return {axis: max(row.sizes()[axis] for row in rows) for axis in "IOR"}


def format_of(method: Method) -> PeftFormat:
  """How PEFT stores the method. Raises ValueError for one that is written as another method's files."""
  if method.peft is None:
    raise ValueError(f"{method.name} has no files of its own: they are those of {method.peft_name}")
  return method.peft


def _full(
  rows: Sequence[AdaptedModule], full: Mapping[str, tuple[int, ...]], naming: Naming | None
) -> dict[str, Place]:
  adapted, places = {row.path for row in rows}, {}
  for path, shape in full.items():
    name, turned = parameter_name(naming, path)
    owner, _, leaf = path.rpartition(".")
    if naming is not None and owner in adapted:  # what PEFT adapts it wraps
      name = f"{module_name(naming, owner)}.base_layer.{leaf}"
    places[PREFIX + name] = Place(path, "", shape[::-1] if turned else shape, turned)
    if naming is not None and naming.tied is not None and path == f"{naming.tied[0]}.embedding":
      places[f"{PREFIX}{naming.tied[1]}.weight"] = Place(path, "", shape, False)
  return places


# What is written


class PeftTensors(NamedTuple):
  """An adapter as a file holds it."""

  method: Method  # whose format the file has
  rows: list[AdaptedModule]  # at the ranks of the file
  leaves: dict[str, dict[str, np.ndarray]]
  leads: dict[str, list[int]]
  start: bool  # every module's second half is what it started from

  @property
  def leaf_names(self) -> dict[str, list[str]]:
    """The leaves of each module that have a tensor of their own."""
    return {path: [name for name in format_of(self.method).keys if name in x] for path, x in self.leaves.items()}


def written(adapter: Adapter, rslora: bool) -> PeftTensors:
  """`adapter` in the leaves that PEFT knows, each row with the alpha that gives its scale."""
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
    if lead := method.lead_of(arrays):
      leads[row.path] = list(lead)
    alpha = row.alpha
    if rank != row.rank or not _gives(row.alpha, rank, rslora, row.scale):
      alpha = row.scale * (math.sqrt(rank) if rslora else rank)
    rows.append(replace(row, rank=rank, alpha=alpha))
    leaves[row.path] = arrays
  return PeftTensors(method, rows, leaves, leads, kind.init_of is not None and bool(adapter.rows))


def _gives(alpha: float, rank: int, rslora: bool, scale: float) -> bool:
  return math.isclose(alpha / (math.sqrt(rank) if rslora else rank), scale, rel_tol=1e-6)


def arrays(adapter: Adapter, made: PeftTensors, places: Mapping[str, Place]) -> dict[str, np.ndarray]:
  """The tensors of `places`, in float32 at least."""
  shared = _shared_arrays(made)
  tensors = {}
  for name, place in places.items():
    if not place.leaf:
      x = np.asarray(adapter.full[place.path])
    else:
      x = np.asarray(made.leaves[place.path][place.leaf] if place.path else shared[place.leaf])
    tensors[name] = place.stored(x.astype(np.promote_types(x.dtype, np.float32)))
    if tensors[name].shape != place.shape:
      raise ValueError(f"{name} is {tensors[name].shape}, and the table says {place.shape}")
  return tensors


def _shared_arrays(made: PeftTensors) -> dict[str, np.ndarray]:
  """The leaves that all modules share, put together from the parts that each module has."""
  if not made.rows:
    return {}
  largest, shared = largest_sizes(made.rows), {}
  for name in made.method.shared_leaves:
    axes = made.method.leaves[name].axes
    x = np.zeros([largest[axis] for axis in axes], made.leaves[made.rows[0].path][name].dtype)
    for row in made.rows:
      x[tuple(slice(row.sizes()[axis]) for axis in axes)] = made.leaves[row.path][name]
    shared[name] = x
  return shared


def reason(adapter: Adapter, made: PeftTensors, naming: Naming | None) -> str | None:
  """Why PEFT cannot compute what this adapter does, or None if it can."""
  if naming is None:
    return "PEFT does not know this kind of model"
  if not made.rows:
    return "no module is adapted, which PEFT refuses"
  if made.leads:
    return f"{next(iter(made.leads))} is a stack of kernels, which PEFT does not adapt"
  form, title = format_of(made.method), made.method.title
  tables = [row.path for row in made.rows if row.path in naming.tables]
  if tables and form.table_keys is None:
    return f"{tables[0]} is a table of embeddings, which PEFT's {title} does not adapt"
  if made.method.one_rank and len({row.rank for row in made.rows}) > 1:
    return f"PEFT's {title} has one rank for all modules"
  if not form.adapts_tied_head and naming.tied is not None and naming.tied[0] in tables:
    return f"{naming.tied[0]} is the head as well, whose features PEFT's {title} cannot scale"
  if naming.conv1d and not form.adapts_conv1d:
    return f"PEFT's {title} does not adapt GPT-2's Conv1D layers"
  if form.bias_word is None and trained_modules(adapter.full)[1]:
    return f"PEFT's {title} trains no biases"
  return made.method.peft_reason(tuple(made.rows), made.leaves)
