"""Comparison of an adapter file with a model: the tensors that the config requires, and those that the file has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_exp.config import did_you_mean
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods import Method
from lora_exp.lora.peft.adapter_config import PeftConfig, shortened
from lora_exp.lora.peft.names import PREFIX, Naming, module_name
from lora_exp.lora.peft.tensors import FileTensor, layout
from lora_exp.runtime.safetensors_reader import DTYPES, TensorEntry

GUESSES = 3  # largest number of unknown tensors for which the nearest name is searched, as the search is slow


@dataclass
class AdapterFileCheck:
  """Compares an adapter's config with a model. Everything that does not fit is added to `problems`."""

  config: PeftConfig
  where: str  # path of the file of tensors, for messages
  naming: Naming | None
  shapes: Mapping[str, tuple[int, int]]
  full_shapes: Mapping[str, tuple[int, ...]]
  problems: list[str] = field(default_factory=list)

  def __post_init__(self):
    self.method = self.config.method
    self.names = {path: module_name(self.naming, path) for path in self.shapes}
    self.leads = self._leads()
    self.adapts_tied_table = self._adapts_tied_table()
    self.rows = [self._row(path) for path in self._adapted()]
    self.full = self._full()
    self.leaf_names = {
      row.path: self.method.peft_leaf_names(self.names[row.path], self.config.values) for row in self.rows
    }
    self.file_tensors = layout(self.method, self.rows, self.leaf_names, self.full, self.naming, self.leads)
    self._method_problems()

  def compare(self, tensors: Mapping[str, TensorEntry]) -> None:
    """Adds a problem for every tensor that is missing, is unknown, or has the wrong shape or dtype."""
    base = self._base_tensors()
    for name, file_tensor in self.file_tensors.items():
      if name not in tensors:
        self._tensor_problem(name, "is missing")
      elif tensors[name].shape != file_tensor.shape:
        hint = self._rank_hint(file_tensor)
        self._tensor_problem(name, f"is {tensors[name].shape}, expected {file_tensor.shape}{hint}")
    missing = [name for name in self.file_tensors if name not in tensors]
    guesses = GUESSES
    for name in tensors.keys() - self.file_tensors.keys():
      if name not in base:
        near = did_you_mean(name, missing or self.file_tensors) if guesses > 0 and len(name) < 1000 else ""
        self._tensor_problem(name, f"is not part of the adapter that {self.config.where} describes{near}")
        guesses -= 1
      elif tensors[name].shape != base[name]:
        text = f"is {tensors[name].shape}, and the model's is {base[name]}: the vocabulary was resized"
        self._tensor_problem(name, text)
    for name, tensor in tensors.items():
      if tensor.dtype not in DTYPES:
        self._tensor_problem(name, f"has dtype {shortened(tensor.dtype)}; supported are {', '.join(DTYPES)}")

  def _tensor_problem(self, name: str, text: str) -> None:
    """Adds a problem with a tensor."""
    self.problems.append(f"{self.where}: {shortened(name, 200)} {text}")

  def _rank_hint(self, file_tensor: FileTensor) -> str:
    """The rank in the config, for the message of a wrong shape."""
    if not file_tensor.leaf:
      return ""
    rank = self.config.rank_of(self.names.get(file_tensor.path, ""))
    return f" (r is {rank} in {self.config.where})"

  def _adapted(self) -> list[str]:
    """The paths of the modules that the config adapts."""
    config = self.config
    tied_table = self._table() if self.adapts_tied_table else None
    adapted = [path for path, name in self.names.items() if config.adapts(name) or path == tied_table]
    if not adapted and (config.peft_names or config.targets):
      target_modules = config.values["target_modules"]
      targets = target_modules.split("|") if isinstance(target_modules, str) else sorted(target_modules)
      near = did_you_mean(targets[0][:100], self._name_suffixes()) if targets else ""
      kind = f"{self.naming.model_type} " if self.naming is not None and self.naming.model_type else ""
      self.config_problem(f"target_modules={shortened(', '.join(targets))} names no module of this {kind}model{near}; "
                          "is the adapter of another family?")
    return adapted

  def _name_suffixes(self) -> list[str]:
    """All suffixes of PEFT's module names, cut between segments."""
    parts = [name.split(".") for name in self.names.values()]
    return list({".".join(p[i:]) for p in parts for i in range(len(p))})

  def config_problem(self, text: str) -> None:
    """Adds a problem with the config."""
    self.problems.append(f"{self.config.where}: {text}")

  def _tied(self) -> tuple[str, str, str] | None:
    """Of tied embeddings: our path of the table, PEFT's name of the table, and PEFT's name of the head."""
    if self.naming is None or self.naming.tied is None:
      return None
    path, head = self.naming.tied
    return path, module_name(self.naming, path), head

  def _table(self) -> str | None:
    """Our path of a tied table."""
    tied = self._tied()
    return None if tied is None else tied[0]

  def _adapts_tied_table(self) -> bool:
    """Whether the config adapts a tied table. It must then adapt table and head alike."""
    config, tied = self.config, self._tied()
    if tied is None or not (config.adapts(tied[1]) or config.adapts(tied[2])):
      return False
    _, table, head = tied
    if not (config.tying or config.adapts(table) and config.adapts(head)):
      self.config_problem(f"{table} and {head} are tied in this model, and only one of them is adapted; train the "
                          "adapter with ensure_weight_tying=True")
    elif not config.form.adapts_tied_head:
      title = config.method.title
      self.config_problem(f"{head} is tied to {table} in this model, which {title} does not support; remove it from "
                          "target_modules")
    elif (config.rank_of(table), config.alpha_of(table)) != (config.rank_of(head), config.alpha_of(head)):
      self.config_problem(f"{table} and {head} are tied in this model, but differ in rank or alpha")
    return True

  def _row(self, path: str) -> AdaptedModule:
    """The row with the rank in the file, which is doubled if the file also holds A₀ and B₀."""
    rank = self.config.rank_of(self.names[path])
    if self.config.start and rank % 2:
      self.config_problem(f"{path} has the odd rank {rank}, but half of the ranks must be A₀ and B₀")
    alpha = self.config.alpha_of(self.names[path])
    fan_in, fan_out = self.shapes[path]
    has_bias = f"{path}.bias" in self.full_shapes
    row = AdaptedModule(path, fan_in, fan_out, rank, alpha, self.config.scale(alpha, rank), has_bias=has_bias)
    count = trained_size(self.method, row, self.method.peft_leaf_names(self.names[path], self.config.values))
    return replace(row, parameters=math.prod(self.leads.get(path, ())) * count)

  def _method_problems(self) -> None:
    """Adds a problem if PEFT computes something for these modules that our method does not."""
    leaves = {path: dict.fromkeys(names) for path, names in self.leaf_names.items()}
    reason = self.method.peft_reason(tuple(self.rows), leaves) if self.config.peft_names else None
    if reason is not None:
      self.config_problem(f"{reason}, which is not supported here")

  def _full(self) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that the config trains in full, by path."""
    config, full = self.config, {}
    adapted, saved = {row.path for row in self.rows}, set()
    for path, shape in self.full_shapes.items():
      owner, _, leaf = path.rpartition(".")
      is_saved = self._is_saved(owner)
      if is_saved:
        saved.add(owner)
      if is_saved or leaf == "bias" and (config.bias == "all" or config.bias != "none" and owner in adapted):
        full[path] = shape
    names = {module_name(self.naming, path) for path in saved}
    tied = self._tied()
    if tied is not None and tied[0] in saved:
      names.add(tied[2])
    for module in config.modules_to_save:
      if not any(config.saved_by(module, name) for name in names):
        self.config_problem(f"modules_to_save={shortened(module)} names no module of this model"
                            f"{did_you_mean(module[:100], self._name_suffixes())}")
    if config.bias != "none" and not any(path.endswith(".bias") for path in full):
      self.config_problem(f"bias={config.bias}, but this model has no such bias")
    return full

  def _is_saved(self, owner: str) -> bool:
    """Whether the module at the path `owner` is one of modules_to_save."""
    tied = self._tied()
    if tied is None or owner != tied[0]:
      return self.config.saves(module_name(self.naming, owner))
    table, head = self.config.saves(tied[1]), self.config.saves(tied[2])
    if table != head and not self.config.tying:
      self.config_problem(f"modules_to_save has only one of {tied[1]} and {tied[2]}, which are tied in this model; "
                          "name both, with ensure_weight_tying=True")
    return table or head

  def _base_tensors(self) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's tables, which PEFT also stores if it adapts them. They are frozen and are not read."""
    if self.naming is None:
      return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for row in self.rows:
      name = f"{PREFIX}{self.names[row.path]}.base_layer.weight"
      if row.path in self.naming.tables:
        shapes[name] = (row.fan_in, row.fan_out)
      elif row.path in self.naming.bare:
        shapes[name] = (row.fan_out, row.fan_in)
    tied = self._tied()
    if self.adapts_tied_table and tied is not None and tied[0] in self.shapes:
      shapes[f"{PREFIX}{tied[2]}.base_layer.weight"] = self.shapes[tied[0]]
    return shapes

  def _leads(self) -> dict[str, Sequence[int]]:
    """The leading axes of stacked kernels, by path."""
    leads = self.config.extra.get("leads", {})
    if not isinstance(leads, dict) or not all(_is_shape(value) for value in leads.values()):
      self.config_problem("lora_exp.leads must be a mapping of modules to lists of axis sizes")
      return {}
    return {} if self.config.peft_names else leads


def _is_shape(value: Any) -> bool:
  """Whether `value` is a list of axis sizes."""
  if not isinstance(value, list):
    return False
  return all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 10**6 for size in value)


def trained_size(method: Method, row: AdaptedModule, leaf_names: Sequence[str]) -> int:
  """Returns the number of trained parameters of one kernel."""
  return method.trained_size(leaf_names, row)
