"""Arms that differ in their seeds alone are one setting; settings of the same steps, data and base are compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_exp.config.schema import ADAPTERS
from lora_exp.report.adapters import Overlap
from lora_exp.report.arms import SEEDS, Arm
from lora_exp.report.statistics import Estimate, estimate

# Settings that change nothing in what is trained.
IGNORED = ("task", "name", "run", "cache", "prompt", "prompt_file", "otherwise", "promises", "logger", "sample",
           "retain", "train.resume", "train.stop_at", "train.log_every", "train.save_every", "train.retain_tokens",
           "model.adapter_lr")
MAIN = ("method", "lora.targets", "lora.rank", "lora.alpha", "optim.lr")  # named first, and always when they vary
WORDS = {"lora.rank": "rank", "lora.alpha": "alpha", "optim.lr": "lr"}
REFERENCES = ("frozen", "full")
CLOSE = 0.01  # relative: losses of one base on one held-out text, apart from how it was cut into batches


def settings_of(arm: Arm) -> dict[str, Any]:
  """The settings that say what the arm trained, without those that its method has no use for; alpha as resolved."""
  config = {key: value for key, value in arm.config.items() if not _ignored(key)}
  method = config.get("lora.method")
  unused: tuple[str, ...] = ()
  if method == "frozen":
    unused = ("optim.", "lora.")
  elif method in ("full", "bitfit"):
    unused = tuple(key for key in config if key.startswith("lora.") and key not in ("lora.bias", "lora.train_modules"))
  if unused:
    config = {key: value for key, value in config.items() if not key.startswith(unused)} | {"lora.method": method}
  if method in ADAPTERS and method != "vera":
    config["lora.alpha"] = alpha_of(arm)
  return config


def alpha_of(arm: Arm) -> float | None:
  """alpha as it was used: null stands for 2 · rank."""
  alpha, rank = arm.config.get("lora.alpha"), arm.config.get("lora.rank")
  if arm.config.get("lora.method") not in ADAPTERS or arm.config.get("lora.method") == "vera":
    return None
  return 2.0 * rank if alpha is None and rank is not None else alpha


def _ignored(key: str) -> bool:
  return any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def varied(arms: Iterable[Arm]) -> list[str]:
  """The dotted keys whose values differ between arms, seeds included, in the order of the config."""
  arms = [arm for arm in arms if arm.config]
  configs = [settings_of(arm) for arm in arms]
  raw = [arm.config.get("lora.alpha") for arm in arms if "lora.alpha" in settings_of(arm)]
  found = []
  for key in dict.fromkeys(key for config in configs for key in config):
    missing = not key.startswith(("lora.", "optim.")) and any(key not in config for config in configs)
    values = {repr(config[key]) for config in configs if key in config} | ({"missing"} if missing else set())
    if len(values) > 1 and not (key == "lora.alpha" and len(set(raw)) == 1):
      found.append(key)
  return found


@dataclass
class Setting:
  """What is compared: the arms with one set of settings, a seed each."""

  label: str
  values: dict[str, Any]  # of the keys that tell settings apart
  arms: list[Arm]  # by number
  overlap: Overlap | None = None  # of what its seeds learned

  @property
  def method(self) -> str:
    return self.arms[0].method or "?"

  @property
  def reference(self) -> bool:
    """Whether it is a reference line: the frozen base, or full fine-tuning."""
    return self.method in REFERENCES

  @property
  def counted(self) -> dict[tuple, Arm]:
    """Seeds -> the first arm that is done with them."""
    found: dict[tuple, Arm] = {}
    for arm in self.arms:
      if arm.loss is not None:
        found.setdefault(arm.seeds, arm)
    return found

  @property
  def losses(self) -> dict[tuple, float]:
    return {seeds: arm.loss for seeds, arm in self.counted.items() if arm.loss is not None}

  @property
  def loss(self) -> Estimate:
    return estimate(list(self.losses.values()))

  @property
  def gain(self) -> Estimate:
    """Below each arm's own base."""
    return self.of(lambda arm: None if arm.base is None or arm.loss is None else arm.base - arm.loss)

  def of(self, value) -> Estimate:
    """The estimate of `value(arm)` over the seeds."""
    return estimate([x for arm in self.counted.values() if (x := value(arm)) is not None])

  @property
  def seeds(self) -> int:
    return len(self.counted)

  @property
  def trainable(self) -> int | None:
    return next((arm.trainable for arm in [*self.counted.values(), *self.arms] if arm.trainable is not None), None)

  @property
  def budget(self) -> float | None:
    """`lora.parameters`, by which its rank was chosen; None where the rank was given."""
    return settings_of(self.arms[0]).get("lora.parameters")

  @property
  def names(self) -> str:
    """The counted arms, for an evidence line."""
    return ", ".join(str(arm) for arm in self.counted.values())


@dataclass
class Study:
  """Settings that can be compared."""

  settings: list[Setting]
  keys: list[str]  # that tell them apart
  columns: list[str]  # every key whose values differ in the sweep
  why: str = ""  # what sets it apart from the sweep's other studies
  unread: list[str] = field(default_factory=list)  # adapters that are damaged, a sentence each

  @property
  def arms(self) -> list[Arm]:
    return sorted((arm for setting in self.settings for arm in setting.arms), key=lambda arm: arm.number)

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
    found = [arm.base for arm in self.arms if arm.base is not None and not arm.config.get("lora.quant")]
    return estimate(found).mean if found else None

  @property
  def unit(self) -> str:
    return "" if any(arm.numbers for arm in self.arms) else "nats per token"

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

    def share(arm: Arm) -> float | None:
      top = full.losses[arm.seeds] if paired else full.loss.mean
      base = full.counted[arm.seeds].base if paired else self.base  # of full precision, also for a quantised arm
      if base is None or arm.loss is None or base - top <= 0:
        return None
      return (base - arm.loss) / (base - top)

    return setting.of(share)


