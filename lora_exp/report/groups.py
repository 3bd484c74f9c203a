"""Trials that differ in their seeds alone are one setting; settings of the same steps, data and base are compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_exp.config.schema import ADAPTERS
from lora_exp.report.statistics import Estimate, estimate
from lora_exp.report.trials import SEEDS, TrialRecord
from lora_exp.report.updates import Overlap

# Settings that change nothing in what is trained.
IGNORED = ("task", "name", "run", "cache", "prompt", "prompt_file", "otherwise", "promises", "logger", "sample",
           "retain", "train.resume", "train.stop_at", "train.log_every", "train.save_every", "train.retain_tokens",
           "model.adapter_lr")
MAIN = ("method", "lora.targets", "lora.rank", "lora.alpha", "optim.lr")  # named first, and always when they vary
WORDS = {"lora.rank": "rank", "lora.alpha": "alpha", "optim.lr": "lr"}
REFERENCES = ("frozen", "full")
CLOSE = 0.01  # relative: losses of one base on one held-out text, apart from how it was cut into batches


def settings_of(trial: TrialRecord) -> dict[str, Any]:
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


def alpha_of(trial: TrialRecord) -> float | None:
  """alpha as it was used: null stands for 2 · rank."""
  alpha, rank = trial.config.get("lora.alpha"), trial.config.get("lora.rank")
  if trial.config.get("lora.method") not in ADAPTERS or trial.config.get("lora.method") == "vera":
    return None
  return 2.0 * rank if alpha is None and rank is not None else alpha


def _ignored(key: str) -> bool:
  return any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def varied(trials: Iterable[TrialRecord]) -> list[str]:
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


@dataclass
class Setting:
  """What is compared: the trials with one set of settings, a seed each."""

  label: str
  values: dict[str, Any]  # of the keys that tell settings apart
  trials: list[TrialRecord]  # by number
  overlap: Overlap | None = None  # of what its seeds learned

  @property
  def method(self) -> str:
    return self.trials[0].method or "?"

  @property
  def reference(self) -> bool:
    """Whether it is a reference line: the frozen base, or full fine-tuning."""
    return self.method in REFERENCES

  @property
  def counted(self) -> dict[tuple, TrialRecord]:
    """Seeds -> the first trial that is done with them."""
    found: dict[tuple, TrialRecord] = {}
    for trial in self.trials:
      if trial.loss is not None:
        found.setdefault(trial.seeds, trial)
    return found

  @property
  def losses(self) -> dict[tuple, float]:
    return {seeds: trial.loss for seeds, trial in self.counted.items() if trial.loss is not None}

  @property
  def loss(self) -> Estimate:
    return estimate(list(self.losses.values()))

  @property
  def gain(self) -> Estimate:
    """Below each trial's own base."""
    return self.of(lambda trial: None if trial.base is None or trial.loss is None else trial.base - trial.loss)

  def of(self, value) -> Estimate:
    """The estimate of `value(trial)` over the seeds."""
    return estimate([x for trial in self.counted.values() if (x := value(trial)) is not None])

  @property
  def seeds(self) -> int:
    return len(self.counted)

  @property
  def trainable(self) -> int | None:
    return next((trial.trainable for trial in [*self.counted.values(), *self.trials] if trial.trainable is not None), None)

  @property
  def budget(self) -> float | None:
    """`lora.parameters`, by which its rank was chosen; None where the rank was given."""
    return settings_of(self.trials[0]).get("lora.parameters")

  @property
  def names(self) -> str:
    """The counted trials, for an evidence line."""
    return ", ".join(str(trial) for trial in self.counted.values())


@dataclass
class Study:
  """Settings that can be compared."""

  settings: list[Setting]
  keys: list[str]  # that tell them apart
  columns: list[str]  # every key whose values differ in the sweep
  why: str = ""  # what sets it apart from the sweep's other studies
  unread: list[str] = field(default_factory=list)  # adapters that are damaged, a sentence each

  @property
  def trials(self) -> list[TrialRecord]:
    return sorted((trial for setting in self.settings for trial in setting.trials), key=lambda trial: trial.number)

  @property
  def adapted(self) -> list[Setting]:
    """Those with a loss, apart from the reference lines."""
    return [s for s in self.settings if s.seeds and not s.reference]

  @property
  def full(self) -> Setting | None:
    """Full fine-tuning, at its best rate."""
    found = [s for s in self.settings if s.seeds and s.method == "full"]
    return min(found, key=lambda s: s.loss.mean, default=None)

  @property
  def base(self) -> float | None:
    """The held-out loss of the untouched base."""
    found = [trial.base for trial in self.trials if trial.base is not None and not trial.config.get("lora.quant")]
    return estimate(found).mean if found else None

  @property
  def unit(self) -> str:
    return "" if any(trial.numbers for trial in self.trials) else "nats per token"

  def levels(self, key: str) -> list[Any]:
    """The values of `key` among adapted settings and those that failed, in order."""
    found = {s.values[key] for s in self.settings if not s.reference and s.values.get(key) is not None}
    return sorted(found, key=lambda v: (isinstance(v, str), v))

  def share(self, setting: Setting) -> Estimate:
    """Share of full fine-tuning's gain below the base: 0 is the base, 1 is full; by seed where full has that seed."""
    full = self.full
    if full is None:
      return estimate([])
    paired = {seeds for seeds in setting.counted if seeds in full.counted}
    if len(paired) < setting.seeds:
      paired = set()

    def share(trial: TrialRecord) -> float | None:
      top = full.losses[trial.seeds] if paired else full.loss.mean
      base = full.counted[trial.seeds].base if paired else self.base  # of full precision, also for a quantised trial
      if base is None or trial.loss is None or base - top <= 0:
        return None
      return (base - trial.loss) / (base - top)

    return setting.of(share)


