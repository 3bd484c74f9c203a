"""adapter_config.json, with which PEFT computes what we do."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lora_exp.lora.peft.names import Naming, module_name, trained_modules
from lora_exp.lora.peft.tensors import PeftTensors, format_of


def config_values(
  made: PeftTensors, full: Iterable[str], naming: Naming | None, rslora: bool, dropout: float, base: str | None
) -> dict[str, Any]:
  """adapter_config.json, but for our own part of it."""
  form = format_of(made.method)
  names = {row.path: module_name(naming, row.path) for row in made.rows}
  tied = None if naming is None else naming.tied
  ties = tied is not None and (tied[0] in names or f"{tied[0]}.embedding" in full)
  heads = [tied[1]] if ties and tied is not None else []
  ranks, alphas = {names[r.path]: r.rank for r in made.rows}, {names[r.path]: _number(r.alpha) for r in made.rows}
  if ties and tied is not None and tied[0] in names:
    ranks[tied[1]], alphas[tied[1]] = ranks[names[tied[0]]], alphas[names[tied[0]]]
  rank, alpha = _usual(ranks.values(), 1), _usual(alphas.values(), 1)
  whole, biases = trained_modules(full)
  saved = [*(module_name(naming, path) for path in whole), *(heads if ties and tied and tied[0] in whole else [])]
  found: dict[str, Any] = {
    "peft_type": form.peft_type,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "inference_mode": True,
    "target_modules": _targets(list(ranks), naming),
    "modules_to_save": saved or None,
    **made.method.peft_fields(names, made.leaves),
    **form.constants,
  }
  if form.adapts_conv1d:
    found["fan_in_fan_out"] = naming is not None and naming.conv1d
  if form.has_ranks:
    found |= {"r": rank, "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank}}
  if form.bias_word is not None:
    found["bias"] = _bias(biases, names, form.bias_word)
  if form.dropout_key is not None:
    found[form.dropout_key] = dropout
  if form.alpha_key is not None:
    found |= {form.alpha_key: alpha, "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != alpha}}
  if form.rslora:
    found |= {"use_rslora": rslora, "ensure_weight_tying": ties}
  return found | dict(form.select)


def _bias(biases: Sequence[str], adapted: Iterable[str], only: str) -> str:
  if not biases:
    return "none"
  return only if {path.rpartition(".")[0] for path in biases} <= set(adapted) else "all"


def _targets(names: list[str], naming: Naming | None) -> list[str] | str:
  """PEFT takes the names of a list as ends of names: with a prefix they are whole, else a pattern says so."""
  if naming is None or naming.prefix:
    return names
  return "|".join(map(re.escape, names))


def _exactly(name: str) -> str:
  """A key of rank_pattern or alpha_pattern, which PEFT takes as a regular expression for the end of a name."""
  return "^" + re.escape(name)


def _usual(values: Iterable, default):
  return max(Counter(values).items(), key=lambda item: item[1], default=(default, 0))[0]


def _number(value: float) -> int | float:
  return int(value) if value == int(value) else value
