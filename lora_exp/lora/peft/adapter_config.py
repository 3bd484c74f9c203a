"""Parsing and validation of adapter_config.json, as untrusted input.

A config is an error if it is invalid, or if we would compute something else than PEFT.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.methods import Method
from lora_exp.lora.peft.tensors import format_of

INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # initializations that do not change the base
READ = {  # fields that are read below, or by a method
  "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
  "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "init_lora_weights",
  "ensure_weight_tying", "save_projection", "fan_in_fan_out", "lora_exp", "peft", "init_weights", "init_ia3_weights",
}  # fmt: skip
HARMLESS = {  # fields that do not affect the computation
  "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
  "projection_prng_key", "d_initial",
}  # fmt: skip
HIGHEST_RANK = 10**6
LONGEST = 10**5  # characters of a pattern
MOST_STEPS = 2**20  # rough limit on the steps that matching a pattern with one name may take


@dataclass
class PeftConfig:
  """A parsed adapter_config.json. Raises InputError that lists every invalid or unsupported value.

  `where` is the path of the file, for messages.
  """

  values: Mapping[str, Any]
  where: str
  problems: list[str] = field(default_factory=list)

  def __post_init__(self):
    self.method = self._method()
    form = self.form = format_of(self.method)
    supported = READ | HARMLESS | form.harmless | {form.alpha_key, form.dropout_key}
    for name, value in self.values.items():
      if name not in supported and value not in (None, False, {}, []):
        self.problem(f"{shortened(name)}={shortened(value)}: not supported, and it may change the computation")
    if self.values.get("init_lora_weights", True) not in INITS:
      self.problem(
        f"init_lora_weights={shortened(self.values['init_lora_weights'])}: PEFT may have changed the base for this "
        "adapter; save it with path_initial_model_for_weight_conversion"
      )
    self.extra = self._typed("lora_exp", dict, {})  # our additions to the config
    self.peft_names = self._typed("peft", bool, True)  # module names and their matching are PEFT's
    self.start = self._flag(self.extra, "start", "lora_exp.")
    self.rslora = self._flag(self.values, "use_rslora")
    for name in form.select:
      self._flag(self.values, name)
    self.tying = self._flag(self.values, "ensure_weight_tying")
    self.bias = self.values.get("bias", "none")
    biases = ("none", "all", form.bias_word) if form.bias_word else ("none",)
    if self.bias not in biases:
      self.problem(f"bias={shortened(self.bias)}: choose {', '.join(biases)}")
    if form.shared_keys and self.values.get("save_projection", True) is not True:
      self.problem(f"save_projection=false: the file lacks {self.method.title}'s random arrays; save it with "
                   "save_projection=True")
    self.rank = self._rank("r", self.values.get("r")) if form.has_ranks else 1
    self.alpha = 1.0 if form.alpha_key is None else self._alpha(form.alpha_key, self.values.get(form.alpha_key))
    self.ranks = self._patterns("rank_pattern", self._rank)
    self.alphas = self._patterns("alpha_pattern", self._alpha)
    if self.method.one_rank and self.peft_names and self.ranks:
      self.problem(f"rank_pattern: PEFT's {self.method.title} has one rank for all modules")
    self.modules_to_save = self._names("modules_to_save")
    self.targets = self._targets("target_modules")
    if self.targets is None:
      self.problem("target_modules is missing; it must list the adapted modules")
    self.exclude = self._targets("exclude_modules")
    self._layers()
    if self.problems:
      raise InputError(self.problems)

  def _method(self) -> Method:
    """The method whose format the config has; LoRA, and a problem, if there is none."""
    peft_type = self.values.get("peft_type")
    formats = {method: method.peft for method in methods.every() if method.peft is not None}
    candidates = [method for method, form in formats.items() if form.peft_type == peft_type]
    if not candidates:
      types = sorted({form.peft_type for form in formats.values()})
      self.problem(f"peft_type={shortened(peft_type)}: not supported; choose {', '.join(types)}")
      return methods.get("lora")
    return next((method for method in candidates if self._selects(method)), candidates[0])

  def _selects(self, method: Method) -> bool:
    """Whether the config has the values that distinguish `method` from others of its peft_type."""
    return all(bool(self.values.get(name)) == value for name, value in format_of(method).select.items())

  def problem(self, text: str) -> None:
    """Adds a problem."""
    self.problems.append(f"{self.where}: {text}")

  def _typed(self, name: str, kind: type, default: Any) -> Any:
    """The field `name`, of type `kind`."""
    value = self.values.get(name, default)
    if not isinstance(value, kind):
      self.problem(f"{name}={shortened(value)}: must be {'true or false' if kind is bool else 'a mapping'}")
      return default
    return value

  def _flag(self, values: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    """The boolean `name` of `values`; false if it is missing. `prefix` is for the message."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
      self.problem(f"{prefix}{name}={shortened(value)}: must be true or false")
    return value is True

  def _rank(self, name: str, value: Any) -> int:
    """A valid rank."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= HIGHEST_RANK:
      self.problem(f"{name}={shortened(value)}: must be an integer from 1 to {HIGHEST_RANK:,}")
      return 1
    return value

  def _alpha(self, name: str, value: Any) -> float:
    """A valid alpha."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:
      self.problem(f"{name}={shortened(value)}: must be a number above 0")
      return 1.0
    return float(value)

  def _patterns(self, name: str, read: Callable[[str, Any], Any]) -> list[tuple[re.Pattern, Any]]:
    """The compiled patterns of `rank_pattern` or `alpha_pattern` and their values, checked by `read`."""
    value_by_key = self.values.get(name)
    value_by_key = {} if value_by_key is None else value_by_key
    if not isinstance(value_by_key, dict):
      self.problem(f"{name}={shortened(value_by_key)}: must be a mapping from module names")
      return []
    patterns = []
    for key, value in value_by_key.items():
      pattern = compiled(rf"(.*\.)?({key})$", key)
      if pattern is None:
        self.problem(f"{name}: {shortened(key)} is not a valid pattern, or is too slow to match; use module names")
      else:
        patterns.append((pattern, read(f"{name}.{shortened(key)}", value)))
    return patterns

  def _names(self, name: str) -> list[str]:
    """The list of module names in the field `name`."""
    names = self.values.get(name)
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(x, str) and x for x in names):
      self.problem(f"{name}={shortened(names)}: must be a list of module names")
      return []
    return names

  def _targets(self, name: str) -> "set[str] | re.Pattern | None":
    """The names or the pattern in the field `name`; None if it is missing."""
    targets = self.values.get(name)
    if targets is None:
      return None
    if not isinstance(targets, str):
      return set(self._names(name))
    pattern = compiled(targets, targets)
    if pattern is None:
      self.problem(f"{name}={shortened(targets)}: not a valid pattern, or too slow to match; list module names")
    return pattern

  def _layers(self) -> None:
    """Sets `layers` and `layers_patterns`."""
    layers, patterns = self.values.get("layers_to_transform"), self.values.get("layers_pattern") or []
    if not isinstance(layers, list):
      layers = [] if layers is None else [layers]
    patterns = patterns if isinstance(patterns, list) else [patterns]
    if any(isinstance(x, bool) or not isinstance(x, int) for x in layers):
      self.problem(f"layers_to_transform={shortened(layers)}: must be a list of integers")
    if not all(isinstance(x, str) and compiled(x, x) for x in patterns):
      self.problem(f"layers_pattern={shortened(patterns)}: must be a list of names")
    self.layers, self.layers_patterns = layers, patterns

  # The meaning of the fields in PEFT

  def rank_of(self, name: str) -> int:
    """Returns the rank of the module with PEFT's name `name`."""
    return next((value for pattern, value in self.ranks if pattern.match(name)), self.rank)

  def alpha_of(self, name: str) -> float:
    """Returns the alpha of the module with PEFT's name `name`."""
    return next((value for pattern, value in self.alphas if pattern.match(name)), self.alpha)

  def scale(self, alpha: float, rank: int) -> float:
    """Returns alpha/rank, or alpha/sqrt(rank) with use_rslora, or 1 for a method without alpha."""
    return 1.0 if self.form.alpha_key is None else alpha / (math.sqrt(rank) if self.rslora else rank)

  def adapts(self, name: str) -> bool:
    """Whether PEFT adapts the module `name`."""
    if not self.peft_names:
      return isinstance(self.targets, set) and name in self.targets
    if self.saves(name) or _is_target(self.exclude, name):
      return False
    return _is_target(self.targets, name) and self._is_in_layers(name)

  def _is_in_layers(self, name: str) -> bool:
    """Whether the module `name` is in one of layers_to_transform."""
    if not self.layers or not isinstance(self.targets, set) or name in self.targets:
      return True
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for pattern in patterns:
      match = re.match(pattern, name)
      if match is not None:
        return int(match[1]) in self.layers
    return False

  def saves(self, name: str) -> bool:
    """Whether the module `name` is in modules_to_save, or in a module that is."""
    return any(self.saved_by(module, name) for module in self.modules_to_save)

  def saved_by(self, module: str, name: str) -> bool:
    """Whether the entry `module` of modules_to_save matches `name` or a parent; PEFT compares the ends of names."""
    if not self.peft_names:
      return name == module
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(module) for i in range(len(parts)))


