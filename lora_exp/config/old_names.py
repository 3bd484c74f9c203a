"""Settings renamed after version 0.1.0. The old names are still accepted."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

OLD_NAMES = {"mesh.arm": "mesh.trial", "promises": "expectations", "otherwise": "fallback"}  # old path: new path
# (source, packing) of version 0.1.0 that could split a prompt from its answer
SPLIT_PAIRS = [(source, "pack") for source in ("arithmetic", "chatterbot", "jsonl")]
_OLD_KEY = re.compile(r"([+~]*)(" + "|".join(map(re.escape, OLD_NAMES)) + r")(?=[.=]|$)")


def rename_override(text: str) -> str:
  """The override `text` with the current name of its setting: `mesh.arm=2` becomes `mesh.trial=2`."""
  match = _OLD_KEY.match(text)
  return text if match is None else match[1] + OLD_NAMES[match[2]] + text[match.end() :]


def old_name_warning(texts: Sequence[str]) -> str | None:
  """A warning about old names in the overrides `texts`, or None."""
  old = [match[2] for text in texts if (match := _OLD_KEY.match(text))]
  if not old:
    return None
  pairs = ", ".join(f"{name} is now {OLD_NAMES[name]}" for name in dict.fromkeys(old))
  return f"renamed settings: {pairs}; the old names still work"


def rename_settings(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested settings with the current names. A value under an old name replaces that under the new name."""
  renamed = dict(values)
  for old, new in OLD_NAMES.items():
    *groups, old_key = old.split(".")
    new_key = new.rpartition(".")[2]
    _rename_key(renamed, groups, old_key, new_key)
  if "seed" not in renamed:
    _move_examples_seed(renamed)
  _keep_packing(renamed)
  return renamed


def _keep_packing(values: dict[str, Any]) -> None:
  """In configs without `data.loss`, packing=pack could split an answer from its prompt, as packing=stream does now."""
  for name in ("data", "pretrain_data", "retain"):
    data = values.get(name)
    if isinstance(data, dict) and "loss" not in data and (data.get("source"), data.get("packing")) in SPLIT_PAIRS:
      values[name] = {**data, "packing": "stream"}


def _move_examples_seed(values: dict[str, Any]) -> None:
  """In version 0.1.0, `data.seed` also chose the examples of `data=arithmetic`, now `data.options.examples_seed`."""
  for name in ("data", "pretrain_data", "retain"):
    data = values.get(name)
    if isinstance(data, dict) and data.get("source") == "arithmetic" and data.get("seed"):
      values[name] = {**data, "options": {"examples_seed": data["seed"], **(data.get("options") or {})}}


def _rename_key(values: dict[str, Any], groups: Sequence[str], old_key: str, new_key: str) -> None:
  """Renames a key of `values`, or of its subgroup at the path `groups`, which is copied first."""
  for group in groups:
    if not isinstance(values.get(group), dict):
      return
    values[group] = dict(values[group])
    values = values[group]
  if old_key in values:
    values[new_key] = values.pop(old_key)
