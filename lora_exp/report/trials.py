"""The trials of a sweep as its directory holds them; a missing or failed one is a trial too, with its reason."""

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from lora_exp.config import InputError
from lora_exp.config.schema import EXAMPLES
from lora_exp.runtime.spectrum import Facts
from lora_exp.train.logger import read_metrics

SEEDS = ("train.seed", "data.seed", "model.seed")
TABLES = ("lora.rank_pattern", "lora.alpha_pattern", "model.arch.rope_scaling")  # settings whose value is a mapping
LOGS = ("lora_exp.log",)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it was built


@dataclass
class TrialRecord:
  """One run of the sweep."""

  number: int
  path: str  # relative to the sweep
  status: str  # done | pruned | stopped | diverged | failed | unfinished | missing
  reason: str | None = None  # why it is not done, or not counted
  config: dict[str, Any] = field(default_factory=dict)  # by dotted path
  summary: dict[str, Any] = field(default_factory=dict)
  metrics: list[dict] = field(default_factory=list)
  learned: list[Facts] = field(default_factory=list)  # of each module; none where there is no adapter to read

  def __str__(self) -> str:
    return str(self.number)

  def number_at(self, *path: str) -> float | None:
    """The number at `path` of summary.json; None if there is none, or it is not finite."""
    node: Any = self.summary
    for name in path:
      node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, int | float) and not isinstance(node, bool) and math.isfinite(node) else None

  def learned_mean(self, name: str) -> float | None:
    """The mean over modules of a field of Facts."""
    found = [value for f in self.learned if (value := getattr(f, name)) is not None]
    return sum(found) / len(found) if found else None

  @property
  def method(self) -> str | None:
    """What trained it, in the name that people use."""
    return method_name(self.config) if self.config else None

  @property
  def base(self) -> float | None:
    """Held-out loss before training."""
    return self.number_at("losses", "base")

  @property
  def outcome(self) -> float | None:
    """The held-out loss that counts: of the exported state, the best one by default; of a frozen base its own."""
    if self.config.get("lora.method") == "frozen":
      return self.base
    return self.number_at("losses", "final" if self.config.get("train.export") == "last" else "best")

  @property
  def loss(self) -> float | None:
    """`outcome` of a trial that is done; None for any other, which no mean may hold."""
    return self.outcome if self.status == "done" else None

  @property
  def trainable(self) -> int | None:
    found = self.number_at("parameters", "trainable")
    return None if found is None else int(found)

  @property
  def seeds(self) -> tuple:
    """Values of SEEDS: trials that agree in all of them saw the same rows in the same order."""
    return tuple(self.config.get(key) for key in SEEDS)

  @property
  def numbers(self) -> bool:
    """Whether its data is examples of numbers, and its loss not in nats a token."""
    return self.config.get("data.source") in EXAMPLES

  @cached_property
  def curves(self) -> dict[str, list[tuple[int, float]]]:
    """Split -> (step, loss), without losses that are no numbers."""
    found: dict[str, list[tuple[int, float]]] = {"train": [], "eval": [], "retain": []}
    for row in self.metrics:
      loss = row.get("loss")
      if row.get("split") in found and isinstance(loss, int | float) and math.isfinite(loss):
        found[row["split"]].append((row["step"], loss))
    return found


def read_sweep(directory: Path) -> list[TrialRecord]:
  """Every trial of the sweep in `directory`, by number; a number that is left out is a trial that is missing.

  Raises InputError if it holds no run.
  """
  directory = Path(directory)
  folders = [path for path in sorted(directory.iterdir()) if path.is_dir() and _is_run(path)]
  if not folders:
    one = (directory / "config.yaml").is_file()
    raise InputError(f"run={directory}: " + (
      "is one run, and its picture is plots/loss.png; give the directory of a sweep" if one else
      "holds no runs (no folder 0, 1, …); give the directory of a sweep, as outputs/sweeps/DAY/TIME-NAME"))
  numbered = {int(path.name): path for path in folders if path.name.isdecimal()}
  named = [path for path in folders if not path.name.isdecimal()]
  count = max(numbered, default=-1) + 1
  trials = [read_trial(n, numbered[n]) if n in numbered else TrialRecord(n, str(n), "missing", "there is no such folder")
          for n in range(count)]
  return trials + [read_trial(count + n, path) for n, path in enumerate(named)]


