"""Launchers report how each run ended, and continue an interrupted sweep."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from runs import ROOT, TINY, command, curve, environment, on_stories, process, summary

from lora_exp.cli import main as entry
from lora_exp.sweep.ledger import Ledger

SHORT = [*TINY, "train.steps=12", "train.eval_every=4", "train.save_every=4", "train.eval_tokens=512"]
NAN = ["optim=sgd", "optim.clip=null"]  # with which a rate of 1e38 diverges


def sweep(directory: Path, *argv: str, code: int = 0) -> Path:
  """A sweep in `directory`, its parent in this process."""
  assert entry.run(["-m", f"hydra.sweep.dir={directory}", *argv]) == code
  return directory


def events(directory: Path) -> list[tuple]:
  """(event, trial) of every line of the ledger."""
  rows = [json.loads(line) for line in (directory / "sweep.jsonl").read_text().splitlines()]
  return [(row["event"], row["trial"]) for row in rows if "trial" in row]


def written(directory: Path) -> dict[Path, int]:
  return {path: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}


# ---- the ledger


def test_concurrent_ledger_writes_keep_every_line(tmp_path):
  (tmp_path / "sweep.jsonl").write_text('{"event": "done", "trial": 0}\n{"event": "to')  # torn by one that died
  code = ("import sys; from pathlib import Path; from lora_exp.sweep.ledger import Ledger; "
          "ledger = Ledger(Path(sys.argv[1])); "
          "[ledger.add('failed', trial=n, reason=sys.argv[2] * 9999) for n in range(20)]")
  argv = [sys.executable, "-c", code, str(tmp_path)]
  for one in [subprocess.Popen([*argv, word], cwd=ROOT) for word in "abc"]:
    assert one.wait() == 0
  rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
  assert Counter(row["reason"] for row in rows[1:]) == {word * 9999: 20 for word in "abc"}
  assert Ledger(tmp_path).ended(0)


# ---- a launcher that is not installed

ALONE = """
import sys, lora_exp.cli.main as entry, hydra_plugins
hydra_plugins.__path__ = [path for path in hydra_plugins.__path__ if "_plugins" in path.split("/")]  # ours alone
print([entry.run(["-m", f"hydra/launcher={name}", "lora.rank=1,2"]) for name in sys.argv[1:]])
"""


def test_a_missing_launcher_package_is_an_early_error(tmp_path):
  names = {"joblib": "joblib", "ray": "ray", "submitit_slurm": "slurm", "packed_ray": "ray"}
  done = subprocess.run([sys.executable, "-c", ALONE, *names], cwd=tmp_path, env=environment(),
                        text=True, capture_output=True)  # fmt: skip
  assert done.stdout.strip() == "[2, 2, 2, 2]", done.stderr
  said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(said) == 4
  for line, (name, extra) in zip(said, names.items(), strict=True):
    assert line.startswith(f"error: hydra/launcher={name}: needs ") and line.endswith(f"'lora_exp[{extra}]'")
  assert list(tmp_path.iterdir()) == []


def test_a_ray_cluster_that_does_not_answer_is_one_sentence(in_tmp_path, capfd):
  pytest.importorskip("hydra_plugins.hydra_ray_launcher")
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]  # nobody's, once this is closed
  argv = ["-m", "hydra/launcher=ray", f"hydra.launcher.ray.init.address='127.0.0.1:{port}'", *SHORT, "lora.rank=1,2"]
  assert entry.run(argv) == 2
  assert capfd.readouterr().err.startswith(f"error: 127.0.0.1:{port}: the Ray cluster does not respond")
  assert list(in_tmp_path.iterdir()) == []


# ---- one run after another: hydra/launcher=basic


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
  """Two runs that are done, and one that failed."""
  directory = tmp_path_factory.mktemp("basic")
  argv = [*SHORT, *on_stories(directory), *NAN, "optim.lr=1e-3,1e38"]
  return sweep(directory / "sweep", *argv, code=1), argv


def test_the_same_command_trains_only_what_has_not_ended(basic, capfd):
  directory, argv = basic
  before, lines = written(directory), events(directory)
  sweep(directory, *argv, code=1)
  assert written(directory) == before and events(directory) == lines
  said = capfd.readouterr()
  assert "run 0: ended before" in said.out
  assert "warning: 1 of 2 runs failed\nerror: run 1 (optim.lr=1e+38): the loss is nan at step 2" in said.err


def test_runs_that_failed_are_repeated_if_asked(basic):
  directory, argv = basic
  before = written(directory)
  sweep(directory, *argv, "hydra.sweeper.repeat_failed=true", code=1)
  assert events(directory) == [("started", 0), ("done", 0), *[("started", 1), ("failed", 1)] * 2]
  changed = {path.parent.name for path, at in written(directory).items() if at != before[path]}
  assert changed == {"1"}


def test_another_command_is_refused_before_a_file_changes(basic, capfd):
  directory, argv = basic
  before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
  sweep(directory, *argv, "train.batch_size=4", code=2)
  assert "run 0 was started with another train.batch_size" in capfd.readouterr().err
  assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(basic, tmp_path, capfd):
  directory, argv = basic
  argv = [*argv[:-1], "optim.lr=1e-3"]
  sweep(tmp_path / "sweep", *argv, "train.stop_at=6", code=75)
  assert "1 of 1 runs stopped before the end; continue with the same command" in capfd.readouterr().err
  assert summary(tmp_path / "sweep" / "0")["status"] == "stopped"
  sweep(tmp_path / "sweep", *argv)
  assert curve(tmp_path / "sweep" / "0") == curve(directory / "0"), "as if it had not been stopped"


@pytest.mark.slow
def test_repeat_failed_repeats_only_failed_trials(tmp_path):
  argv = [*SHORT, *on_stories(tmp_path), *NAN, "optim.lr=1e-3,1e38,2e-3", "hydra/launcher=packed"]
  directory = sweep(tmp_path / "sweep", *argv, code=1)
  before = written(directory)
  sweep(directory, *argv, "hydra.sweeper.repeat_failed=true", code=1)
  assert [event for event, trial in events(directory) if trial == 1] == ["started", "failed", "repeated", "started",
                                                                     "failed"]  # fmt: skip
  assert {path.parent.name for path, at in written(directory).items() if at != before[path]} == {"1"}


# ---- processes of this machine: hydra/launcher=joblib


@pytest.mark.slow
def test_joblib_reports_a_failed_run_and_finishes_the_others(tmp_path):
  pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
  argv = ["-m", "hydra/launcher=joblib", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT, *on_stories(tmp_path),
          "lora.targets=mlp,no_such"]  # fmt: skip
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 1, done.stderr
  assert "warning: 1 of 2 runs failed\nerror: run 1 (lora.targets=no_such): lora.targets=no_such" in done.stderr
  assert "Traceback" not in done.stderr and "ConfigStore" not in done.stderr
  assert summary(tmp_path / "sweep" / "0")["status"] == "done"
  assert (tmp_path / "sweep" / "report.html").is_file()
  assert sorted(events(tmp_path / "sweep")) == [("done", 0), ("failed", 1), ("started", 0), ("started", 1)]


# ---- slow: a cluster, a queue, and processes that are killed

EIGHT = ["optim.lr=1e-3,2e-3,3e-3,1e38,4e-3,5e-3,6e-3,7e-3", *NAN]


def trainer(run_dir: Path) -> int | None:
  """The process that trains in `run_dir`: it holds the lock open."""
  for link in Path("/proc").glob("[0-9]*/fd/*"):
    try:
      if os.readlink(link) == str(run_dir / ".lock"):
        return int(link.parts[2])
    except OSError:
      continue
  return None


def kill_once(run_dir: Path, times: int = 1) -> threading.Thread:
  """Kills the process that trains in `run_dir`, `times` times, once its first steps are written."""

  def watch() -> None:
    killed: set[int] = set()
    deadline = time.monotonic() + 300
    while len(killed) < times and time.monotonic() < deadline:
      if (run_dir / "metrics.jsonl").is_file() and (pid := trainer(run_dir)) and pid not in killed:
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
      time.sleep(0.02)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  return thread


@pytest.fixture
def cluster(monkeypatch):
  """Two Ray nodes on this machine, a processor each; the head's address."""
  monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the nodes, where lora_exp is to be this one
  pytest.importorskip("hydra_plugins.hydra_ray_launcher")
  utils = pytest.importorskip("ray.cluster_utils")
  node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
  found = utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
  found.add_node(**node)
  yield found.address
  found.shutdown()


