"""Determines which modules and parameters of a model an adapter file and its config adapt, train or replace.

The adapted modules are those that have tensors in the file; the config must name the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lora_exp.config import did_you_mean
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.peft_files.adapted_model import AdaptedModel, AdapterFile
from lora_exp.lora.peft_files.adapter_config import PeftConfig
from lora_exp.lora.peft_files.config_fields import shortened
from lora_exp.lora.peft_files.experts import ExpertTensors, expert_kernels
from lora_exp.lora.peft_files.names import BASE, OUTPUT_BIAS, PREFIX, TOKEN_ROWS, module_name, parameter_name
from lora_exp.lora.peft_files.tensors import FileTensor, layout
from lora_exp.lora.peft_format import LORA_KEYS


class TokenTable(NamedTuple):
  """New rows of an embedding table, for the tokens of `trainable_token_indices`."""

  path: str  # of the table
  ids: list[int]  # of the tokens
  features: int


@dataclass
class AdapterFileCheck:
  """Compares an adapter's config and file with a model. Everything that does not fit is added to `problems`."""

  config: PeftConfig
  file: AdapterFile
  model: AdaptedModel
  problems: list[str] = field(default_factory=list)
  expert_rows: list[AdaptedModule] = field(default_factory=list)

  def __post_init__(self):
    self.method, self.where = self.config.method, str(self.file.path)
    self.naming = self.model.naming
    self.names = {path: module_name(self.naming, path) for path in self.model.shapes}
    self.stored = self.file.names.modules()
    self.problems += [f"{self.where}: {problem}" for problem in self.file.names.problems]
    self.leads = self._leads()
    self.experts = self._experts()
    self.rows = [self._row(path) for path in self._adapted()]
    self.full = self._full()
    self.leaf_names = {
      row.path: self.method.peft_leaf_names(self.names[row.path], self.config.values) for row in self.rows
    }
    self.file_tensors = layout(self.method, self.rows, self.leaf_names, self.full, self.naming, self.leads)
    self.parameters = self._other_parameters()
    self.token_tables = self._token_tables()
    self.output_biases = self._output_biases()
    self._method_problems()

  def _experts(self) -> ExpertTensors | None:
    """The tensors of experts, and their rows; None for a model without experts."""
    kernels = expert_kernels(self.naming, self.model.full_shapes)
    if self.naming is None or not kernels:
      return None
    experts = ExpertTensors(self.naming, kernels, self.config, self.file.raw).read(self.file.names.unknown)
    self.expert_rows = experts.rows()
    if experts.used and self.method.leaves.keys() != LORA_KEYS.keys():
      experts.problems.append(f"{self.method.title} of experts is not supported")
    for problem in experts.problems:
      self.file_problem(problem)
    return experts

  # Names

  def config_problem(self, text: str) -> None:
    """Adds a problem with the config."""
    self.problems.append(f"{self.config.where}: {text}")

  def file_problem(self, text: str) -> None:
    """Adds a problem with the file of tensors."""
    self.problems.append(f"{self.where}: {text}")

  def names_of(self, path: str) -> list[str]:
    """PEFT's names of the module at `path`: in the model that the adapter was trained on, and in this one."""
    return list(dict.fromkeys([self.stored.get(path, self.names[path]), self.names[path]]))

  # The adapted modules

  def _adapted(self) -> list[str]:
    """The paths of the modules that have tensors. Adds a problem if the config names other modules."""
    config, tied = self.config, self.model.tied
    adapted = [path for path in self.names if path in self.stored]
    if tied is not None and tied.head in self.stored and tied.path not in adapted:
      adapted = [path for path in self.names if path in self.stored or path == tied.path]
    unnamed = [path for path in adapted if not any(self._is_named(path, name) for name in self.names_of(path))]
    if any(pattern.too_slow for _, pattern in config.patterns):
      return adapted  # `tensor_comparison` reports it
    if unnamed and config.names_modules:
      given = shortened(self._target_text())
      first, choices = given.split(", ")[0], self._name_suffixes()
      near = did_you_mean(first, choices) if len(unnamed) == len(adapted) and first not in choices else ""
      layers = config.values.get("layers_to_transform")
      within = "" if layers is None else f" within layers_to_transform={shortened(layers)}"
      self.config_problem(f"target_modules={given}{within} does not name {counted(unnamed, 'module')} whose tensors "
                          f"are in the file, such as {unnamed[0]}{near}")
    is_other = not adapted and bool(self.file.names.unknown)  # the adapter of another model
    absent = [path for path in self.names if path not in adapted and self._is_expected(path)] if not is_other else []
    if absent:
      self.file_problem(f"the tensors of {counted(absent, 'module')} are missing, such as {absent[0]}, which "
                        f"target_modules={shortened(self._target_text())} names")
    return adapted

  def _is_named(self, path: str, name: str) -> bool:
    """Whether the config adapts the module at `path` under the name `name`."""
    tied = self.model.tied
    if tied is not None and path == tied.path:
      return self.config.adapts(name, False) or self.config.adapts(tied.head, False)
    return self.config.adapts(name, self._is_linear(path))

  def _is_linear(self, path: str) -> bool:
    """Whether 'all-linear' includes the module at `path`, which excludes embeddings and the head."""
    return self.naming is None or path not in (*self.naming.tables, *self.naming.bare)

  def _is_expected(self, path: str) -> bool:
    """Whether PEFT adapts the module at `path`, which has no tensors in the file."""
    if not self.config.names_modules or self.experts is not None and path in self.experts.shapes:
      return False
    prefixes = self.file.names.prefixes()
    is_bare = self.naming is None or path in self.naming.bare
    names = [self.names[path]] if is_bare or not prefixes else [prefix + path for prefix in prefixes]
    return any(self._is_named(path, name) for name in names)

  def _target_text(self) -> str:
    """`target_modules` as text."""
    given = self.config.values.get("target_modules")
    return ", ".join(sorted(map(str, given))) if isinstance(given, list) else str(given)

  def _name_suffixes(self) -> list[str]:
    """All suffixes of PEFT's module names, cut between segments."""
    parts = [name.split(".") for name in self.names.values()]
    return list({".".join(p[i:]) for p in parts for i in range(len(p))})

  def _row(self, path: str) -> AdaptedModule:
    """The row with the rank in the file, which is doubled if the file also holds A₀ and B₀."""
    rank = self.config.rank_of(self.names_of(path))
    if self.config.start and rank % 2:
      self.config_problem(f"{path} has the odd rank {rank}, but half of the ranks must be A₀ and B₀")
    alpha = self.config.alpha_of(self.names_of(path))
    fan_in, fan_out = self.model.shapes[path]
    has_bias = f"{path}.bias" in self.model.full_shapes
    row = AdaptedModule(path, fan_in, fan_out, rank, alpha, self.config.scale(alpha, rank), has_bias=has_bias)
    count = self.method.trained_size(self.method.peft_leaf_names(self.names[path], self.config.values), row)
    return replace(row, parameters=math.prod(self.leads.get(path, ())) * count)

  def _method_problems(self) -> None:
    """Adds a problem if PEFT computes something for these modules that our method does not."""
    leaves = {path: dict.fromkeys(names) for path, names in self.leaf_names.items()}
    reason = self.method.peft_reason(tuple(self.rows), leaves) if self.config.peft_names else None
    if reason is not None:
      self.config_problem(f"{reason}, which is not supported here")

  def _leads(self) -> dict[str, Sequence[int]]:
    """The leading axes of stacked kernels, by path."""
    leads = self.config.extra.get("leads", {})
    if not isinstance(leads, dict) or not all(_is_shape(value) for value in leads.values()):
      self.config_problem("lora_exp.leads must be a mapping of modules to lists of axis sizes")
      return {}
    return {} if self.config.peft_names else leads

  def unused_patterns(self) -> dict[str, list[str]]:
    """Returns the keys of rank_pattern and alpha_pattern that match no adapted module, by the name of the field."""
    tied = self.model.tied
    names = {name for row in self.rows for name in self.names_of(row.path)}
    names |= {tied.head} if tied is not None and any(row.path == tied.path for row in self.rows) else set()
    names |= {pair.module for pairs in self.experts.factors.values() for pair in pairs} if self.experts else set()
    fields = {"rank_pattern": self.config.ranks, "alpha_pattern": self.config.alphas}
    unused = {
      field: [shortened(pattern.text) for pattern, _ in patterns if not any(map(pattern.fullmatch, names))]
      for field, patterns in fields.items()
    }
    return {field: keys for field, keys in unused.items() if keys}

  # Parameters of the base

  def _full(self) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that the config trains in full, by path."""
    config, full = self.config, {}
    adapted, saved = {row.path for row in self.rows}, set()
    for path, shape in self.model.full_shapes.items():
      owner, _, leaf = path.rpartition(".")
      is_saved = any(config.saves(name) for name in self._module_names(owner))
      if is_saved:
        saved.add(owner)
      if is_saved or leaf == "bias" and (config.bias == "all" or config.bias != "none" and owner in adapted):
        full[path] = shape
    names = {name for path in saved for name in self._module_names(path)}
    for module in config.modules_to_save:
      if not any(config.saved_by(module, name) for name in names):
        self.config_problem(f"modules_to_save={shortened(module)} names no module of this model"
                            f"{did_you_mean(module[:100], self._name_suffixes())}")
    if config.bias != "none" and not any(path.endswith(".bias") for path in full):
      self.config_problem(f"bias={config.bias}, but this model has no such bias")
    return full

  def _module_names(self, owner: str) -> list[str]:
    """PEFT's names of the module at the path `owner`; a tied table is also the head."""
    tied = self.model.tied
    return [module_name(self.naming, owner), *([tied.head] if tied is not None and owner == tied.path else [])]

  def _other_parameters(self) -> dict[str, FileTensor]:
    """The parameters of the base in the file that are not trained, which PEFT loads too; usually the embeddings."""
    found = {}
    tied = self.model.tied
    for path, shape in self.model.full_shapes.items():
      name, transposed = parameter_name(self.naming, path)
      owner, _, leaf = name.rpartition(".")
      owners = [owner, *([tied.head] if tied is not None and path == f"{tied.path}.embedding" else [])]
      candidates = [f"{PREFIX}{module}.{part}{leaf}" for module in owners for part in ("", f"{BASE}.")]
      for standard in candidates:
        if standard in self.file.entries and standard not in self.file_tensors:
          found[standard] = FileTensor(path, "", shape[::-1] if transposed else shape, transposed)
    return found

  def _token_tables(self) -> dict[str, TokenTable]:
    """The tensors with rows of `trainable_token_indices`, by name.

    PEFT may also store the rows of the table as those of the head that is tied to it.
    """
    found, used = {}, set()
    tensors = {name: tensor for name, tensor in self.file.names.tensors.items() if tensor.suffix == TOKEN_ROWS}
    for standard, tensor in tensors.items():
      if self.model.tied is not None and tensor.path == self.model.tied.head:
        original = f"{PREFIX}{self.model.tied.table}.{TOKEN_ROWS}"
        if original in tensors and not self.file.differ(original, standard):
          tensor = tensors[original]
      if tensor.path not in self.model.shapes:
        continue
      keys = [key for key in self.config.token_rows if not key or f".{tensor.module}".endswith(f".{key}")]
      if keys:
        used.add(keys[0])
        vocabulary, features = self.model.shapes[tensor.path]
        ids = self.config.token_rows[keys[0]]
        if any(i >= vocabulary for i in ids):
          self.config_problem(f"trainable_token_indices has token {max(ids):,}; the model has {vocabulary:,} tokens")
        found[standard] = TokenTable(tensor.path, ids, features)
    if not used.issuperset(self.config.token_rows):
      self.file_problem("the rows of trainable_token_indices are missing")
    changed = [name for name, table in found.items() if any(table.path == row.path for row in self.rows)]
    if changed:
      self.config_problem(f"{changed[0]} and an adapter of the same table: not supported")
    return found

  def _output_biases(self) -> dict[str, AdaptedModule]:
    """The modules with an output bias (`lora_bias`), by the name of its tensor."""
    tables = self.naming.tables if self.naming is not None else ()
    rows = [row for row in self.rows if row.path not in tables] if self.config.output_bias else []
    return {f"{PREFIX}{self.names[row.path]}.{OUTPUT_BIAS}": row for row in rows}


def counted(names: Sequence[str], noun: str) -> str:
  """Returns the number of `names` with its noun: "1 module", "3 modules"."""
  return f"{len(names):,} {noun}{'s' if len(names) > 1 else ''}"


def _is_shape(value: Any) -> bool:
  """Whether `value` is a list of axis sizes."""
  if not isinstance(value, list):
    return False
  return all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 10**6 for size in value)