def _is_run(path: Path) -> bool:
  return path.name.isdecimal() or any((path / name).exists() for name in ("config.yaml", "summary.json"))


def read_trial(number: int, path: Path) -> TrialRecord:
  """The trial in the directory `path`, as far as its files go."""
  problems: list[str] = []
  config = flat(_file(path / "config.yaml", partial(yaml.load, Loader=LOADER), problems))
  found = (path / "summary.json").is_file()
  summary = _file(path / "summary.json", json.loads, problems) if found else {}
  metrics: list[dict] = []
  if (path / "metrics.jsonl").is_file():
    try:
      metrics = [row for row in read_metrics(path) if isinstance(row.get("step"), int)]
    except InputError as error:
      problems.append(str(error).replace(f"{path}/", ""))
  status = str(summary.get("status", "failed"))
  trial = TrialRecord(number, path.name, status, None, config, summary, metrics)
  trial.reason = _reason(trial, path, problems)
  if not found and metrics and not logged_error(path):
    trial.status = "unfinished"
  elif status == "done" and not (config and summary):
    trial.status = "failed"
  return trial


def _file(path: Path, parse: Any, problems: list[str]) -> dict:
  """The mapping in a file; {} with a problem if there is none."""
  try:
    values = parse(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    problems.append(f"there is no {path.name}")
    return {}
  except (ValueError, yaml.YAMLError, OSError) as error:
    problems.append(f"{path.name} cannot be read ({type(error).__name__})")
    return {}
  if not isinstance(values, dict):
    problems.append(f"{path.name} holds no mapping")
    return {}
  return values


def _reason(trial: TrialRecord, path: Path, problems: list[str]) -> str | None:
  """Why the trial is not counted, or what is damaged in it."""
  last = max((row["step"] for row in trial.metrics), default=0)
  told = logged_error(path)
  if problems and trial.status in ("done", "failed"):
    return "; ".join([*([told] if told else []), *problems])
  if trial.status == "done":
    return None if trial.outcome is not None else "its held-out loss is not a finite number"
  if trial.status == "pruned":
    return str(trial.summary.get("reason"))
  if trial.status == "stopped":
    return f"stopped at step {last} of {trial.summary.get('steps', '?')}"
  if told:
    return told
  if trial.status == "diverged":
    return f"the loss was no finite number after step {last}"
  if not trial.summary:
    return f"there is no summary.json: killed, or still training, after step {last}"
  return "no error was logged"


def logged_error(path: Path) -> str | None:
  """The last error in the run's log, its first line, without the path of the sweep."""
  for file in (path / name for name in LOGS):
    if file.is_file():
      entries = re.split(r"^(?=\d{4}-\d\d-\d\d \S+ [A-Z]+ \S+: )", file.read_text("utf-8", "replace"), flags=re.M)
      errors = [lines for entry in entries if " ERROR " in (lines := entry.strip().splitlines() or [""])[0]]
      if errors:
        first, last = errors[-1][0].partition(" ERROR ")[2].partition(": ")[2], errors[-1][-1]
        said = f"a bug: {last}" if first == "bug" else first  # whose traceback ends with what it was
        return said.replace(f"{path.parent}/", "").strip()
  return None


def flat(node: dict, prefix: str = "") -> dict[str, Any]:
  """Nested settings by dotted path; lists become text, as a table shows them."""
  found: dict[str, Any] = {}
  for key, value in node.items():
    path = f"{prefix}{key}"
    if isinstance(value, dict) and path not in TABLES:
      found |= flat(value, f"{path}.")
    elif isinstance(value, list):
      found[path] = ",".join(map(str, value))
    else:
      found[path] = json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
  return found


def method_name(config: dict[str, Any]) -> str:
  """lora, dora, pissa, rslora, qlora, full, …: `lora.method`, told apart by the settings that make it another."""
  get = lambda key, default: default if config.get(f"lora.{key}") is None else config[f"lora.{key}"]
  method = str(get("method", "lora"))
  if method not in ("lora", "dora"):
    return method
  parts = [get("init", "kaiming")] if get("init", "kaiming") in ("pissa", "olora") else []
  parts += ["rslora"] * (get("scaling", "standard") == "rslora")
  parts += ["loraplus"] * (get("lr_ratio", 1.0) != 1)
  parts += ["qlora"] * bool(get("quant", None))
  return "+".join(([method] if method == "dora" else []) + parts) or "lora"
