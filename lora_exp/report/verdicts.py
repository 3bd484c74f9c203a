"""Which of several settings is enough: the cheapest that is not measurably worse than the best."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.report.groups import Setting, Study, say, word
from lora_exp.report.statistics import Difference, difference

SEEDS_NEEDED = 3
VALUES_NEEDED = 3  # of a rate, where each setting was tried at its own
TOLERANCE = 0.02  # of the best setting's gain: a smaller difference is none in practice
NOISE = 0.25  # of that gain: where a difference as large cannot be excluded, nothing is said
# What is tuned, as a rate is: settings are compared at their own best of these.
TUNED = ("optim.", "lora.alpha", "lora.lr_ratio", "lora.dropout", "lora.init_std", "train.batch_size")
TEST = (f"the 95 % interval of the difference over seeds (Student's t, paired where both have the seeds) reaches 0, or "
        f"the difference is at most {TOLERANCE * 100:g} % of the best one's gain; each comparison for itself")


@dataclass
class Verdict:
  """What a comparison came to."""

  best: Setting
  chosen: Setting  # the cheapest that is not measurably worse
  against: list[tuple[Setting, Difference]]  # every other setting, and how much higher its loss is than the best one's
  tolerance: float  # nats
  doubts: list[str]  # why nothing is concluded
  left_out: list[Setting]  # with fewer than three seeds

  def to_best(self, setting: Setting) -> Difference | None:
    """How much higher its loss is than that of the best; None for the best itself."""
    return next((d for s, d in self.against if s is setting), None)


def is_tuned(key: str) -> bool:
  return key.startswith(TUNED)


def not_worse(d: Difference, tolerance: float) -> bool:
  """Whether the interval of `d` reaches 0, or `d` is at most the tolerance."""
  return d.mean <= tolerance or (d.half is not None and d.low <= 0)


def contexts(study: Study, key: str, apart_from: Iterable[str] = ()) -> list[tuple[str, list[Setting]]]:
  """(words, settings) for each combination of what is neither `key`, nor tuned, nor in `apart_from`."""
  held = [k for k in study.keys if k != key and not is_tuned(k) and k not in set(apart_from)]
  found: dict[tuple, list[Setting]] = {}
  for setting in study.adapted:
    if key in setting.values:
      found.setdefault(tuple((k, setting.values.get(k)) for k in held), []).append(setting)
  words = lambda at: ", ".join(say(k, v) for k, v in at if v is not None)
  return [(words(at), settings) for at, settings in found.items() if len({s.values[key] for s in settings}) > 1]


def best_of(settings: Iterable[Setting]) -> Setting:
  """The lowest mean loss among those with the most seeds (three are the most that is asked)."""
  settings = list(settings)
  most = min(SEEDS_NEEDED, max(s.seeds for s in settings))
  return min((s for s in settings if s.seeds >= most), key=lambda s: s.loss.mean)


def best_by(settings: Iterable[Setting], key: str) -> dict[Any, Setting]:
  """Value of `key` -> its best setting, in the order of the values."""
  groups: dict[Any, list[Setting]] = {}
  for setting in settings:
    groups.setdefault(setting.values[key], []).append(setting)
  order = sorted(groups, key=lambda v: (isinstance(v, str), v))
  return {value: best_of(groups[value]) for value in order}


def tolerance_of(settings: Sequence[Setting]) -> float:
  """TOLERANCE of the gain of the best setting."""
  gain = best_of(settings).gain.mean
  return TOLERANCE * gain if gain > 0 else 0.0


def enough(study: Study, settings: Sequence[Setting], cost: Callable[[Setting], float], key: str) -> Verdict:
  """The cheapest of `settings` that is not measurably worse than the best, and what speaks against saying so.

  `settings` are the best ones for each value of `key`; what else is tuned must not be best on an edge.
  """
  tolerance = tolerance_of(settings)
  doubts = []
  tested = [s for s in settings if s.seeds >= SEEDS_NEEDED]
  if short := [s for s in settings if s.seeds < SEEDS_NEEDED]:
    least = min(s.loss.mean for s in tested) if tested else math.inf
    if len(tested) < 2 or any(s.loss.mean < least - tolerance for s in short):
      doubts.append(f"{_few(short)}, and three are needed")
      tested = list(settings)
  best = best_of(tested)
  against = [(s, difference(s.losses, best.losses)) for s in tested if s is not best]
  passed = [best, *(s for s, d in against if not_worse(d, tolerance))]
  chosen = min(passed, key=cost)
  gain = best.gain.mean
  noisy = next((d for s, d in against if s is chosen and d.half is not None and d.high > NOISE * gain > 0), None)
  if noisy and noisy.mean > tolerance:
    doubts.append(f"the seeds scatter too much: {chosen.label} may be worse than {best.label} by {noisy.high:.4f}, "
                  f"which is {noisy.high / gain * 100:.0f} % of the gain")
  if best.gain.n and gain <= 0:
    doubts.append(f"no setting is better than the base ({best.label} is the best, "
                  f"{best.gain.text(sign=True)} below it)")
  doubts += [edge for s in settings for edge in edges(study, s, tolerance, key)]
  doubts += untuned(study, settings, key)
  return Verdict(best, chosen, against, tolerance, doubts, [s for s in settings if s not in tested])


def _few(settings: Sequence[Setting]) -> str:
  counts = sorted({s.seeds for s in settings})
  number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
  plural = "" if counts == [1] else "s"
  if len(settings) <= 3:
    return f"{' and '.join(s.label for s in settings)} {'has' if len(settings) == 1 else 'have'} {number} seed{plural}"
  return f"{len(settings)} of the settings have {number} seed{plural}"


def untuned(study: Study, settings: Sequence[Setting], apart_from: str) -> list[str]:
  """Where settings were tried at other rates (or other tuned numbers) each, and some at too few to find their best."""
  found = []
  for key in (k for k in study.keys if is_tuned(k) and k != apart_from):
    tried = [(s, {repr(t.values[key]) for t in _line(study, s, key)}) for s in settings if key in s.values]
    least = min(tried, key=lambda pair: len(pair[1]), default=None)
    if least and len(least[1]) < VALUES_NEEDED and any(values != least[1] for _, values in tried):
      found.append(f"each was tried at its own values of {word(key)}, which were as few as {len(least[1])}, and "
                   f"{VALUES_NEEDED} are needed to find a best one")  # fmt: skip
  return found


def _line(study: Study, setting: Setting, key: str) -> list[Setting]:
  """The settings that differ from `setting` in `key` at most."""
  rest = lambda s: {k: v for k, v in s.values.items() if k != key}
  return [s for s in study.settings if key in s.values and rest(s) == rest(setting)]


def edges(study: Study, setting: Setting, tolerance: float = 0.0, apart_from: str = "") -> list[str]:
  """Where the best rate (or another tuned number) lies on the edge of what was tried, and still improves there.

  A neighbour within the tolerance is no matter: the curve is flat, and going on would gain less again.
  """
  found = []
  for key in (k for k in setting.values if is_tuned(k) and k != apart_from):
    value = setting.values[key]
    line = _line(study, setting, key)
    numeric = sorted({s.values[key] for s in line if isinstance(s.values[key], int | float)})
    if len(numeric) < 2 or value not in (numeric[0], numeric[-1]):
      continue
    inner = numeric[1] if value == numeric[0] else numeric[-2]
    neighbour = next(s for s in line if s.values[key] == inner)
    rest = setting.label if len(setting.values) == 1 else ", ".join(
      say(k, v) for k, v in setting.values.items() if k != key)
    if not neighbour.seeds or neighbour.loss.mean - setting.loss.mean > tolerance:
      end = "lowest" if value == numeric[0] else "highest"
      found.append(f"the best {say(key, value).rpartition(' ')[0]} of {rest} is the {end} tried ({say(key, value)})")
  return found
