"""What an adapter_config.json says, whoever wrote it: read with suspicion, and refused where we compute otherwise."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.methods import Method
from lora_exp.lora.peft.tensors import format_of

STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # inits that leave the base as it is
READ = {
  "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
  "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "init_lora_weights",
  "ensure_weight_tying", "save_projection", "fan_in_fan_out", "lora_exp", "peft", "init_weights", "init_ia3_weights",
}  # fmt: skip
HARMLESS = {  # whatever they say, what is computed from the file's arrays is the same
  "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
  "projection_prng_key", "d_initial",
}  # fmt: skip
HIGHEST_RANK = 10**6
LONGEST = 10**5  # characters of a pattern
SLOWEST = 2**20  # steps that a pattern may take on one name, roughly


@dataclass
class PeftConfig:
  """An adapter_config.json. Raises InputError that lists every value that cannot be, or that we do not support."""

  values: Mapping[str, Any]
  where: str
  problems: list[str] = field(default_factory=list)

  def __post_init__(self):
    self.method = self._method()
    form = self.form = format_of(self.method)
    known = READ | HARMLESS | form.harmless | {form.alpha_key, form.dropout_key}
    for name, value in self.values.items():
      if name not in known and value not in (None, False, {}, []):
        self.problem(f"{shortened(name)}={shortened(value)}: not supported here, and it may change what is computed")
    if self.values.get("init_lora_weights", True) not in STARTS:
      self.problem(
        f"init_lora_weights={shortened(self.values['init_lora_weights'])}: PEFT may have rewritten the base for this "
        "adapter; save it with path_initial_model_for_weight_conversion"
      )
    self.own = self._typed("lora_exp", dict, {})
    self.foreign = self._typed("peft", bool, True)  # PEFT's names and PEFT's way with them
    self.start = self._flag(self.own, "start", "lora_exp.")
    self.rslora = self._flag(self.values, "use_rslora")
    for name in form.select:
      self._flag(self.values, name)
    self.tying = self._flag(self.values, "ensure_weight_tying")
    self.bias = self.values.get("bias", "none")
    biases = ("none", "all", form.bias_word) if form.bias_word else ("none",)
    if self.bias not in biases:
      self.problem(f"bias={shortened(self.bias)}: choose {', '.join(biases)}")
    if form.shared_keys and self.values.get("save_projection", True) is not True:
      self.problem(f"save_projection=false: {self.method.title}'s random arrays are not in the file; save it with "
                   "save_projection=True")
    self.rank = self._rank("r", self.values.get("r")) if form.has_ranks else 1
    self.alpha = 1.0 if form.alpha_key is None else self._alpha(form.alpha_key, self.values.get(form.alpha_key))
    self.ranks = self._patterns("rank_pattern", self._rank)
    self.alphas = self._patterns("alpha_pattern", self._alpha)
    if self.method.one_rank and self.foreign and self.ranks:
      self.problem(f"rank_pattern: PEFT's {self.method.title} has one rank for all modules")
    self.modules_to_save = self._names("modules_to_save")
    self.targets = self._targets("target_modules")
    if self.targets is None:
      self.problem("target_modules is missing; name the modules that are adapted")
    self.exclude = self._targets("exclude_modules")
    self._layers()
    if self.problems:
      raise InputError(self.problems)

  def _method(self) -> Method:
    """The method whose format this is; LoRA, with a problem, where there is none."""
    kind = self.values.get("peft_type")
    formats = {method: method.peft for method in methods.every() if method.peft is not None}
    found = [method for method, form in formats.items() if form.peft_type == kind]
    if not found:
      types = sorted({form.peft_type for form in formats.values()})
      self.problem(f"peft_type={shortened(kind)}: not supported; choose {', '.join(types)}")
      return methods.get("lora")
    chosen = [m for m in found if all(bool(self.values.get(k)) == v for k, v in format_of(m).select.items())]
    return (chosen or found)[0]

  def problem(self, text: str) -> None:
    """Notes what is wrong."""
    self.problems.append(f"{self.where}: {text}")

  def _typed(self, name: str, kind: type, default: Any) -> Any:
    value = self.values.get(name, default)
    if not isinstance(value, kind):
      self.problem(f"{name}={shortened(value)}: must be {'true or false' if kind is bool else 'a mapping'}")
      return default
    return value

  def _flag(self, values: Mapping[str, Any], name: str, above: str = "") -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
      self.problem(f"{above}{name}={shortened(value)}: must be true or false")
    return value is True

  def _rank(self, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= HIGHEST_RANK:
      self.problem(f"{name}={shortened(value)}: must be a whole number from 1 to {HIGHEST_RANK:,}")
      return 1
    return value

  def _alpha(self, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:
      self.problem(f"{name}={shortened(value)}: must be a number above 0")
      return 1.0
    return float(value)

  def _patterns(self, name: str, read: Callable[[str, Any], Any]) -> list[tuple[re.Pattern, Any]]:
    found = self.values.get(name)
    found = {} if found is None else found
    if not isinstance(found, dict):
      self.problem(f"{name}={shortened(found)}: must be a mapping of names of modules")
      return []
    patterns = []
    for key, value in found.items():
      pattern = compiled(rf"(.*\.)?({key})$", key)
      if pattern is None:
        self.problem(f"{name}: {shortened(key)} is no pattern, or one that takes too long; name the modules instead")
      else:
        patterns.append((pattern, read(f"{name}.{shortened(key)}", value)))
    return patterns

  def _names(self, name: str) -> list[str]:
    found = self.values.get(name)
    found = [] if found is None else found
    if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
      self.problem(f"{name}={shortened(found)}: must be a list of names of modules")
      return []
    return found

  def _targets(self, name: str) -> "set[str] | re.Pattern | None":
    found = self.values.get(name)
    if found is None:
      return None
    if not isinstance(found, str):
      return set(self._names(name))
    pattern = compiled(found, found)
    if pattern is None:
      self.problem(f"{name}={shortened(found)}: is no pattern, or one that takes too long; list the modules instead")
    return pattern

  def _layers(self) -> None:
    found, patterns = self.values.get("layers_to_transform"), self.values.get("layers_pattern") or []
    found = [] if found is None else found if isinstance(found, list) else [found]
    patterns = patterns if isinstance(patterns, list) else [patterns]
    if any(isinstance(x, bool) or not isinstance(x, int) for x in found):
      self.problem(f"layers_to_transform={shortened(found)}: must be a list of whole numbers")
    if not all(isinstance(x, str) and compiled(x, x) for x in patterns):
      self.problem(f"layers_pattern={shortened(patterns)}: must be a list of names")
    self.layers, self.layers_patterns = found, patterns

  # What PEFT makes of it

  def rank_of(self, name: str) -> int:
    """The rank of the module that PEFT calls `name`."""
    return next((value for pattern, value in self.ranks if pattern.match(name)), self.rank)

  def alpha_of(self, name: str) -> float:
    """Its alpha."""
    return next((value for pattern, value in self.alphas if pattern.match(name)), self.alpha)

  def scale(self, alpha: float, rank: int) -> float:
    """alpha/rank, or alpha/sqrt(rank) for rsLoRA; 1 for a method without alpha."""
    return 1.0 if self.form.alpha_key is None else alpha / (math.sqrt(rank) if self.rslora else rank)

  def adapts(self, name: str) -> bool:
    """Whether PEFT would adapt the module `name` of a model that has it."""
    if self.foreign:
      return not self.saves(name) and not _hits(self.exclude, name) and _hits(self.targets, name) and self._layer(name)
    return isinstance(self.targets, set) and name in self.targets

  def _layer(self, name: str) -> bool:
    if not self.layers or not isinstance(self.targets, set) or name in self.targets:
      return True
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
    return found is not None and int(found[1]) in self.layers

  def saves(self, name: str) -> bool:
    """Whether `name` is a module that is trained whole, or lies in one."""
    return any(self.saved_by(module, name) for module in self.modules_to_save)

  def saved_by(self, module: str, name: str) -> bool:
    """Whether the entry `module` of modules_to_save is for `name`: PEFT takes it for the end of a name."""
    if not self.foreign:
      return name == module
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(module) for i in range(len(parts)))


def _hits(targets: "set[str] | re.Pattern | None", name: str) -> bool:
  if targets is None:
    return False
  if isinstance(targets, set):
    parts = name.split(".")
    return any(".".join(parts[i:]) in targets for i in range(len(parts)))
  return targets.fullmatch(name) is not None


def compiled(pattern: str, given: str) -> re.Pattern | None:
  """`pattern` if it is one, and `given` in it is not one that could take for ever: the file is not ours to trust."""
  if len(given) > LONGEST or _steps(given) > SLOWEST:
    return None
  try:
    return re.compile(pattern)
  except (re.error, OverflowError, RecursionError):
    return None


def _steps(pattern: str) -> int:
  """An upper bound, roughly, of the ways in which a name of 64 characters is tried: repeats and choices multiply."""
  text = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
  text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)
  text = re.sub(r"\(\?(?::|=|!|<=|<!|P<\w+>)", "(", text)
  steps = 1
  while found := re.findall(r"\(([^()]*)\)([*+{?]?)", text):
    for inner, after in found:
      if after in ("*", "+", "{"):
        return SLOWEST + 1  # a repeat of a group
      steps *= (inner.count("|") + 1) * (2 if after else 1) * 64 ** len(re.findall(r"[*+{]", inner))
      if steps > SLOWEST:
        return steps
    text = re.sub(r"\([^()]*\)\??", "x", text)
  repeats = len(re.findall(r"[*+{]", text))
  return SLOWEST + 1 if repeats > 3 else steps * 64**repeats * 2 ** min(text.count("?"), 20)


def shortened(value: Any, longest: int = 60) -> str:
  """`value` on one line of at most `longest` characters."""
  if isinstance(value, (list, dict)):
    value = f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}" if len(value) > 4 else value
  text = "null" if value is None else str(value) if not isinstance(value, bool) else str(value).lower()
  return repr(text if len(text) <= longest else f"{text[: longest - 3]}...")[1:-1]
