"""The part `startup`: seconds from a command to a config error, to the imported program, and to its first step.

Each runs in a separate process before this one uses the devices, because two processes cannot share a GPU's memory.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lora_exp.config import Config, LoraExpError
from lora_exp.runtime.run_files import METRICS_FILE
from lora_exp.train.benchmarks.bench_rows import Row
from lora_exp.train.benchmarks.turns import spread

STARTUP = "startup"
ROWS = "rows"  # directory of tokenised data in the cache
MOST_TURNS = 3  # of the processes that take a second
WARM = 2  # commands with the programs that the first one compiled
MOST_SECONDS = 600.0  # until the first step
QUIET = ("train.steps=2", "train.log_every=1", "train.resume=null", "logger=none", "sample=none")
REPLACED = ("task", "out", "cache", "hydra.run.dir", "run")  # overrides of the bench that its commands do not repeat


def measure_startup(cfg: Config, typed: Sequence[str]) -> list[Row]:
  """The rows of the part, for a training command with the overrides `typed`."""
  commands = {"error": (["-m", "lora_exp", "lora.rank=none"], 2), "import": (["-c", "import lora_exp.tasks.train"], 0)}
  times: dict[str, list[float]] = {name: [] for name in commands}
  for _ in range(min(cfg.bench.turns, MOST_TURNS)):
    for name, (arguments, code) in commands.items():
      times[name].append(_finished(arguments, code))
  with tempfile.TemporaryDirectory() as directory:
    root = Path(directory)
    (root / "cache").mkdir()
    rows = Path(cfg.cache).expanduser() / ROWS
    if rows.is_dir():
      (root / "cache" / ROWS).symlink_to(rows.resolve())
    cold, *warm = [_first_step(_training(cfg, typed, root, number), root / str(number)) for number in range(1 + WARM)]
  return [
    Row(STARTUP, "config_error_seconds", "config error, s", spread(times["error"])),
    Row(STARTUP, "import_seconds", "import of the program, s", spread(times["import"])),
    Row(STARTUP, "first_step_cold_seconds", "first step, nothing compiled, s", cold),
    Row(STARTUP, "first_step_warm_seconds", "first step, programs compiled, s", spread(warm)),
  ]


def _training(cfg: Config, typed: Sequence[str], root: Path, number: int) -> list[str]:
  """The arguments of a training command that writes below `root`."""
  changed = [*QUIET, f"cache={root / 'cache'}", f"hydra.run.dir={root / str(number)}"]
  if cfg.model.base == "pretrain":
    changed.append("model.base=random")
  keys = {_key(text) for text in changed}
  repeated = [text for text in typed if not _key(text).startswith("bench.") and _key(text) not in {*REPLACED, *keys}]
  return ["-m", "lora_exp", *repeated, *changed]


def _key(override: str) -> str:
  """The key of an override, without a leading +."""
  return override.partition("=")[0].lstrip("+")


def _environment() -> dict[str, str]:
  """The environment of the processes, which import this package from where this process did."""
  package = str(Path(__file__).resolve().parents[3])
  return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def _finished(arguments: Sequence[str], code: int) -> float:
  """Seconds that a command takes. Raises LoraExpError if it does not end with the exit code `code`."""
  began = time.perf_counter()
  command = [sys.executable, *arguments]
  done = subprocess.run(command, env=_environment(), capture_output=True, text=True)  # noqa: S603
  seconds = time.perf_counter() - began
  if done.returncode != code:
    raise LoraExpError(f"{' '.join(arguments)} ended with exit code {done.returncode}: {_last_line(done.stderr)}")
  return seconds


def _first_step(arguments: Sequence[str], run_dir: Path) -> float:
  """Seconds until a training command has logged its first step; then it is killed.

  Raises LoraExpError if it ends before, or if it takes longer than MOST_SECONDS.
  """
  log = run_dir.with_suffix(".log")
  began = time.perf_counter()
  with log.open("w") as output, subprocess.Popen(  # noqa: S603
    [sys.executable, *arguments], env=_environment(), stdout=output, stderr=output
  ) as process:
    try:
      while not _has_step(run_dir / METRICS_FILE):
        if process.poll() is not None or time.perf_counter() - began > MOST_SECONDS:
          raise LoraExpError(f"a training command did not reach its first step: {_last_line(log.read_text())}")
        time.sleep(0.01)
      return time.perf_counter() - began
    finally:
      process.kill()


def _has_step(metrics: Path) -> bool:
  """Whether the file has a line of a training step."""
  return metrics.is_file() and '"split": "train"' in metrics.read_text()


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or ["no message"])[-1]