def on(address: str) -> list[str]:
  return ["hydra/launcher=ray", f"hydra.launcher.ray.init.address='{address}'"]


@pytest.mark.slow
def test_ray_on_two_nodes_reports_one_failure_of_eight_jobs(cluster, tmp_path):
  argv = ["-m", *on(cluster), f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT, *on_stories(tmp_path), *EIGHT]
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 1, done.stderr
  assert done.stderr.count("error: run 3 (optim.lr=1e+38): the loss is nan at step 2") == 1
  assert "warning: 1 of 8 runs failed" in done.stderr
  status = [summary(tmp_path / "sweep" / str(n))["status"] for n in range(8)]
  assert status == ["done"] * 3 + ["diverged"] + ["done"] * 4
  assert sum(event == "done" for event, _ in events(tmp_path / "sweep")) == 7
  assert "8 trials (7 done, 1 diverged)" in done.stdout


@pytest.mark.slow
def test_ray_reports_a_killed_process_and_resumes_it(cluster, tmp_path):
  directory = tmp_path / "sweep"
  argv = ["-m", *on(cluster), f"hydra.sweep.dir={directory}", "hydra.launcher.ray.remote.max_retries=0", *SHORT,
          *on_stories(tmp_path), "train.seed=0,1,2", "train.steps=100"]  # fmt: skip
  watch = kill_once(directory / "1")
  done = process(*argv, cwd=tmp_path)
  watch.join()
  assert done.returncode == 1, done.stderr
  assert "error: run 1 (train.seed=1): its process died: WorkerCrashedError" in done.stderr
  assert Counter(event for event, _ in events(directory)) == {"started": 3, "done": 2, "lost": 1}
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert Counter(events(directory))[("done", 1)] == 1 and Counter(events(directory))[("started", 0)] == 1


