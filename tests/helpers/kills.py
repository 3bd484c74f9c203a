"""SIGKILL at named places and at random moments of a command, and the comparison of what it does when it is resumed."""

import csv
import json
import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from forked import start_command
from runs import curve

FAST = ("seconds_compile", "seconds_train", "seconds_total", "tokens_per_s", "peak_memory_bytes", "run")  # and paths


@dataclass(frozen=True)
class Place:
  """A place in the program: a file operation (an audit event) on a path that `pattern` matches, or half a line.

  The process is killed before the operation.
  """

  name: str
  event: str
  pattern: str = ""

  def arm(self, count: int) -> None:
    """Makes this process kill itself at the place, when it comes there for the `count`-th time."""
    if self.event in HALF_LINES:
      HALF_LINES[self.event](count)
      return
    seen = 0

    def hook(event: str, args: tuple) -> None:
      nonlocal seen
      if event == self.event and re.search(self.pattern, " ".join(map(str, args[:2]))):
        seen += 1
        if seen == count:
          os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@dataclass(frozen=True)
class Armed:
  """`Place.arm` with its count, as an object that can be sent to the process."""

  place: Place
  count: int

  def __call__(self) -> None:
    self.place.arm(self.count)


def _half_metrics_line(count: int) -> None:
  """Kills this process in the middle of line `count` of metrics.jsonl."""
  from lora_exp.train.evaluating.metrics_file import MetricsFile

  log, seen = MetricsFile.log, []

  def log_or_die(self, row: dict) -> None:
    seen.append(row)
    if len(seen) == count:
      self.file.write(json.dumps({"step": row["step"], "tokens": 1})[:-5])
      self.file.flush()
      os.kill(os.getpid(), signal.SIGKILL)
    log(self, row)

  MetricsFile.log = log_or_die


def _half_ledger_line(count: int) -> None:
  """Kills this process in the middle of line `count` of sweep.jsonl."""
  from lora_exp.sweep.ledger import Ledger

  add, seen = Ledger.add, []

  def add_or_die(self, event: str, **facts) -> None:
    seen.append(event)
    if len(seen) == count:
      with self.path.open("a") as file:
        file.write(json.dumps({"event": event, **facts})[:-3])
      os.kill(os.getpid(), signal.SIGKILL)
    add(self, event, **facts)

  Ledger.add = add_or_die


HALF_LINES = {"half a line of metrics.jsonl": _half_metrics_line, "half a line of sweep.jsonl": _half_ledger_line}
STEP = r"checkpoints/(tmp\.)?\d+"
SAVING = [
  Place("before the write of a checkpoint", "os.mkdir", r"checkpoints/tmp\.\d+ "),
  Place("before its arrays", "os.mkdir", r"checkpoints/tmp\.\d+/state"),
  Place("between its arrays and its metadata", "open", r"checkpoints/tmp\.\d+/meta\.json w"),
  Place("before its checksums", "open", r"checkpoints/tmp\.\d+/SHA256SUMS w"),
  Place("before its commit", "os.rename", r"checkpoints/tmp\.\d+ .*checkpoints/\d+$"),
  Place("after its commit", "os.rename", r"checkpoints/\d+ .*checkpoints/tmp\.old"),
  Place("before the deletion of an old one", "shutil.rmtree", r"checkpoints/tmp\.old"),
  Place("in the deletion of an old one", "os.rmdir", r"^(ocdbt|state|d|array_metadatas) "),
  Place("in a line of metrics.jsonl", "half a line of metrics.jsonl"),
]
FINISHING = [
  Place("before the adapter", "open", r"/\.?adapter.*adapter_model|adapter_model\.safetensors"),
  Place("before summary.json", "open", r"/\.summary\.json\.tmp w"),
  Place("at the commit of summary.json", "os.rename", r"summary\.json"),
]
LEDGER = [Place("in a line of sweep.jsonl", "half a line of sweep.jsonl")]
ROWS = [
  Place("before the rows", "os.mkdir", r"cache/rows/\.\w+\.tmp"),
  Place("while rows are made", "open", r"cache/rows/\.\w+\.tmp/.* w"),
  Place("before the commit of the rows", "os.rename", r"cache/rows/\.\w+\.tmp"),
]
BASE = [
  Place("before the base", "os.mkdir", r"cache/base/\.\w+\.tmp "),
  Place("before the files of the base", "os.mkdir", r"cache/base/\.\w+\.tmp/"),
  Place("in the files of the base", "open", r"cache/base/\.\w+\.tmp/.* w"),
  Place("before the commit of the base", "os.rename", r"cache/base/\.\w+\.tmp"),
]