def studies(trials: Sequence[TrialRecord]) -> list[Study]:
  """The settings of a sweep in groups that can be compared, the largest first; trials without a config are in none."""
  trials = [trial for trial in trials if trial.config]
  columns = varied(trials)
  keys = memory_errors(trials, [key for key in columns if key not in SEEDS])
  groups: dict[tuple, list[TrialRecord]] = {}
  for trial in trials:
    config = settings_of(trial)
    identity = tuple(sorted((k, repr(v)) for k, v in config.items() if k not in SEEDS))
    groups.setdefault(identity, []).append(trial)
  made = [Setting(label(trials_, keys), values_of(trials_[0], keys), trials_) for trials_ in groups.values()]
  clusters: list[list[Setting]] = []
  for setting in made:
    fit = next((c for c in clusters if all(not apart(setting, other) for other in c)), None)
    clusters.append([setting]) if fit is None else fit.append(setting)
  clusters.sort(key=lambda c: -sum(len(s.trials) for s in c))
  found = []
  for cluster in clusters:
    others = {why: None for other in clusters if other is not cluster for s in other[:1] for t in cluster[:1]
              for why in apart(t, s)}
    found.append(Study(sorted(cluster, key=_order), keys, columns, "; ".join(others)))
  return found


def _order(setting: Setting) -> tuple:
  return ({"frozen": 0, "full": 2}.get(setting.method, 1), setting.trials[0].number)


def values_of(trial: TrialRecord, keys: Sequence[str]) -> dict[str, Any]:
  """The trial's values of `keys`; one that its method has no use for is left out."""
  config = settings_of(trial) | {"method": trial.method}
  return {key: config[key] for key in keys if key in config}


def memory_errors(trials: Sequence[TrialRecord], columns: Sequence[str]) -> list[str]:
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


def label(trials: Sequence[TrialRecord], keys: Sequence[str]) -> str:
  """A setting in words, as 'attention, rank 4, lr 0.005'."""
  trial = trials[0]
  if trial.method == "frozen":
    return "frozen"
  values = values_of(trial, keys)
  head = [] if "method" in values or trial.method not in REFERENCES else [str(trial.method)]
  if not values and not head:
    return f"{trial.method}, rank {trial.config.get('lora.rank')}" if "lora.rank" in settings_of(trial) else str(trial.method)
  return ", ".join(head + [say(key, value) for key, value in values.items()])


def say(key: str, value: Any) -> str:
  """One setting in words: 'rank 4', 'attention', 'steps 100'."""
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  return text if key in ("method", "lora.targets") else f"{word(key)} {text}"


def word(key: str) -> str:
  """The name of a setting in a sentence."""
  return WORDS.get(key, key.rpartition(".")[2])


def apart(a: Setting, b: Setting) -> list[str]:
  """Why two settings cannot be compared; trials are held against each other where their data and base seeds agree."""
  pairs = [(x, y) for x in a.trials for y in b.trials if x.seeds[1:] == y.seeds[1:] and x.summary and y.summary]
  pairs = pairs or [(x, y) for x in a.trials for y in b.trials if x.summary and y.summary]
  return list({why: None for x, y in pairs for why in differences(x, y)})


def differences(x: TrialRecord, y: TrialRecord) -> list[str]:
  """What of steps, data and base two trials do not share."""
  found = []
  if x.method != "frozen" and y.method != "frozen" and x.summary.get("steps") != y.summary.get("steps"):
    found.append("the number of steps")
  prints = [trial.summary.get("fingerprints") or {} for trial in (x, y)]
  if prints[0].get("data") != prints[1].get("data") or len({a.config.get("train.eval_tokens") for a in (x, y)}) > 1:
    found.append("the data")
  other = _base(x) != _base(y) or (_plain(x) and _plain(y) and prints[0].get("base") != prints[1].get("base"))
  if not found and x.base is not None and y.base is not None and not _quantised(x, y):
    other |= abs(x.base - y.base) > CLOSE * max(abs(x.base), abs(y.base))
  return [*found, "the base"] if other else found


def _base(trial: TrialRecord) -> dict:
  """What the run says of its base, without the time it took and where it lies."""
  facts = trial.summary.get("base") or {}
  return {key: value for key, value in facts.items() if key not in ("seconds", "source")}


def _quantised(*trials: TrialRecord) -> bool:
  """Whether a trial holds the base in fewer bits, which changes its loss and its bytes."""
  return any(trial.config.get("lora.quant") for trial in trials)


def _plain(trial: TrialRecord) -> bool:
  """Whether the trial's frozen arrays are the base's: nothing of its own among them, and none trained instead."""
  return trial.method in ("lora", "rslora", "loraplus", "dora", "frozen") and not _quantised(trial) \
    and trial.config.get("lora.bias") in (None, "none") and not trial.config.get("lora.train_modules")
