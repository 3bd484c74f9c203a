"""Parsing and validation of adapter_config.json, as untrusted input.

A config is an error if it is invalid, or if this program would not compute the same as PEFT.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.methods import Method
from lora_exp.lora.peft_files.config_fields import ALL_LINEAR, ConfigFields, Targets, shortened
from lora_exp.lora.peft_files.patterns import Pattern
from lora_exp.lora.peft_files.tensors import format_of

INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # initializations that do not change the base
READ = {  # fields that are read below, or by a method
  "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
  "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "init_lora_weights",
  "ensure_weight_tying", "save_projection", "fan_in_fan_out", "lora_exp", "peft", "init_weights", "init_ia3_weights",
  "target_parameters", "trainable_token_indices", "lora_bias",
}  # fmt: skip
HARMLESS = {  # fields that do not affect the computation
  "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
  "projection_prng_key", "d_initial",
}  # fmt: skip
MERGE = "load it with its base in PEFT, save the result of merge_and_unload(), and give that as model.weights"


@dataclass
class PeftConfig(ConfigFields):
  """A parsed adapter_config.json. Raises InputError that lists every invalid or unsupported value."""

  def __post_init__(self):
    if self.values.get("peft_type") == "TRAINABLE_TOKENS":
      self.values = with_token_rows(self.values)
    self.method = self._method()
    form = self.form = format_of(self.method)
    supported = READ | HARMLESS | form.harmless | {form.alpha_key, form.dropout_key}
    for name, value in self.values.items():
      if name not in supported and value not in (None, False, {}, []):
        self.problem(f"{shortened(name)}={shortened(value)}: not supported, and it may change the computation")
    self.init_method = self._init_method()
    self.extra = self._typed("lora_exp", dict, {})  # our additions to the config
    self.peft_names = self._typed("peft", bool, True)  # module names and their matching are PEFT's
    self.start = self._flag(self.extra, "start", "lora_exp.")
    self.rslora = self._flag(self.values, "use_rslora")
    for name in form.select:
      self._flag(self.values, name)
    self.tying = self._flag(self.values, "ensure_weight_tying")
    self.output_bias = self._flag(self.values, "lora_bias")
    if self.output_bias and (not form.output_bias or self.init_method is not None):
      self.problem(f"lora_bias=true: PEFT's {(self.init_method or self.method).title} has no such bias")
    self.bias = self.values.get("bias", "none")
    biases = ("none", "all", form.bias_word) if form.bias_word else ("none",)
    if self.bias not in biases:
      self.problem(f"bias={shortened(self.bias)}: choose {', '.join(biases)}")
    if form.shared_keys and self.values.get("save_projection", True) is not True:
      self.problem(f"save_projection=false: the file lacks {self.method.title}'s random arrays; load it with its "
                   "base in PEFT, set save_projection of its peft_config to True, and save it again")
    self.rank = self._rank(form.rank_key, self.values.get(form.rank_key)) if form.has_ranks else 1
    self.alpha = 1.0 if form.alpha_key is None else self._alpha(form.alpha_key, self.values.get(form.alpha_key))
    read_rank = self._masked_rank if form.mask_suffix else self._rank
    self.ranks = self._patterns("rank_pattern", read_rank, form.mask_suffix)
    self.alphas = self._patterns("alpha_pattern", self._alpha)
    if self.method.one_rank and self.peft_names and self.ranks:
      self.problem(f"rank_pattern: PEFT's {self.method.title} has one rank for all modules")
    self.modules_to_save = self._names("modules_to_save")
    self.targets = self._targets("target_modules")
    self.target_parameters = self._names("target_parameters")
    self.exclude = self._targets("exclude_modules")
    self.token_rows = self._token_rows()
    self._layers()
    if self.problems:
      raise InputError(self.problems)

  def _method(self) -> Method:
    """The method whose format the config has; LoRA, and a problem, if there is none."""
    peft_type = self.values.get("peft_type")
    formats = {method: method.peft or method.peft_reads for method in methods.every()}
    candidates = [method for method, form in formats.items() if form is not None and form.peft_type == peft_type]
    if not candidates:
      types = sorted({"TRAINABLE_TOKENS", *(form.peft_type for form in formats.values() if form is not None)})
      self.problem(f"peft_type={shortened(peft_type)}: not supported; choose {', '.join(types)}")
      return methods.get("lora")
    return next((method for method in candidates if self._selects(method)), candidates[0])

  def _init_method(self) -> Method | None:
    """The method that `init_lora_weights` names, if PEFT subtracts its A₀·B₀ from the base; else None."""
    init = self.values.get("init_lora_weights", True)
    if isinstance(init, (bool, str, type(None))) and init in INITS:
      return None
    word, _, count = init.partition("_niter_") if isinstance(init, str) else ("", "", "")
    for method in methods.every():
      if method.name == word and method.init_of == self.method.name and (not count or count.isdigit()):
        return method
    advice = MERGE if init == "loftq" else "the file does not contain the change; use the merged model instead"
    self.problem(f"init_lora_weights={shortened(init)}: PEFT changes the base for this adapter; {advice}")
    return None

  def _selects(self, method: Method) -> bool:
    """Whether the config has the values that distinguish `method` from others of its peft_type."""
    return all(bool(self.values.get(name)) == value for name, value in format_of(method).select.items())

  def _layers(self) -> None:
    """Sets `layers` and `layers_patterns`."""
    layers, patterns = self.values.get("layers_to_transform"), self.values.get("layers_pattern") or []
    if not isinstance(layers, list):
      layers = [] if layers is None else [layers]
    patterns = patterns if isinstance(patterns, list) else [patterns]
    if any(isinstance(x, bool) or not isinstance(x, int) for x in layers):
      self.problem(f"layers_to_transform={shortened(layers)}: must be a list of integers")
    if not all(isinstance(x, str) and re.fullmatch(r"[\w.]+", x) for x in patterns):
      self.problem(f"layers_pattern={shortened(patterns)}: must be a list of names")
    self.layers, self.layers_patterns = layers, patterns

  # The meaning of the fields in PEFT

  def rank_of(self, names: Sequence[str]) -> int:
    """Returns the rank of the module with the names `names`."""
    return _first_match(self.ranks, names, self.rank)

  def alpha_of(self, names: Sequence[str]) -> float:
    """Returns the alpha of the module with the names `names`."""
    return _first_match(self.alphas, names, self.alpha)

  def scale(self, alpha: float, rank: int) -> float:
    """Returns alpha/rank, or alpha/sqrt(rank) with use_rslora, or 1 for a method without alpha.

    If ranks are pruned, as in AdaLoRA, `rank` is replaced by that before pruning, and PEFT adds 1e-5 to it.
    """
    if self.form.mask_suffix:
      return alpha / (self.rank + 1e-5)
    return 1.0 if self.form.alpha_key is None else alpha / (math.sqrt(rank) if self.rslora else rank)

  def scaled(self, names: Sequence[str], rank: int) -> tuple[float, float, int]:
    """Returns (alpha, scale, rank) of a module; half of alpha and rank if the file also holds A₀ and B₀."""
    alpha = self.alpha_of(names)
    scale = self.scale(alpha, rank)
    if self.start:
      rank, alpha = rank // 2, alpha / 2
    return float(rank) if self.form.alpha_key is None else alpha, scale, rank

  @property
  def draws_start(self) -> bool:
    """Whether PEFT computes A₀ and B₀ from the base with random numbers that are not in the file."""
    return self.init_method is not None and "_niter_" in str(self.values["init_lora_weights"])

  @property
  def names_modules(self) -> bool:
    """Whether the config names the adapted modules. If not, PEFT uses defaults for each kind of model."""
    return self.targets is not None or bool(self.target_parameters)

  def adapts(self, name: str, is_linear: bool = True) -> bool:
    """Whether PEFT adapts the module `name`. `is_linear`: whether it is a linear module other than the head."""
    if not self.peft_names:
      return isinstance(self.targets, set) and name in self.targets
    if any(f".{name}.weight".endswith(f".{parameter}") for parameter in self.target_parameters):
      return True
    if self.saves(name) or _is_target(self.exclude, name):
      return False
    if self.targets == ALL_LINEAR:
      return is_linear and self._is_in_layers(name)
    return _is_target(self.targets, name) and self._is_in_layers(name)

  def _is_in_layers(self, name: str) -> bool:
    """Whether the module `name` is in one of layers_to_transform."""
    if not self.layers or not isinstance(self.targets, (set, str)) or name in self.targets:
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


def _first_match(patterns: Sequence[tuple[Pattern, Any]], names: Sequence[str], default: Any) -> Any:
  """The value of the first pattern that matches one of `names`."""
  for pattern, value in patterns:
    if any(pattern.fullmatch(name) for name in names):
      return value
  return default


def _is_target(targets: Targets, name: str) -> bool:
  """Whether `targets` match `name` in PEFT: a name as its last segments, a pattern in full."""
  if isinstance(targets, set):
    parts = name.split(".")
    return any(".".join(parts[i:]) in targets for i in range(len(parts)))
  return isinstance(targets, Pattern) and targets.fullmatch(name)


def with_token_rows(values: Mapping[str, Any]) -> dict[str, Any]:
  """Converts the config of a TRAINABLE_TOKENS adapter to that of a LoRA with token rows and no adapted module."""
  targets, ids = values.get("target_modules"), values.get("token_indices")
  rows = dict.fromkeys(targets, ids) if isinstance(targets, list) and targets else ids
  others = {name: x for name, x in values.items() if name not in ("token_indices", "init_weights")}
  return others | {
    "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [], "trainable_token_indices": rows
  }  # fmt: skip
