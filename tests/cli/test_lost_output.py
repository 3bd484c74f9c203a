"""A run goes on to its end whatever happens to what it prints: real processes, whose output is closed or not read."""

import fcntl
import json
import os
import shlex
import subprocess
import sys

import pytest
from runs import TINY, command, environment, on_stories

NAME = "my run, a=1"
SMALL_PIPE = 4096  # bytes
STEPS = ["train.steps=3", "train.batch_size=4", "train.eval_every=3", "train.save_every=3", "data.seq_len=32"]


def shell(line: str, directory, **variables: str) -> subprocess.CompletedProcess[str]:
  """Runs a line of bash, whose exit code is that of the first command of a pipeline."""
  return subprocess.run(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], cwd=directory, text=True,
                        capture_output=True, env=environment() | variables)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  """A run whose output goes to `head -1`, in an encoding with 128 characters."""
  directory = tmp_path_factory.mktemp("lost")
  argv = command(f'hydra.run.dir="{NAME}"', *TINY, *on_stories(directory), *STEPS)
  done = shell(f"{shlex.join(argv)} 2>&1 | head -1", directory, PYTHONIOENCODING="ascii")
  assert done.returncode == 0, done
  assert done.stdout.startswith(("Device: ", "load the program")) and len(done.stdout.splitlines()) == 1
  return directory / NAME


def test_a_run_whose_reader_leaves_is_complete(run_dir):
  assert json.loads((run_dir / "summary.json").read_text())["status"] == "done"
  assert (run_dir / "checkpoints" / "3" / "SHA256SUMS").is_file()
  assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()


def test_the_log_of_a_run_has_what_the_terminal_shows(run_dir):
  log = (run_dir / "lora_exp.log").read_text(encoding="utf-8")
  for text in ("Device: ", "Adapted modules (6)", "32×32", "\nResult\n", "Use it: python -m lora_exp task=generate"):
    assert text in log
  assert "\x1b" not in log


def test_generation_whose_reader_leaves_ends_quietly(run_dir):
  """The command is the one that the run advises, as it is pasted."""
  advised = (run_dir / "lora_exp.log").read_text(encoding="utf-8").split("Use it: python ")[1].splitlines()[0]
  assert "'run=\"" in advised
  done = shell(f"{sys.executable} {advised} sample.max_tokens=3 | true", run_dir.parent)
  assert (done.returncode, done.stdout) == (0, "")
  assert "Traceback" not in done.stderr and "Error" not in done.stderr


@pytest.mark.slow
def test_a_sweep_whose_reader_never_reads_ends(tmp_path):
  argv = command("-m", "lora.rank=1,2", "hydra.sweep.dir=sweep", "hydra/launcher=packed", *TINY, *on_stories(tmp_path),
                 *STEPS)
  reader, writer = os.pipe()
  os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALL_PIPE)))  # full before it begins
  done = subprocess.run(argv, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, env=environment())
  for descriptor in (reader, writer):
    os.close(descriptor)
  assert done.returncode == 0, done.stderr
  assert b"INFO" not in done.stderr  # the log is not printed too
  events = [json.loads(line)["event"] for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
  assert events.count("done") == 2
  log = (tmp_path / "sweep" / "lora_exp.log").read_text()
  assert "run 1: " in log and "Report: " in log
