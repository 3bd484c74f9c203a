"""Records the content that a run started from. A resumed run compares it, so its files may move but not change.

The checkpoint's metadata has the fingerprint of the rows, of those of `data@retain`, of the adapter in
`lora.init_from`, what the base is, and the settings of the run.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from lora_exp.config import Config, InputError, to_config
from lora_exp.runtime.saved_config import MOVABLE, changed_settings
from lora_exp.train.records.training_record import TrainingRecord

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE_FACTS = ("kind", "digest", "seed", "data", "loss", "tokens")  # facts that another base differs in


def adapter_digest(directory: str | None) -> str | None:
  """SHA-256 (hex) over the files of the adapter in `directory`; None without one."""
  if directory is None:
    return None
  total = hashlib.sha256()
  for name in ADAPTER_FILES:
    file = Path(directory) / name
    total.update(hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b"-")
  return total.hexdigest()


def meta_problem(meta: Mapping[str, Any], cfg: Config) -> str:
  """Why a checkpoint with the metadata `meta` cannot be resumed by the run with the settings `cfg`, or ''."""
  return settings_problem(meta, cfg) if is_of_a_run(meta) else "its metadata is not that of a run"


def is_of_a_run(meta: Mapping[str, Any]) -> bool:
  """Whether the metadata of a checkpoint has the parts that training stores."""
  data = meta.get("data")
  return isinstance(data, dict) and "fingerprint" in data and _is_record(meta.get("record"))


def _is_record(values: Any) -> bool:
  """Whether `values` are fields of a TrainingRecord, with values of their types."""
  hints = get_type_hints(TrainingRecord)
  if not isinstance(values, dict) or not {"steps", "data"} <= values.keys() <= hints.keys():
    return False
  groups = [values.get(name, {}) for name in ("scores", "halves")]
  return all(_has_type(value, hints[name]) for name, value in values.items()) and all(
    isinstance(scores, dict) for group in groups for scores in group.values()
  )


def _has_type(value: Any, hint: Any) -> bool:
  """Whether `value` has the type `hint`; a whole number is a float as well."""
  return isinstance(value, hint) or (isinstance(value, int) and isinstance(0.0, hint))


def settings_problem(meta: Mapping[str, Any], cfg: Config) -> str:
  """Why a checkpoint with the metadata `meta` does not belong to the run with the settings `cfg`, or ''.

  Version 0.1.0 stored no settings. Data and base are compared by content instead, in `changed_sources`.
  """
  if "settings" not in meta:
    return ""
  if not isinstance(meta["settings"], dict):
    return "its settings cannot be read"
  try:
    changed = [path for path, _, _ in changed_settings(to_config(meta["settings"]), cfg) if path not in MOVABLE]
  except InputError as error:
    return f"its settings cannot be read ({error})"
  return f"it is from a run with another {', '.join(changed)}" if changed else ""


def changed_sources(
  stored: Mapping[str, Any], current: Mapping[str, Any], stored_base: Mapping[str, Any], base: Mapping[str, Any]
) -> list[str]:
  """One message for each source of the run whose content has changed. Skips what an older version did not store."""
  changed = []
  if stored["fingerprint"] != current["fingerprint"]:
    changed.append("the data has changed since the run started (another file, or another version of the standard "
                   "library)")
  if stored.get("retain") not in (None, current["retain"]):
    changed.append("the data of data@retain has changed since the run started")
  if stored.get("init_from") not in (None, current["init_from"]):
    changed.append("the adapter in lora.init_from has changed since the run started")
  differing = [name for name in BASE_FACTS if name in stored_base and stored_base[name] != base.get(name)]
  if differing:
    changed.append(_base_change(differing[0], stored_base, base))
  return changed


def _base_change(fact: str, stored: Mapping[str, Any], base: Mapping[str, Any]) -> str:
  """How the base differs from the one that the run was started on, by the first fact that differs."""
  if fact == "digest":
    return "the weights in model.weights have changed since the run started: the content of the files differs"
  if stored.get("kind") == "pretrain" == base.get("kind"):
    return (f"the pretrained base is not the one that the run started on ({fact} {stored[fact]} then, "
            f"{base.get(fact)} now): another version or machine made it again")
  return f"the base has changed since the run started: its {fact} was {stored[fact]} and is {base.get(fact)}"
