"""Whether two settings can be compared: they need equal steps, data and base."""

from lora_exp.report.grouping.setting import Setting
from lora_exp.report.reading.run_record import RunRecord

CLOSE = 0.01  # relative: losses of one base on one held-out text, apart from how it was cut into batches


def apart(a: Setting, b: Setting) -> list[str]:
  """Why two settings cannot be compared; trials are held against each other where their data and base seeds agree."""
  pairs = [(x, y) for x in a.trials for y in b.trials if x.seeds[1:] == y.seeds[1:] and x.summary and y.summary]
  pairs = pairs or [(x, y) for x in a.trials for y in b.trials if x.summary and y.summary]
  return list({why: None for x, y in pairs for why in differences(x, y)})


def differences(x: RunRecord, y: RunRecord) -> list[str]:
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


def _base(trial: RunRecord) -> dict:
  """What the run says of its base, without the time it took and where it lies."""
  facts = trial.summary.get("base") or {}
  return {key: value for key, value in facts.items() if key not in ("seconds", "source")}


def _quantised(*trials: RunRecord) -> bool:
  """Whether a trial holds the base in fewer bits, which changes its loss and its bytes."""
  return any(trial.config.get("lora.quant") for trial in trials)


def _plain(trial: RunRecord) -> bool:
  """Whether the trial's frozen arrays are the base's: nothing of its own among them, and none trained instead."""
  return trial.method in ("lora", "rslora", "loraplus", "dora", "frozen") and not _quantised(trial) \
    and trial.config.get("lora.bias") in (None, "none") and not trial.config.get("lora.train_modules")
