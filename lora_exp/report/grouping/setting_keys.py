"""Which configuration keys tell the settings of a sweep apart, and how a setting is labelled."""

from collections.abc import Iterable, Sequence
from typing import Any

from lora_exp.config.schema import ADAPTERS
from lora_exp.report.reading.run_record import RunRecord

# Settings that change nothing in what is trained.
IGNORED = ("task", "name", "run", "cache", "prompt", "prompt_file", "otherwise", "promises", "fallback", "expectations",
           "logger", "sample", "retain", "report", "train.resume", "train.stop_at", "train.log_every",
           "train.save_every", "train.retain_tokens", "model.adapter_lr")
MAIN = ("method", "lora.targets", "lora.rank", "lora.alpha", "optim.lr")  # named first, and always when they vary
WORDS = {"lora.rank": "rank", "lora.alpha": "alpha", "optim.lr": "lr"}
REFERENCES = ("frozen", "full")


def settings_of(trial: RunRecord) -> dict[str, Any]:
  """The settings that say what the trial trained, without those that its method has no use for; alpha as resolved."""
  config = {key: value for key, value in trial.config.items() if not _ignored(key)}
  method = config.get("lora.method")
  unused: tuple[str, ...] = ()
  if method == "frozen":
    unused = ("optim.", "lora.")
  elif method in ("full", "bitfit"):
    unused = tuple(key for key in config if key.startswith("lora.") and key not in ("lora.bias", "lora.train_modules"))
  if unused:
    config = {key: value for key, value in config.items() if not key.startswith(unused)} | {"lora.method": method}
  if method in ADAPTERS and method != "vera":
    config["lora.alpha"] = alpha_of(trial)
  return config


def alpha_of(trial: RunRecord) -> float | None:
  """alpha as it was used: null stands for 2 · rank."""
  alpha, rank = trial.config.get("lora.alpha"), trial.config.get("lora.rank")
  if trial.config.get("lora.method") not in ADAPTERS or trial.config.get("lora.method") == "vera":
    return None
  return 2.0 * rank if alpha is None and rank is not None else alpha


def _ignored(key: str) -> bool:
  return any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def varied(trials: Iterable[RunRecord]) -> list[str]:
  """The dotted keys whose values differ between trials, seeds included, in the order of the config."""
  trials = [trial for trial in trials if trial.config]
  configs = [settings_of(trial) for trial in trials]
  raw = [trial.config.get("lora.alpha") for trial in trials if "lora.alpha" in settings_of(trial)]
  found = []
  for key in dict.fromkeys(key for config in configs for key in config):
    missing = not key.startswith(("lora.", "optim.")) and any(key not in config for config in configs)
    values = {repr(config[key]) for config in configs if key in config} | ({"missing"} if missing else set())
    if len(values) > 1 and not (key == "lora.alpha" and len(set(raw)) == 1):
      found.append(key)
  return found


def values_of(trial: RunRecord, keys: Sequence[str]) -> dict[str, Any]:
  """The trial's values of `keys`; one that its method has no use for is left out."""
  config = settings_of(trial) | {"method": trial.method}
  return {key: config[key] for key in keys if key in config}


def distinguishing_keys(trials: Sequence[RunRecord], columns: Sequence[str]) -> list[str]:
  """The keys that tell settings apart: MAIN ones, and of the rest those that no single other key decides.

  A rate that each method has one of tells nothing either: the reference trials have their own.
  """
  methods = {trial.method for trial in trials} - set(REFERENCES)
  tables = [settings_of(trial) | {"method": trial.method} for trial in trials]
  keys = ["method"] if len(methods) > 1 else []
  keys += [key for key in MAIN if key in columns and not (key == "optim.lr" and _decides("method", key, tables))]
  order = [key for key in columns if key not in keys]
  for key in order:
    if not any(_decides(other, key, tables) for other in ["method", *keys]):
      keys.append(key)
  return keys


def _decides(other: str, key: str, tables: Sequence[dict]) -> bool:
  """Whether each value of `other` goes with one value of `key`."""
  seen: dict[str, set[str]] = {}
  for table in tables:
    if key in table:
      seen.setdefault(repr(table.get(other)), set()).add(repr(table[key]))
  return all(len(values) == 1 for values in seen.values())


def label(trials: Sequence[RunRecord], keys: Sequence[str]) -> str:
  """A setting in words, as 'attention, rank 4, lr 0.005'."""
  trial = trials[0]
  if trial.method == "frozen":
    return "frozen"
  values = values_of(trial, keys)
  head = [] if "method" in values or trial.method not in REFERENCES else [str(trial.method)]
  if not values and not head:
    rank = f", rank {trial.config.get('lora.rank')}" if "lora.rank" in settings_of(trial) else ""
    return f"{trial.method}{rank}"
  return ", ".join(head + [say(key, value) for key, value in values.items()])


def say(key: str, value: Any) -> str:
  """One setting in words: 'rank 4', 'attention', 'steps 100'."""
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  return text if key in ("method", "lora.targets") else f"{word(key)} {text}"


def word(key: str) -> str:
  """The name of a setting in a sentence."""
  return WORDS.get(key, key.rpartition(".")[2])
