"""The contents of adapter_config.json for an adapter, such that PEFT computes the same."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lora_exp.lora.adapter import BaseChanges
from lora_exp.lora.peft_files.names import Naming, expert_modules, module_name, trained_modules
from lora_exp.lora.peft_files.tensors import PeftTensors, format_of

# Fields that are written only if they differ from PEFT's default, because older releases refuse unknown fields.
DEFAULTS: dict[str, Any] = {
  "modules_to_save": None, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
  "use_dora": False, "ensure_weight_tying": False,
}  # fmt: skip


def config_values(
  converted: PeftTensors, full: Iterable[str], naming: Naming | None, rslora: bool, dropout: float, base: str | None
) -> dict[str, Any]:
  """Returns the fields of adapter_config.json: those that PEFT requires, and those that differ from its defaults.

  `full` are the paths of parameters that were trained in full; `base` is the name or path of the base model.
  """
  form = format_of(converted.method)
  names = {row.path: module_name(naming, row.path) for row in converted.rows}
  tied = None if naming is None else naming.tied
  ties = tied is not None and (tied.path in names or f"{tied.path}.embedding" in full)
  heads = [tied.head] if ties and tied is not None else []
  ranks = {names[row.path]: row.rank for row in converted.rows}
  alphas = {names[row.path]: _number(row.alpha) for row in converted.rows}
  if ties and tied is not None and tied.path in names:
    ranks[tied.head], alphas[tied.head] = ranks[names[tied.path]], alphas[names[tied.path]]
  experts = [names[path] for path in expert_modules(naming, names)]
  rank, alpha = _most_common(ranks.values(), 1), _most_common(alphas.values(), 1)
  complete_modules, biases = trained_modules(full)
  modules_to_save = [module_name(naming, path) for path in complete_modules]
  if tied is not None and tied.path in complete_modules:
    modules_to_save += heads
  values: dict[str, Any] = {
    "peft_type": form.peft_type,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "inference_mode": True,
    "target_modules": _targets([name for name in ranks if name not in experts], naming),
    "modules_to_save": modules_to_save or None,
    **converted.method.peft_fields(names, converted.leaves),
  }
  if form.adapts_conv1d:
    values["fan_in_fan_out"] = naming is not None and naming.conv1d
  if form.has_ranks:
    values |= {"r": rank, "rank_pattern": {_pattern(name, naming): r for name, r in ranks.items() if r != rank}}
  if form.bias_word is not None:
    values["bias"] = _bias(biases, names, form.bias_word)
  if form.dropout_key is not None:
    values[form.dropout_key] = dropout if not experts else 0.0  # PEFT supports no dropout for experts
  if experts:
    values["target_parameters"] = experts
  if form.alpha_key is not None:
    alpha_pattern = {_pattern(name, naming): a for name, a in alphas.items() if a != alpha}
    values |= {form.alpha_key: alpha, "alpha_pattern": alpha_pattern}
  if form.rslora:
    values |= {"use_rslora": rslora, "ensure_weight_tying": ties}
  values |= dict(form.select)
  return {name: value for name, value in values.items() if name not in DEFAULTS or value != DEFAULTS[name]}


def base_fields(base: BaseChanges, naming: Naming | None) -> dict[str, Any]:
  """Returns the fields for output biases and for the tokens whose rows are in the file."""
  fields: dict[str, Any] = {"lora_bias": True} if base.biases else {}
  ids_by_path = {path: [int(i) for i in ids] for path, (ids, _) in base.token_rows.items()}
  if naming is not None and list(ids_by_path) == [naming.tables[0]]:
    return fields | {"trainable_token_indices": ids_by_path[naming.tables[0]]}
  names = {path: module_name(naming, path) for path in ids_by_path}
  ids_by_name = {names[path]: ids for path, ids in ids_by_path.items()}
  return fields | {"trainable_token_indices": ids_by_name} if names else fields


def _bias(biases: Sequence[str], adapted: Iterable[str], only: str) -> str:
  """The value of `bias`: "none", `only` if all trained biases are of adapted modules, else "all"."""
  if not biases:
    return "none"
  return only if {path.rpartition(".")[0] for path in biases} <= set(adapted) else "all"


def _targets(names: list[str], naming: Naming | None) -> list[str] | str:
  """The value of `target_modules`.

  PEFT matches the names of a list as suffixes. Names without a prefix could match other modules, and are written as a
  regular expression instead, which must match in full.
  """
  if naming is None or naming.prefix:
    return names
  return "|".join(map(re.escape, names))


def _pattern(name: str, naming: Naming | None) -> str:
  """A key of rank_pattern or alpha_pattern that matches `name` only; PEFT matches keys as suffixes.

  PEFT up to 0.13 compares module names literally and supports no anchors, so full names are written as they are.
  """
  return name if naming is not None and naming.prefix else "^" + re.escape(name)


def _most_common(values: Iterable[Any], default: Any) -> Any:
  """The most common of `values`; `default` if there are none."""
  common = Counter(values).most_common(1)
  return common[0][0] if common else default


def _number(value: float) -> int | float:
  """`value` as an int if it is integral, as PEFT writes it."""
  return int(value) if value == int(value) else value
