"""Whether an adapter's file fits a model: which tensors its config promises, and which of them are there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_exp.config import did_you_mean
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods import Method
from lora_exp.lora.peft.adapter_config import PeftConfig, shortened
from lora_exp.lora.peft.names import PREFIX, Naming, module_name
from lora_exp.lora.peft.tensors import Place, layout
from lora_exp.runtime.safetensors_reader import DTYPES, TensorEntry

GUESSES = 3  # tensors for which the nearest name is sought, as that is slow


@dataclass
class AdapterFileCheck:
  """A config held against a model; what does not fit goes into `problems`."""

  config: PeftConfig
  where: str  # the file of the tensors
  naming: Naming | None
  shapes: Mapping[str, tuple[int, int]]
  full_shapes: Mapping[str, tuple[int, ...]]
  problems: list[str] = field(default_factory=list)

  def __post_init__(self):
    self.method = self.config.method
    self.names = {path: module_name(self.naming, path) for path in self.shapes}
    self.leads = self._leads()
    self.ties = self._ties()
    self.rows = [self._row(path) for path in self._adapted()]
    self.full = self._full()
    self.leaf_names = {
      row.path: self.method.peft_leaf_names(self.names[row.path], self.config.values) for row in self.rows
    }
    self.places = layout(self.method, self.rows, self.leaf_names, self.full, self.naming, self.leads)
    self._method_problems()

  def compare(self, found: Mapping[str, TensorEntry]) -> None:
    """Notes every tensor that is missing, not known, or of another shape or dtype."""
    base = self._base()
    for name, place in self.places.items():
      if name not in found:
        self._tensor(name, "is missing")
      elif found[name].shape != place.shape:
        self._tensor(name, f"is {found[name].shape}, expected {place.shape}{self._rank_hint(place)}")
    lost = [name for name in self.places if name not in found]
    guesses = GUESSES
    for name in found.keys() - self.places.keys():
      if name not in base:
        near = did_you_mean(name, lost or self.places) if guesses > 0 and len(name) < 1000 else ""
        self._tensor(name, f"is no part of the adapter that {self.config.where} describes for this model{near}")
        guesses -= 1
      elif found[name].shape != base[name]:
        self._tensor(name, f"is {found[name].shape}, and the model's is {base[name]}: the vocabulary was resized")
    for name, tensor in found.items():
      if tensor.dtype not in DTYPES:
        self._tensor(name, f"is of dtype {shortened(tensor.dtype)}; adapters are {', '.join(DTYPES)}")

  def _tensor(self, name: str, text: str) -> None:
    self.problems.append(f"{self.where}: {shortened(name, 200)} {text}")

  def _rank_hint(self, place: Place) -> str:
    rank = place.leaf and self.config.rank_of(self.names.get(place.path, ""))
    return f" (r is {rank} in {self.config.where})" if rank else ""

  def _adapted(self) -> list[str]:
    config = self.config
    found = [path for path, name in self.names.items() if config.adapts(name) or self.ties and path == self._table()]
    if not found and (config.foreign or config.targets):
      wanted = config.values["target_modules"]
      words = wanted.split("|") if isinstance(wanted, str) else sorted(wanted)
      near = did_you_mean(words[0][:100], self._ends()) if words else ""
      kind = f"{self.naming.model_type} " if self.naming is not None and self.naming.model_type else ""
      self.config_problem(f"target_modules={shortened(', '.join(words))} names no module of this {kind}model{near}; "
                          "is the adapter of another family?")
    return found

  def _ends(self) -> list[str]:
    parts = [name.split(".") for name in self.names.values()]
    return list({".".join(p[i:]) for p in parts for i in range(len(p))})

  def config_problem(self, text: str) -> None:
    """Notes what is wrong with the config."""
    self.problems.append(f"{self.config.where}: {text}")

  def _tied(self) -> tuple[str, str, str] | None:
    """Our path of the table that is the head as well, and PEFT's names of both."""
    if self.naming is None or self.naming.tied is None:
      return None
    path, head = self.naming.tied
    return path, module_name(self.naming, path), head

  def _table(self) -> str | None:
    tied = self._tied()
    return tied and tied[0]

  def _ties(self) -> bool:
    """Whether the table is adapted, which then must hold for both of its uses."""
    config, tied = self.config, self._tied()
    if tied is None or not (config.adapts(tied[1]) or config.adapts(tied[2])):
      return False
    _, table, head = tied
    if not (config.tying or config.adapts(table) and config.adapts(head)):
      self.config_problem(f"{table} and {head} are one table here, and only one of them is adapted; train the adapter "
                          "with ensure_weight_tying=True")
    elif not config.form.adapts_tied_head:
      title = config.method.title
      self.config_problem(f"{head} is the table {table} here, whose features {title} scales; leave it out for {title}")
    elif (config.rank_of(table), config.alpha_of(table)) != (config.rank_of(head), config.alpha_of(head)):
      self.config_problem(f"{table} and {head} are one table here, and have another rank or alpha")
    return True

  def _row(self, path: str) -> AdaptedModule:
    """The row as the file has it: at twice the rank where it holds the start, too."""
    rank = self.config.rank_of(self.names[path])
    if self.config.start and rank % 2:
      self.config_problem(f"{path} has the odd rank {rank}, and half of it should be what it started from")
    alpha = self.config.alpha_of(self.names[path])
    fan_in, fan_out = self.shapes[path]
    has_bias = f"{path}.bias" in self.full_shapes
    row = AdaptedModule(path, fan_in, fan_out, rank, alpha, self.config.scale(alpha, rank), has_bias=has_bias)
    count = trained_size(self.method, row, self.method.peft_leaf_names(self.names[path], self.config.values))
    return replace(row, parameters=math.prod(self.leads.get(path, ())) * count)

  def _method_problems(self) -> None:
    """What PEFT's method does to these modules that ours does not."""
    leaves = {path: dict.fromkeys(names) for path, names in self.leaf_names.items()}
    why = self.method.peft_reason(tuple(self.rows), leaves) if self.config.foreign else None
    if why is not None:
      self.config_problem(f"{why}, which is not possible here")

  def _full(self) -> dict[str, tuple[int, ...]]:
    """The parameters that the file should hold whole."""
    config, found = self.config, {}
    adapted, saved = {row.path for row in self.rows}, set()
    for path, shape in self.full_shapes.items():
      owner, _, leaf = path.rpartition(".")
      whole = self._whole(owner)
      saved |= {owner} if whole else set()
      if whole or leaf == "bias" and (config.bias == "all" or config.bias != "none" and owner in adapted):
        found[path] = shape
    names = {module_name(self.naming, path) for path in saved}
    names |= {tied[2]} if (tied := self._tied()) is not None and tied[0] in saved else set()
    for module in config.modules_to_save:
      if not any(config.saved_by(module, name) for name in names):
        self.config_problem(f"modules_to_save={shortened(module)} names no module of this model"
                            f"{did_you_mean(module[:100], self._ends())}")
    if config.bias != "none" and not any(path.endswith(".bias") for path in found):
      self.config_problem(f"bias={config.bias}, and this model has no such bias")
    return found

  def _whole(self, owner: str) -> bool:
    tied = self._tied()
    if tied is None or owner != tied[0]:
      return self.config.saves(module_name(self.naming, owner))
    table, head = self.config.saves(tied[1]), self.config.saves(tied[2])
    if table != head and not self.config.tying:
      self.config_problem(f"modules_to_save has one of {tied[1]} and {tied[2]}, which are one table here; name both, "
                          "with ensure_weight_tying=True")
    return table or head

  def _base(self) -> dict[str, tuple[int, ...]]:
    """The base's own tables that PEFT stores beside their adapters, which are frozen there: not read."""
    if self.naming is None:
      return {}
    found: dict[str, tuple[int, ...]] = {}
    for row in self.rows:
      name = f"{PREFIX}{self.names[row.path]}.base_layer.weight"
      if row.path in self.naming.tables:
        found[name] = (row.fan_in, row.fan_out)
      elif row.path in self.naming.bare:
        found[name] = (row.fan_out, row.fan_in)
    if self.ties and (tied := self._tied()) is not None and tied[0] in self.shapes:
      found[f"{PREFIX}{tied[2]}.base_layer.weight"] = self.shapes[tied[0]]
    return found

  def _leads(self) -> dict[str, Sequence[int]]:
    leads = self.config.own.get("leads", {})
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x < 10**6
    if not isinstance(leads, dict) or not all(isinstance(x, list) and all(map(whole, x)) for x in leads.values()):
      self.config_problem("lora_exp.leads must be the leading axes of modules")
      return {}
    return {} if self.config.foreign else leads


def trained_size(method: Method, row: AdaptedModule, leaf_names: Sequence[str]) -> int:
  """Trained parameters of one kernel; shared leaves are constants."""
  return method.trained_size(leaf_names, row)
