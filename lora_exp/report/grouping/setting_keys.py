"""The configuration keys that distinguish the settings of a sweep, and the labels of settings."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from lora_exp.report.reading.run_record import RunRecord

METHOD, TARGETS, RANK, ALPHA, RATE = "method", "lora.targets", "lora.rank", "lora.alpha", "optim.lr"
MAIN_KEYS = (METHOD, TARGETS, RANK, ALPHA, RATE)  # come first in labels, and are always named if they vary
SHORT_NAMES = {RANK: "rank", ALPHA: "alpha", RATE: "lr"}
# Settings and groups that do not change what is trained; `otherwise` and `promises` are of version 0.1.0.
IGNORED = ("task", "name", "seed", "run", "cache", "prompt", "prompt_file", "otherwise", "promises", "fallback",
           "expectations", "report", "runs", "filter", "clean", "plan", "cache_limit", "logger", "sample", "eval",
           "retain", "train.resume", "train.stop_at", "train.log_every", "train.save_every", "train.retain_tokens",
           "model.adapter_lr")
NOT_LOW_RANK = ("lora.method", "lora.bias", "lora.train_modules")  # settings of `lora` that every method can use


def effective_settings(run: RunRecord) -> dict[str, Any]:
  """The settings that affect training: without those that the method does not use, and with alpha resolved."""
  settings = {key: value for key, value in run.config.items() if not _is_ignored(key)}
  method = run.method
  if method.trains_nothing:
    settings = {key: value for key, value in settings.items() if not key.startswith(("optim.", "lora."))}
    return settings | {"lora.method": run.config.get("lora.method")}
  if not method.adapts_kernels:
    return {key: value for key, value in settings.items() if not key.startswith("lora.") or key in NOT_LOW_RANK}
  if not method.uses_rank:
    settings = {key: value for key, value in settings.items() if key not in (RANK, "lora.rank_pattern")}
  if method.uses_alpha:
    settings[ALPHA] = resolved_alpha(run)
  else:
    settings.pop(ALPHA, None)
  return settings


def resolved_alpha(run: RunRecord) -> float | None:
  """The alpha of the run: 2 · rank for null; None for a method without alpha."""
  if not (run.method.adapts_kernels and run.method.uses_alpha):
    return None
  alpha, rank = run.config.get(ALPHA), run.config.get(RANK)
  return 2.0 * rank if alpha is None and rank is not None else alpha


@cache
def _is_ignored(key: str) -> bool:
  return any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def varied_keys(runs: Iterable[RunRecord]) -> list[str]:
  """The keys whose values differ between runs, including seeds, in the order of the config."""
  runs = [run for run in runs if run.config]
  tables = [effective_settings(run) for run in runs]
  typed_alphas = {run.config.get(ALPHA) for run, table in zip(runs, tables, strict=True) if ALPHA in table}
  keys = dict.fromkeys(key for table in tables for key in table)
  return [key for key in keys if _varies(key, tables) and not (key == ALPHA and len(typed_alphas) == 1)]


def _varies(key: str, tables: Sequence[Mapping[str, Any]]) -> bool:
  """Whether the value of `key` differs, or is missing in some runs whose method uses it."""
  values = {repr(table[key]) for table in tables if key in table}
  if not key.startswith(("lora.", "optim.")) and any(key not in table for table in tables):
    values.add("missing")
  return len(values) > 1


def distinguishing_keys(runs: Sequence[RunRecord], columns: Sequence[str]) -> list[str]:
  """The keys that distinguish settings: the MAIN_KEYS that vary, then those that no other key determines.

  Alpha and the learning rate are not among them if each method has a single value, as its default.
  """
  tables = [effective_settings(run) | {METHOD: run.method_label} for run in runs]
  methods = {run.method_label for run in runs if not run.method.is_reference}
  keys = [METHOD] if len(methods) > 1 else []
  keys += [key for key in MAIN_KEYS if key in columns and not (key in (ALPHA, RATE) and _decides(METHOD, key, tables))]
  for key in columns:
    if key not in keys and not any(_decides(other, key, tables) for other in [METHOD, *keys]):
      keys.append(key)
  return keys


def _decides(other: str, key: str, tables: Sequence[Mapping[str, Any]]) -> bool:
  """Whether each value of `other` has exactly one value of `key`."""
  values: dict[str, set[str]] = {}
  for table in tables:
    if key in table:
      values.setdefault(repr(table.get(other)), set()).add(repr(table[key]))
  return all(len(found) == 1 for found in values.values())


def setting_values(run: RunRecord, keys: Sequence[str]) -> dict[str, Any]:
  """The run's values of `keys`, without keys that its method does not use."""
  settings = effective_settings(run) | {METHOD: run.method_label}
  return {key: settings[key] for key in keys if key in settings}


def setting_label(run: RunRecord, keys: Sequence[str]) -> str:
  """A setting in words, such as 'attention, rank 4, lr 0.005'."""
  if run.method.trains_nothing:
    return run.method.name
  values = setting_values(run, keys)
  parts = [key_value(key, value) for key, value in values.items()]
  if run.method.is_reference and METHOD not in values:
    parts = [str(run.method_label), *parts]
  if parts:
    return ", ".join(parts)
  rank = f", rank {run.config.get(RANK)}" if RANK in effective_settings(run) else ""
  return f"{run.method_label}{rank}"


def key_value(key: str, value: Any) -> str:
  """One setting in words: 'rank 4', 'attention', 'steps 100'."""
  return value_text(value) if key in (METHOD, TARGETS) else f"{short_name(key)} {value_text(value)}"


def value_text(value: Any) -> str:
  """A value in words, as in YAML; a float with four significant digits."""
  if value is None:
    return "null"
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_name(key: str) -> str:
  """The name of a key in a sentence: 'rank' for lora.rank."""
  return SHORT_NAMES.get(key, key.rpartition(".")[2])