@pytest.mark.slow
def test_ray_restarts_a_killed_run_from_its_checkpoint(cluster, tmp_path):
  directory = tmp_path / "sweep"
  watch = kill_once(directory / "1")
  argv = [*SHORT, *on_stories(tmp_path), "train.seed=0,1", "train.steps=100"]
  done = process("-m", *on(cluster), f"hydra.sweep.dir={directory}", *argv, cwd=tmp_path)
  watch.join()
  assert done.returncode == 0, done.stderr
  assert Counter(events(directory)) == {("started", 0): 1, ("started", 1): 2, ("done", 0): 1, ("done", 1): 1}
  unbroken = sweep(tmp_path / "unbroken", *argv)
  assert curve(directory / "1") == curve(unbroken / "1")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["packed_ray", "packed_submitit_local", "packed_joblib"])
def test_packs_that_are_placed_leave_what_packs_here_leave(launcher, tmp_path):
  plugin = {"packed_ray": "ray", "packed_submitit_local": "submitit", "packed_joblib": "joblib"}[launcher]
  pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
  argv = [*SHORT, *on_stories(tmp_path), *NAN, "optim.lr=1e-3,1e38", "lora.rank=1,2", "train.batch_size=4,8"]
  local = ["hydra.launcher.place.ray.init.address=local", "hydra.launcher.place.ray.init.num_cpus=2",
           "hydra.launcher.place.ray.init.object_store_memory=80000000"]  # fmt: skip
  here = sweep(tmp_path / "here", "hydra/launcher=packed", *argv, code=1)
  directory = tmp_path / "placed"
  own = local if plugin == "ray" else []
  done = process("-m", f"hydra/launcher={launcher}", f"hydra.sweep.dir={directory}", *own, *argv, cwd=tmp_path)
  assert done.returncode == 1, done.stderr
  assert "warning: 4 of 8 runs failed" in done.stderr
  files = lambda d: {str(p.relative_to(d)) for p in d.rglob("*") if p.is_file() and "state" not in p.parts}
  for n in range(8):
    assert files(directory / str(n)) == files(here / str(n)), n
    assert curve(directory / str(n)) == curve(here / str(n)), n
  assert sorted(events(directory)) == sorted(events(here))
  before = written(directory)
  done = process("-m", f"hydra/launcher={launcher}", f"hydra.sweep.dir={directory}", *own, *argv, cwd=tmp_path)
  assert done.returncode == 1 and written(directory) == before, done.stderr


