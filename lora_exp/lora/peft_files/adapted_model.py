"""The model that an adapter file needs: the given one, or one with an untied head or a larger vocabulary."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_exp.lora.peft_files.adapter_config import PeftConfig
from lora_exp.lora.peft_files.names import BASE, PREFIX, Naming, module_name
from lora_exp.lora.peft_files.stored_names import PeftNames
from lora_exp.runtime.safetensors_reader import DTYPES, TensorEntry, read_arrays


@dataclass(frozen=True)
class AdapterFile:
  """The header of adapter_model.safetensors."""

  path: Path
  names: PeftNames
  entries: Mapping[str, TensorEntry]  # by the name in current PEFT; without tensors of unknown modules
  raw: Mapping[str, TensorEntry]  # all entries, by the name in the file

  def arrays(self, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads the tensors `names` as float32, or float64 if stored so."""
    stored = {self.names.tensors[name].name: name for name in names}
    entries = {raw: self.entries[name] for raw, name in stored.items()}
    return {stored[raw]: x for raw, x in read_arrays(self.path, entries, stored).items()}

  def differ(self, one: str, other: str, transposed: bool = False) -> bool:
    """Whether two tensors have different values, or one cannot be read."""
    if any(self.entries[name].dtype not in DTYPES for name in (one, other)):
      return True
    arrays = self.arrays((one, other))
    return not np.array_equal(arrays[one].T if transposed else arrays[one], arrays[other])


class TiedNames(NamedTuple):
  """The names of an embedding table that is also the head."""

  path: str  # our path of the table
  table: str  # PEFT's name of the table
  head: str  # PEFT's name of the head


@dataclass(frozen=True)
class AdaptedModel:
  """The names and shapes of a model's modules and parameters."""

  naming: Naming | None
  shapes: Mapping[str, tuple[int, int]]  # (in, out) of every adaptable module, by path
  full_shapes: Mapping[str, tuple[int, ...]]  # of every parameter, by path
  vocab_size: int | None = None  # if it is larger than that of the given model
  untied: bool = False  # whether the head has its own kernel, although the given model ties it to the embeddings

  @property
  def tied(self) -> TiedNames | None:
    """The names of the table and the head, if they are tied."""
    if self.naming is None or self.naming.tied is None:
      return None
    path, head = self.naming.tied
    return TiedNames(path, module_name(self.naming, path), head)

  def paths(self) -> set[str]:
    """The paths of all modules that have parameters, and the head of a tied model."""
    owners = {path.rpartition(".")[0] for path in self.full_shapes}
    return {*self.shapes, *owners, *([self.tied.head] if self.tied else [])}


def fitted(model: AdaptedModel, config: PeftConfig, file: AdapterFile, problems: list[str]) -> AdaptedModel:
  """Returns `model` with an untied head and a larger vocabulary, if the file needs them.

  Adds a problem to `problems` if the vocabularies do not fit.
  """
  return _with_vocabulary(_with_head(model, config, file), file, problems)


def _with_head(model: AdaptedModel, config: PeftConfig, file: AdapterFile) -> AdaptedModel:
  """`model` with an untied head, if the file changes the table and the head differently."""
  tied, naming = model.tied, model.naming
  if tied is None or naming is None or config.tying or tied.path not in model.shapes:
    return model
  path, table, head = tied
  if not _separates(config, file, table, head):
    return model
  vocabulary, features = model.shapes[path]
  shape = features, vocabulary
  return replace(
    model,
    naming=replace(naming, tied=None),
    shapes={**model.shapes, head: shape},
    full_shapes={**model.full_shapes, f"{head}.kernel": shape},
    untied=True,
  )


def _separates(config: PeftConfig, file: AdapterFile, table: str, head: str) -> bool:
  """Whether the file adapts or saves only one of table and head, or both with different values."""
  names = file.names.tensors
  leaves = {tensor.path for name, tensor in names.items() if file.names.is_leaf(name)}
  adapted = [any(module_name(file.names.naming, path) == module for path in leaves) for module in (table, head)]
  if any(adapted):
    scales = {(config.rank_of([module]), config.alpha_of([module])) for module in (table, head)}
    if not all(adapted) or len(scales) > 1 or not config.form.adapts_tied_head:
      return True
    pairs = [
      (f"{PREFIX}{table}.lora_embedding_A", f"{PREFIX}{head}.lora_B.weight"),
      (f"{PREFIX}{table}.lora_embedding_B", f"{PREFIX}{head}.lora_A.weight"),
    ]
    return any(a not in names or b not in names or file.differ(a, b, transposed=True) for a, b in pairs)
  saved = [f"{PREFIX}{module}.weight" in names and config.saves(module) for module in (table, head)]
  if all(saved):
    return file.differ(f"{PREFIX}{table}.weight", f"{PREFIX}{head}.weight")
  return any(saved)


def _with_vocabulary(model: AdaptedModel, file: AdapterFile, problems: list[str]) -> AdaptedModel:
  """`model` with the vocabulary of the file, if that is larger."""
  naming = model.naming
  if naming is None or not naming.tables or naming.tables[0] not in model.shapes:
    return model
  table, head = naming.tables[0], naming.bare[0] if naming.bare else ""
  vocabulary, features = model.shapes[table]
  sizes = _vocabularies(file, module_name(naming, table), head)
  if not sizes or set(sizes.values()) == {vocabulary}:
    return model
  size = max(sizes.values())
  name = next(name for name, rows in sizes.items() if rows == size)
  stored = f"{file.path}: {name} has {size:,} tokens, the model's vocabulary has {vocabulary:,}"
  if len(set(sizes.values())) > 1:
    other = next(name for name, rows in sizes.items() if rows != size)
    problems.append(f"{file.path}: {name} has {size:,} tokens, and {other} has {sizes[other]:,}")
  elif size < vocabulary:
    problems.append(f"{stored}; it was trained on another base")
  else:
    modules = [module_name(naming, table), *([head] if head in model.shapes else [])]
    incomplete = [module for module in modules if not _has_table(file, module)]
    if not incomplete:
      return _resized(model, size, table, head)
    problems.append(f"{stored}, and the file lacks the new rows of {incomplete[0]}; enlarge the base with "
                    "resize_token_embeddings of transformers, and give that as model.weights")
  return model


def _vocabularies(file: AdapterFile, table: str, head: str) -> dict[str, int]:
  """The vocabulary sizes of the tensors of the table and the head, by tensor name."""
  axes = {f"{table}.lora_embedding_A": 1, f"{head}.lora_B.weight": 0}
  axes |= {f"{module}.{suffix}": 0 for module in (table, head) for suffix in ("weight", f"{BASE}.weight")}
  entries = {name: file.entries.get(PREFIX + name) for name in axes}
  return {name: entry.shape[axes[name]] for name, entry in entries.items() if entry and len(entry.shape) == 2}


def _has_table(file: AdapterFile, module: str) -> bool:
  """Whether the file holds the weight of the table or head `module`."""
  return any(f"{PREFIX}{module}.{suffix}" in file.entries for suffix in ("weight", f"{BASE}.weight"))


def _resized(model: AdaptedModel, size: int, table: str, head: str) -> AdaptedModel:
  """`model` with a vocabulary of `size` tokens."""
  features = model.shapes[table][1]
  shapes = {**model.shapes, table: (size, features)}
  full_shapes = {**model.full_shapes, f"{table}.embedding": (size, features)}
  if head in model.shapes:
    shapes[head] = features, size
    full_shapes[f"{head}.kernel"] = features, size
  return replace(model, shapes=shapes, full_shapes=full_shapes, vocab_size=size)