def studies(arms: Sequence[Arm]) -> list[Study]:
  """The settings of a sweep in groups that can be compared, the largest first; arms without a config are in none."""
  arms = [arm for arm in arms if arm.config]
  columns = varied(arms)
  keys = telling(arms, [key for key in columns if key not in SEEDS])
  groups: dict[tuple, list[Arm]] = {}
  for arm in arms:
    config = settings_of(arm)
    identity = tuple(sorted((k, repr(v)) for k, v in config.items() if k not in SEEDS))
    groups.setdefault(identity, []).append(arm)
  made = [Setting(label(arms_, keys), values_of(arms_[0], keys), arms_) for arms_ in groups.values()]
  clusters: list[list[Setting]] = []
  for setting in made:
    fit = next((c for c in clusters if all(not apart(setting, other) for other in c)), None)
    clusters.append([setting]) if fit is None else fit.append(setting)
  clusters.sort(key=lambda c: -sum(len(s.arms) for s in c))
  found = []
  for cluster in clusters:
    others = {why: None for other in clusters if other is not cluster for s in other[:1] for t in cluster[:1]
              for why in apart(t, s)}
    found.append(Study(sorted(cluster, key=_order), keys, columns, "; ".join(others)))
  return found


def _order(setting: Setting) -> tuple:
  return ({"frozen": 0, "full": 2}.get(setting.method, 1), setting.arms[0].number)


def values_of(arm: Arm, keys: Sequence[str]) -> dict[str, Any]:
  """The arm's values of `keys`; one that its method has no use for is left out."""
  config = settings_of(arm) | {"method": arm.method}
  return {key: config[key] for key in keys if key in config}


def telling(arms: Sequence[Arm], columns: Sequence[str]) -> list[str]:
  """The keys that tell settings apart: MAIN ones, and of the rest those that no single other key decides.

  A rate that each method has one of tells nothing either: the reference arms have their own.
  """
  methods = {arm.method for arm in arms} - set(REFERENCES)
  tables = [settings_of(arm) | {"method": arm.method} for arm in arms]
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


def label(arms: Sequence[Arm], keys: Sequence[str]) -> str:
  """A setting in words, as 'attention, rank 4, lr 0.005'."""
  arm = arms[0]
  if arm.method == "frozen":
    return "frozen"
  values = values_of(arm, keys)
  head = [] if "method" in values or arm.method not in REFERENCES else [str(arm.method)]
  if not values and not head:
    return f"{arm.method}, rank {arm.config.get('lora.rank')}" if "lora.rank" in settings_of(arm) else str(arm.method)
  return ", ".join(head + [say(key, value) for key, value in values.items()])


def say(key: str, value: Any) -> str:
  """One setting in words: 'rank 4', 'attention', 'steps 100'."""
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  return text if key in ("method", "lora.targets") else f"{word(key)} {text}"


def word(key: str) -> str:
  """The name of a setting in a sentence."""
  return WORDS.get(key, key.rpartition(".")[2])


def apart(a: Setting, b: Setting) -> list[str]:
  """Why two settings cannot be compared; arms are held against each other where their data and base seeds agree."""
  pairs = [(x, y) for x in a.arms for y in b.arms if x.seeds[1:] == y.seeds[1:] and x.summary and y.summary]
  pairs = pairs or [(x, y) for x in a.arms for y in b.arms if x.summary and y.summary]
  return list({why: None for x, y in pairs for why in differences(x, y)})


def differences(x: Arm, y: Arm) -> list[str]:
  """What of steps, data and base two arms do not share."""
  found = []
  if x.method != "frozen" and y.method != "frozen" and x.summary.get("steps") != y.summary.get("steps"):
    found.append("the number of steps")
  prints = [arm.summary.get("fingerprints") or {} for arm in (x, y)]
  if prints[0].get("data") != prints[1].get("data") or len({a.config.get("train.eval_tokens") for a in (x, y)}) > 1:
    found.append("the data")
  other = _base(x) != _base(y) or (_plain(x) and _plain(y) and prints[0].get("base") != prints[1].get("base"))
  if not found and x.base is not None and y.base is not None and not _quantised(x, y):
    other |= abs(x.base - y.base) > CLOSE * max(abs(x.base), abs(y.base))
  return [*found, "the base"] if other else found


def _base(arm: Arm) -> dict:
  """What the run says of its base, without the time it took and where it lies."""
  facts = arm.summary.get("base") or {}
  return {key: value for key, value in facts.items() if key not in ("seconds", "source")}


def _quantised(*arms: Arm) -> bool:
  """Whether an arm holds the base in fewer bits, which changes its loss and its bytes."""
  return any(arm.config.get("lora.quant") for arm in arms)


def _plain(arm: Arm) -> bool:
  """Whether the arm's frozen arrays are the base's: nothing of its own among them, and none trained instead."""
  return arm.method in ("lora", "rslora", "loraplus", "dora", "frozen") and not _quantised(arm) \
    and arm.config.get("lora.bias") in (None, "none") and not arm.config.get("lora.train_modules")
