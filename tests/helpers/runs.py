"""Complete runs for tests: training text, the command line, and the contents of a run directory."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from lora_exp.cli import main as entry

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "a", "little", "dog", "cat", "ran", "saw", "big", "red", "ball", "and", "was", "happy", "Tom", "Lily"]
QUIET = ["logger=none", "sample=none", "data@retain=none"]
TINY = ["model=minigpt_tiny", "model.layers=1", "model.width=32", "model.ff=32", *QUIET]
TEXT = "lora_exp_test_stories.txt"


def story(number: int) -> str:
  """Thirty words that depend on the number."""
  return " ".join(random.Random(number).choices(WORDS, k=30)).capitalize() + "."


def stories(file: Path, count: int = 60) -> Path:
  """A file in the format of TinyStories."""
  file.write_text("\n<|endoftext|>\n".join(map(story, range(count))), encoding="utf-8")
  return file


def on_stories(directory: Path) -> list[str]:
  """The overrides that train on a file of stories in `directory`."""
  file = directory / TEXT
  return ["data=text", f"data.path={file if file.exists() else stories(file)}"]


def train(run_dir: Path, *argv: str, code: int = 0) -> Path:
  """Runs the command line in this process, with `run_dir` for its directory, and checks its exit code."""
  assert entry.run([f"hydra.run.dir={run_dir}", *argv]) == code
  return run_dir


def resume(run_dir: Path, *argv: str, code: int = 0) -> None:
  """Resumes a run in this process."""
  assert entry.run([f"train.resume={run_dir}", *argv]) == code


def command(*argv: str) -> list[str]:
  """The command line as typed in a shell."""
  return [sys.executable, "-m", "lora_exp", *argv]


def environment(devices: int = 1) -> dict[str, str]:
  """The environment of a process that runs this checkout on `devices` virtual devices."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def process(*argv: str, cwd: Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
  """Runs the command line in a separate process."""
  env = environment(devices)
  return subprocess.run(command(*argv), cwd=cwd, env=env, text=True, capture_output=True, timeout=900)


def script_output(script: str, *args: str, devices: int = 8) -> str:
  """The last line that the Python `script` prints in a process with `devices` virtual devices."""
  env = environment(devices) | {"PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run([sys.executable, "-c", script, *args], env=env, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout.splitlines()[-1]


def rows(run_dir: Path, split: str | None = None) -> list[dict]:
  """The lines of metrics.jsonl, of one split or all."""
  found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
  return [row for row in found if split in (None, row["split"])]


def curve(run_dir: Path) -> list[dict]:
  """All lines of metrics.jsonl without times. Floats are read from their shortest exact representation."""
  return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows(run_dir)]


def summary(run_dir: Path) -> dict:
  return json.loads((run_dir / "summary.json").read_text())


def digest(arrays: dict[str, np.ndarray]) -> str:
  """SHA-256 over the sorted names, shapes, dtypes and bytes, implemented independently of the program."""
  total = hashlib.sha256()
  for name in sorted(arrays):
    x = np.ascontiguousarray(arrays[name])
    total.update(f"{name} {x.shape} {x.dtype}".encode() + x.tobytes())
  return total.hexdigest()


def everything(root: Path) -> set[Path]:
  """Every path under `root` except lock files, which are never deleted."""
  return {path for path in root.rglob("*") if not path.name.endswith(".lock")}


def cache() -> Path:
  """The cache shared by all tests of a session."""
  return Path(os.environ["LORA_EXP_CACHE"])