@dataclass
class Count:
  """What was counted over the kills of one kind of command."""

  kills: int = 0
  losses: int = 0  # compared
  differing: int = 0
  failed: list[int] = field(default_factory=list)  # exit codes of commands that did not go on
  places: Counter[str] = field(default_factory=Counter)

  def row(self, name: str) -> dict[str, object]:
    """A row of the table of full counts."""
    return {"fault": f"SIGKILL: {name}", "count": self.kills, "losses compared": self.losses,
            "differing": self.differing, "failed": len(self.failed)}  # fmt: skip


@dataclass(frozen=True)
class Command:
  """A command that is killed and repeated. `start` begins it in a directory, `repeat` goes on with it."""

  start: Callable[[Path, Path], list[str]]  # directory, cache
  repeat: Callable[[Path, Path], list[str]]
  places: Sequence[Place]
  lines: int  # in the metrics.jsonl of all its runs, at its end
  visits: Sequence[int] = (1, 1, 2, 3)  # it is killed at one of these visits of a place

  def argv(self, directory: Path, cache: Path) -> list[str]:
    """The command to type next."""
    return (self.repeat if (directory / "config.yaml").is_file() else self.start)(directory, cache)


def run_killed(command: Command, directory: Path, cache: Path, kills: int, moments: random.Random) -> Count:
  """Kills the command `kills` times, at places and at random moments by turns, and then lets it end.

  A command that ends before its kill is left as it is.
  """
  count, output = Count(), directory.with_suffix(".log")
  for number in range(kills):
    place = moments.choice(command.places) if number % 2 == 0 else None
    armed = None if place is None else Armed(place, moments.choice(command.visits))
    process = start_command(command.argv(directory, cache), output, armed)
    if place is None:
      _kill_at_random(process, directory, command.lines, moments)
    process.join()
    if process.exitcode == -signal.SIGKILL:
      count.kills += 1
      count.places[place.name if place else "at a random moment"] += 1
    elif process.exitcode != 0:
      count.failed.append(process.exitcode)
  process = start_command(command.argv(directory, cache), output)
  process.join()
  count.failed += [process.exitcode] if process.exitcode else []
  return count


def _kill_at_random(process: ForkServerProcess, directory: Path, lines: int, moments: random.Random) -> None:
  """Kills the process in its first seconds, or after a random line of a metrics.jsonl, if it does not end before."""
  early, line, pause = moments.random() < 0.2, moments.randrange(lines), moments.uniform(0, 0.1)
  process.join(moments.uniform(0, 8) if early else 0)
  while not early and process.exitcode is None and metrics_lines(directory) < line:
    process.join(0.02)
  process.join(pause)
  process.kill()


def metrics_lines(directory: Path) -> int:
  """The lines in metrics.jsonl of a run, or of all runs of a sweep."""
  return sum(file.read_bytes().count(b"\n") for file in directory.glob("**/metrics.jsonl"))


def compare(unbroken: Path, killed: Path, count: Count) -> None:
  """Compares all losses and adapters of a run, or of the runs of a sweep, and the sweep's results.csv and ledger."""
  for metrics in sorted(unbroken.glob("**/metrics.jsonl")):
    name = metrics.parent.relative_to(unbroken)
    expected, found = curve(unbroken / name), curve(killed / name)
    count.losses += len(expected)
    count.differing += sum(a != b for a, b in zip(expected, found, strict=False)) + abs(len(expected) - len(found))
    adapter = name / "adapter" / "adapter_model.safetensors"
    if (unbroken / adapter).is_file():
      count.differing += (unbroken / adapter).read_bytes() != (killed / adapter).read_bytes()
  if (unbroken / "sweep.jsonl").is_file():
    count.differing += _results(unbroken) != _results(killed)
    count.differing += _ends(unbroken) != _ends(killed)


def _results(sweep: Path) -> list[dict[str, str]]:
  """results.csv without times and paths."""
  with open(sweep / "results.csv", encoding="utf-8") as file:
    return [{key: value for key, value in row.items() if key not in FAST} for row in csv.DictReader(file)]


def _ends(sweep: Path) -> list[tuple[str, int]]:
  """The events that end a trial, in the order of the trials; each trial has one."""
  rows = [json.loads(line) for line in (sweep / "sweep.jsonl").read_text().splitlines()]
  return sorted((row["event"], row["trial"]) for row in rows if row["event"] in ("done", "failed", "pruned"))


def shared_programs(cache: Path, programs: Path) -> Path:
  """An empty cache whose compiled programs are in `programs`."""
  cache.mkdir(parents=True)
  programs.mkdir(parents=True, exist_ok=True)
  (cache / "programs").symlink_to(programs)
  return cache
