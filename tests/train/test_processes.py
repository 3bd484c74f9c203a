"""Two processes train one run: the losses and files of one process, and clear errors when they do not fit."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from runs import TINY, command, curve, environment, everything, on_stories, resume, summary, train

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError
from lora_exp.runtime.checksums import damage
from lora_exp.train.records import checkpoint

SHORT = [*TINY, "train.steps=4", "train.eval_every=2", "train.save_every=2", "train.eval_tokens=500"]


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return int(listener.getsockname()[1])


def start(index: int, port: int, *argv: str, count: int = 2) -> subprocess.Popen:
  """Starts one of `count` processes of a run."""
  values = {"coordinator": f"localhost:{port}", "processes": count, "process": index}
  group = [f"distributed.{name}={value}" for name, value in values.items()]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command(*group, *argv), env=environment(), **pipes)


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
  """The exit code, output and errors of each process."""
  outputs = [process.communicate(timeout=300) for process in processes]
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def assert_equal_curves(some: list[dict], others: list[dict]) -> None:
  assert len(some) == len(others)
  for row, other in zip(some, others, strict=True):
    assert row["split"] == other["split"] and row.keys() == other.keys()
    numbers, expected = ({name: x for name, x in values.items() if name != "split"} for values in (row, other))
    assert numbers == pytest.approx(expected, rel=1e-5)


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
  """Waits until a run has logged that many steps."""
  file, until = run / "metrics.jsonl", time.monotonic() + 240
  while not file.is_file() or file.read_text().count('"train"') < count:
    assert process.poll() is None and time.monotonic() < until, process.stderr.read()
    time.sleep(0.02)


def pair(*argv: str) -> list[subprocess.Popen]:
  port = free_port()
  return [start(index, port, *argv) for index in range(2)]


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on(tmp_path):
  settings = [*SHORT, *on_stories(tmp_path), "train.steps=200", "train.eval_every=50", "train.save_every=50"]
  run = tmp_path / "two"
  processes = pair(*settings, f"hydra.run.dir={run}", "mesh.fsdp=2")
  wait_for_steps(run, 3, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  first, second = finish(*processes)
  assert (first[0], second[0]) == (75, 75), (first, second)
  assert "stopped after step" in first[2] and "lora_exp" not in second[1]
  resume(run, "mesh.fsdp=1")  # in this process
  alone = train(tmp_path / "alone", *settings)
  assert_equal_curves(curve(run), curve(alone))
  names = {path.relative_to(alone) for path in everything(alone) if "checkpoints" not in path.parts}
  assert {path.relative_to(run) for path in everything(run) if "checkpoints" not in path.parts} == names


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
  run = tmp_path / "run"
  settings = [*SHORT, *on_stories(tmp_path), "train.steps=400", "train.eval_every=200", "train.save_every=2"]
  processes = pair(*settings, f"hydra.run.dir={run}")
  wait_for_steps(run, 5, processes[0])
  processes[1].kill()
  [(code, _, errors)] = finish(processes[0])
  assert code == 75 and "another process of the run has ended" in errors and "Traceback" not in errors
  assert summary(run)["status"] == "stopped"
  steps = checkpoint.steps(run)
  assert len(steps) == 2 and not any(damage(run / "checkpoints" / str(step)) for step in steps)


def test_a_coordinator_that_is_not_reached_is_an_error(tmp_path):
  settings = [*SHORT, f"hydra.run.dir={tmp_path / 'run'}", "distributed.timeout=1"]
  [(code, _, errors)] = finish(start(1, free_port(), *settings))
  assert code == 2 and errors.count("error: ") == 1
  assert "process 0 was not reached within distributed.timeout=1 s" in errors
  assert not (tmp_path / "run").exists()


def test_processes_with_different_settings_are_refused(tmp_path):
  port, out = free_port(), f"hydra.run.dir={tmp_path / 'run'}"
  first, second = finish(start(0, port, *SHORT, out), start(1, port, *SHORT, out, "optim.lr=0.5"))
  assert (first[0], second[0]) == (2, 2)
  assert "processes 0 and 1 were started with different settings (optim.lr=0.005 and 0.5)" in first[2]
  assert "error" not in second[2] and not (tmp_path / "run").exists()  # it is said once


@pytest.mark.parametrize(("settings", "problem"), [
  (["distributed.processes=2"], "needs distributed.coordinator=HOST:PORT"),
  (["distributed.coordinator=10.0.0.1"], "must be HOST:PORT of process 0, or auto"),
  (["distributed.coordinator=10.0.0.1:99999"], "the port must be from 1 to 65535"),
  (['distributed.coordinator="[::1]:0"'], "the port must be from 1 to 65535"),
  (["distributed.coordinator=a:1", "distributed.processes=2", "distributed.process=2"], "must be below"),
  (["distributed.coordinator=auto", "task=evaluate"], "only task=train runs in several processes"),
  (["distributed.coordinator=auto", "-m", "lora.rank=1,2"], "several processes can train a single run"),
])  # fmt: skip
def test_settings_of_processes_are_checked(settings, problem):
  with pytest.raises(InputError) as error:
    check_command_line([*TINY, *settings])
  assert problem in str(error.value)
