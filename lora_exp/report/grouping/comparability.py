"""Whether two settings can be compared: they need equal steps, data, base and dtypes."""

from lora_exp.report.grouping.setting import Setting
from lora_exp.report.reading.run_record import RunRecord

DTYPES = ("model.dtype", "model.param_dtype")
CLOSE = 0.01  # relative difference of base losses that different batches of the same held-out text can cause


def incomparable(a: Setting, b: Setting) -> list[str]:
  """The reasons why two settings cannot be compared. Runs are matched by their data and base seeds."""
  pairs = [(x, y) for x in a.runs for y in b.runs if x.summary and y.summary]
  matched = [(x, y) for x, y in pairs if x.seeds[1:] == y.seeds[1:]]
  return list(dict.fromkeys(difference for x, y in matched or pairs for difference in _differences(x, y)))


def _differences(x: RunRecord, y: RunRecord) -> list[str]:
  """The differences of two runs in steps, data, base and dtypes."""
  differences = []
  trained = not (x.method.trains_nothing or y.method.trains_nothing)
  if trained and x.summary.get("steps") != y.summary.get("steps"):
    differences.append("the number of steps")
  same_rows = _fingerprint(x, "data") == _fingerprint(y, "data")
  if not same_rows or x.config.get("train.eval_tokens") != y.config.get("train.eval_tokens"):
    differences.append("the data")
  if _other_base(x, y, same_data=not differences):
    differences.append("the base")
  if any(x.config.get(key) != y.config.get(key) for key in DTYPES if key in x.config and key in y.config):
    differences.append("the dtypes")
  return differences


def _other_base(x: RunRecord, y: RunRecord, same_data: bool) -> bool:
  """Whether two runs started from different bases, according to their files."""
  if _base_facts(x) != _base_facts(y):
    return True
  if _has_plain_base(x) and _has_plain_base(y) and _fingerprint(x, "base") != _fingerprint(y, "base"):
    return True
  if not same_data or x.base_loss is None or y.base_loss is None or _is_quantised(x) or _is_quantised(y):
    return False
  return abs(x.base_loss - y.base_loss) > CLOSE * max(abs(x.base_loss), abs(y.base_loss))


def _fingerprint(run: RunRecord, name: str) -> object:
  return (run.summary.get("fingerprints") or {}).get(name)


def _base_facts(run: RunRecord) -> dict:
  """The facts about the base in summary.json, without times and paths."""
  facts = run.summary.get("base") or {}
  return {key: value for key, value in facts.items() if key not in ("seconds", "source")}


def _is_quantised(run: RunRecord) -> bool:
  """Whether the run quantised its base, which changes the base's loss and bytes."""
  return bool(run.config.get("lora.quant"))


def _has_plain_base(run: RunRecord) -> bool:
  """Whether the frozen arrays of the run are exactly those of the base: none is trained, and no constant is added."""
  method, settings = run.method, run.config
  return (
    (method.adapts_kernels or method.trains_nothing)
    and not method.has_constants
    and not _is_quantised(run)
    and settings.get("lora.bias") in (None, "none")
    and not settings.get("lora.train_modules")
  )