@pytest.mark.slow
def test_submitit_local_one_that_fails_and_one_that_is_killed(tmp_path):
  pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
  directory = tmp_path / "sweep"
  argv = ["-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={directory}", *SHORT, *on_stories(tmp_path),
          "lora.targets=mlp,no_such,attention", "train.steps=100"]  # fmt: skip
  watch = kill_once(directory / "2")
  done = process(*argv, cwd=tmp_path)
  watch.join()
  assert done.returncode == 1, done.stderr
  assert "warning: 2 of 3 runs failed" in done.stderr
  assert "error: run 1 (lora.targets=no_such): lora.targets=no_such matches no module" in done.stderr
  assert "error: run 2 (lora.targets=attention): its process died: UncompletedJobError" in done.stderr
  assert summary(directory / "0")["status"] == "done"
  done = process(*argv, cwd=tmp_path)
  assert summary(directory / "2")["status"] == "done" and "warning: 1 of 3 runs failed" in done.stderr


@pytest.mark.slow
def test_a_time_limit_warning_leaves_a_resumable_run(tmp_path):
  pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
  directory = tmp_path / "sweep"
  argv = ["-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={directory}", *SHORT, *on_stories(tmp_path),
          "train.seed=0", "train.steps=400"]  # fmt: skip
  started = subprocess.Popen(command(*argv), env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
  while not (directory / "0" / "checkpoints" / "8").exists() and started.poll() is None:
    time.sleep(0.02)
  pid = trainer(directory / "0")
  assert pid is not None
  os.kill(pid, signal.SIGUSR2)
  assert started.wait() == 75 and started.stderr is not None
  assert "stopped after step" in started.stderr.read()
  assert process(*argv, cwd=tmp_path).returncode == 0
  assert summary(directory / "0")["status"] == "done"


@pytest.mark.slow
def test_joblib_reports_a_process_killed_each_time(tmp_path):
  pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
  directory = tmp_path / "sweep"
  argv = ["-m", "hydra/launcher=joblib", f"hydra.sweep.dir={directory}", *SHORT, *on_stories(tmp_path),
          "train.seed=0,1,2,3", "train.steps=100"]  # fmt: skip
  watch = kill_once(directory / "1", times=3)  # four together, two, alone
  done = process(*argv, cwd=tmp_path)
  watch.join()
  assert done.returncode == 1, done.stderr
  assert "warning: 1 of 4 runs failed\nerror: run 1 (train.seed=1): its process died: TerminatedWorker" in done.stderr
  assert [summary(directory / str(n))["status"] for n in (0, 2, 3)] == ["done"] * 3
  assert sorted(trial for event, trial in events(directory) if event == "done") == [0, 2, 3]