def _is_target(targets: "set[str] | re.Pattern | None", name: str) -> bool:
  """Whether `targets` match `name` in PEFT: a name as its last segments, a pattern in full."""
  if targets is None:
    return False
  if isinstance(targets, set):
    parts = name.split(".")
    return any(".".join(parts[i:]) in targets for i in range(len(parts)))
  return targets.fullmatch(name) is not None


def compiled(pattern: str, given: str) -> re.Pattern | None:
  """Returns the compiled `pattern`, or None if it is invalid.

  `given` is the part of it that comes from the file, which is untrusted: None is also returned if matching it could
  take very long.
  """
  if len(given) > LONGEST or _steps(given) > MOST_STEPS:
    return None
  try:
    return re.compile(pattern)
  except (re.error, OverflowError, RecursionError):
    return None


_INNERMOST_GROUP = r"\(([^()]*)\)([*+{?]?)"  # (contents, quantifier)


def _steps(pattern: str) -> int:
  """A rough upper bound on the steps to match a name of 64 characters: repeats and alternatives multiply."""
  text = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
  text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)
  text = re.sub(r"\(\?(?::|=|!|<=|<!|P<\w+>)", "(", text)
  steps = 1
  groups = re.findall(_INNERMOST_GROUP, text)
  while groups:
    for inner, quantifier in groups:
      if quantifier in ("*", "+", "{"):
        return MOST_STEPS + 1  # a repeated group
      steps *= (inner.count("|") + 1) * (2 if quantifier else 1) * 64 ** len(re.findall(r"[*+{]", inner))
      if steps > MOST_STEPS:
        return steps
    text = re.sub(r"\([^()]*\)\??", "x", text)
    groups = re.findall(_INNERMOST_GROUP, text)
  repeats = len(re.findall(r"[*+{]", text))
  return MOST_STEPS + 1 if repeats > 3 else steps * 64**repeats * 2 ** min(text.count("?"), 20)


def shortened(value: Any, longest: int = 60) -> str:
  """Returns `value` as text on one line, with at most `longest` characters."""
  if isinstance(value, (list, dict)) and len(value) > 4:
    value = f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
  text = "null" if value is None else str(value)
  if isinstance(value, bool):
    text = text.lower()
  return repr(text if len(text) <= longest else f"{text[: longest - 3]}...")[1:-1]
