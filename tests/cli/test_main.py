"""Promises of the command line: a mistake is answered in words and leaves nothing behind; every end has its code."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lora_exp.cli import main as entry
from lora_exp.cli.claim import claim_directory
from lora_exp.config import Config, DiskError, DivergedError, InputError, InUseError, NoCheckpointError, StoppedError
from lora_exp.config.override_grammar import quoted
from lora_exp.runtime.locks import run_lock
from lora_exp.tasks import evaluate
from lora_exp.train import pack

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[[Config, Path], object]


@pytest.fixture
def trained(in_tmp_path, monkeypatch):
  """Puts a function of the test where the command line looks up `run` of train and evaluate: only its end counts."""

  def install(run: Train) -> None:
    monkeypatch.setattr(pack, "run", lambda plan, run_dir: run(plan.cfg, run_dir))
    monkeypatch.setattr(evaluate, "run", run)

  install(lambda cfg, run_dir: (run_dir / "metrics.jsonl").write_text("{}\n"))
  return install


def runs(root: Path) -> list[Path]:
  """The run directories under `root`."""
  return sorted(path.parent for path in root.glob("outputs/**/.lock"))


def process(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run([sys.executable, "-m", "lora_exp", *argv], cwd=cwd, text=True, capture_output=True,
                        env={**os.environ, "PYTHONPATH": str(ROOT), **env}, timeout=60)


# ---- mistakes

MISTAKES = [
  (["lora.rnk=8"], "lora.rnk", "did you mean lora.rank?"),
  (["rank=8"], "rank", "did you mean lora.rank?"),
  (["+lora.foo=1"], "lora.foo", "no such setting"),
  (["++lora.rnk=8"], "lora.rnk", "did you mean lora.rank?"),
  (["+lora.rank=8"], "lora.rank", "without +: lora.rank=8"),
  (["~lora.rank"], "~lora.rank", "give it a value"),
  (["~lora"], "~lora", "choose another"),
  (["lora={rnk: 8}"], "lora.rnk", "did you mean lora.rank?"),
  (["lora.rank", "8"], "lora.rank", "lora.rank=8"),
  (["--lora.rank=8"], "--lora.rank=8", "settings have no dashes: lora.rank=8"),
  (["--mutirun"], "--mutirun", "did you mean --multirun?"),
  (["model=minigtp"], "model=minigtp", "did you mean minigpt"),
  (["modle=minigpt"], "modle", "did you mean model?"),
  (["experimnt=jax_tutorial"], "experimnt", "did you mean experiment?"),
  (["experiment=jax_tutorail"], "experiment=jax_tutorail", "did you mean jax_tutorial?"),
  (["data@retian=none"], "@retian", "data@retain"),
  (["data@retain=null"], "data@retain=null", "did you mean none?"),
  (["model=null"], "model=null", "choose gemma3_1b"),
  (["models/x=1"], "models/x", "no such group"),
  (["task=trian"], "task=trian", "did you mean train?"),
  (["lora.rank=1.5"], "lora.rank=1.5", "whole number"),
  (["lora.rank=eight"], "lora.rank=eight", "whole number"),
  (["lora.rank="], "lora.rank=", "whole number"),
  (["optim.lr=nan"], "optim.lr=nan", "finite"),
  (["optim.lr=${nowhere}"], "optim.lr", "not found"),
  (["lora.targets=re:(q|v)_proj"], "lora.targets", "'lora.targets=\"re:(q|v)_proj\"'"),
  (["lora.targets=[query,value"], "lora.targets", "a list ends with ]"),
  (["prompt=Hello, world"], "prompt=Hello, world", "'prompt=\"Hello, world\"'"),
  (["lora.rank=1,2"], "lora.rank=1,2", "need -m"),
  (["-m", "lora.rank=4,0"], "lora.rank=0", "at least 1"),
  (["-m", "lora=lora,rslorra"], "lora=rslorra", "did you mean rslora?"),
  (["-m", "lora.rank=interval(1,2)"], "lora.rank", "takes lists"),
  (["data=text"], "data.path=null", "data.path=FILE"),
  (["data=text", "data.path=/no/such.txt"], "data.path=/no/such.txt", "no such file"),
  (["task=generate", "prompt=''"], "prompt", "is empty"),
  (["sample.stop=['']"], "sample.stop", "empty text"),
  (["task=generate", "run=/no/such"], "run=/no/such", "no such directory"),
  (["run=/tmp"], "run=/tmp", "train.resume=/tmp"),
  (["train.resume=/"], "train.resume=/", "holds no run"),
  (["-m", "train.resume=/", "lora.rank=1,2"], "train.resume=/", "holds no run"),
  (["name=../escape"], "name=../escape", "plain file name"),
  (["hydra.run.dir=/proc/none/x"], "/proc/none", "hydra.run.dir=DIR"),
  (["hydra.foo=1"], "hydra.foo", "no such setting"),
  (["+hydra.callbacks.x._target_=os.abort"], "hydra.callbacks", "cannot be set"),
  (["hydra/job_logging=stdout"], "hydra/job_logging", "cannot be set"),
  (["+lora._target_=os.abort"], "_target_", "chosen by name"),
  (["--experimental-rerun", "x.pickle"], "--experimental-rerun", "train.resume=DIR"),
  (["--config-dir", "/no/such"], "--config-dir=/no/such", "no such directory"),
  (["--config-name", "other"], "other", "Cannot find primary config"),
  (["--cfg", "jobs"], "--cfg", "'job', 'hydra', 'all'"),
  (["--resolve"], "--resolve", "--cfg job --resolve"),
]


@pytest.mark.parametrize(("argv", "named", "remedy"), MISTAKES, ids=[" ".join(argv) for argv, _, _ in MISTAKES])
def test_a_mistake_ends_with_2_names_the_setting_and_the_remedy_and_leaves_nothing(argv, named, remedy, in_tmp_path,
                                                                                   capfd):
  assert entry.run(argv) == InputError.code
  said = capfd.readouterr()
  assert named in said.err and remedy in said.err
  assert "Traceback" not in said.err + said.out and len(said.err.splitlines()) < 25
  assert list(in_tmp_path.iterdir()) == []


def test_a_hundred_mistakes_still_fit_on_a_screen(in_tmp_path, capfd):
  assert entry.run([f"lora.x{i}=1" for i in range(100)]) == 2
  said = capfd.readouterr().err
  assert len(said.splitlines()) < 25 and "and 80 more" in said


@pytest.mark.parametrize("argv", [["lora.rnk=8"], ["-m", "lora.rank=4,0"], ["experiment=jax_tutorial"]])
def test_the_process_itself_says_so(argv, tmp_path):
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
  assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_the_traceback_is_there_for_who_asks(tmp_path):
  done = process("lora.rnk=8", cwd=tmp_path, HYDRA_FULL_ERROR="1")
  assert done.returncode == 2 and "Traceback" in done.stderr and "did you mean lora.rank?" in done.stderr


# ---- what only shows


@pytest.mark.parametrize(("argv", "words"), [
  (["--help"], ["lora-exp -m sweep=rank", "adalora, bitfit, dora, frozen, full, lora, loraplus,", "75 stopped"]),
  (["--cfg", "job", "lora.rank=5"], ["rank: 5"]),
  (["--cfg", "job", "--resolve", "--package", "data"], ["seq_len: 128"]),
  (["--info", "defaults"], ["stdlib_docs"]),
  (["--version"], ["lora_exp 0."]),
])
def test_flags_that_show_something_run_nothing(argv, words, tmp_path):
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert all(word in done.stdout for word in words)
  assert list(tmp_path.iterdir()) == []


def test_the_settings_are_read_without_jax():
  code = "import sys, lora_exp.cli.main as m; assert m.run(['lora.rank=0']) == 2; print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
  assert done.stdout.strip() == "False", done.stderr


# ---- the run directory


def test_a_run_finds_its_whole_config_in_a_directory_of_its_own(trained, in_tmp_path):
  seen = []
  trained(lambda cfg, run_dir: seen.append((cfg, run_dir)))
  assert entry.run(["lora.rank=3"]) == 0
  (cfg, run_dir), = seen
  assert run_dir.parent.parent == in_tmp_path / "outputs" and run_dir.name.endswith("-minigpt-lora-r3")
  saved = yaml.safe_load((run_dir / "config.yaml").read_text())
  assert saved["lora"]["rank"] == cfg.lora.rank == 3 and saved["data"]["seq_len"] == cfg.data.seq_len
  assert (run_dir / ".hydra" / "overrides.yaml").read_text() == "- lora.rank=3\n"
  assert (run_dir / "lora_exp.log").is_file()


def test_two_runs_of_one_second_have_two_directories(tmp_path):
  paths = [claim_directory(tmp_path / "day" / "12-00-00-run", typed=False).path for _ in range(3)]
  assert [path.name for path in paths] == ["12-00-00-run", "12-00-00-run-2", "12-00-00-run-3"]


@pytest.mark.parametrize("name", ["a b", "a=b", "a,b", 'a"b', "a'b", "ä[1]{2}", "back\\slash\\"])
def test_a_run_directory_may_have_any_name(name, trained, in_tmp_path):
  trained(lambda cfg, run_dir: (run_dir / "here").touch())
  assert entry.run([f"hydra.run.dir={quoted(f'runs/{name}')}"]) == 0
  assert (in_tmp_path / "runs" / name / "here").is_file()


def test_a_directory_that_holds_a_run_is_not_written_again(trained, in_tmp_path, capfd):
  assert entry.run(["hydra.run.dir=mine"]) == 0
  before = {path: path.stat().st_mtime_ns for path in in_tmp_path.rglob("*")}
  assert entry.run(["hydra.run.dir=mine"]) == InUseError.code == 3
  assert "train.resume=" in capfd.readouterr().err
  assert {path: path.stat().st_mtime_ns for path in in_tmp_path.rglob("*")} == before


def test_a_file_in_the_way_is_named(in_tmp_path, capfd):
  (in_tmp_path / "file").write_text("precious")
  for typed in ("file", "file/below"):
    assert entry.run([f"hydra.run.dir={typed}"]) == 2
    assert "a file is in the way" in capfd.readouterr().err
  assert (in_tmp_path / "file").read_text() == "precious"


def refuse(cfg: Config, run_dir: Path) -> None:
  (run_dir / "half").mkdir()
  (run_dir / "half" / "written").touch()
  raise InputError("lora.targets=nothing: matches nothing")


def test_nothing_is_left_of_a_run_that_was_refused_before_it_trained(trained, in_tmp_path, capfd):
  trained(refuse)
  assert entry.run(["lora.rank=3"]) == 2
  assert "matches nothing" in capfd.readouterr().err
  assert list(in_tmp_path.iterdir()) == []


def test_what_was_there_before_a_refused_run_stays(trained, in_tmp_path):
  trained(refuse)
  (in_tmp_path / "mine").mkdir()
  (in_tmp_path / "mine" / "notes.txt").write_text("precious")
  (in_tmp_path / "outputs" / "other").mkdir(parents=True)
  assert entry.run(["hydra.run.dir=mine"]) == 2
  assert entry.run([]) == 2
  assert sorted(path.name for path in in_tmp_path.rglob("*")) == ["mine", "notes.txt", "other", "outputs"]


def test_a_run_that_trained_is_kept_whatever_its_end(trained, in_tmp_path):
  def late(cfg, run_dir):
    (run_dir / "metrics.jsonl").write_text("{}\n")
    raise InputError("too late")

  trained(late)
  assert entry.run([]) == 2
  assert [(path / "metrics.jsonl").is_file() for path in runs(in_tmp_path)] == [True]


def test_two_processes_never_train_in_one_directory(tmp_path):
  with run_lock(tmp_path):
    code = "import sys, pathlib, lora_exp.runtime.locks as r; r.run_lock(pathlib.Path(sys.argv[1])).__enter__()"
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert "InUseError" in done.stderr and "another process is training here" in done.stderr
  with run_lock(tmp_path):
    pass


# ---- how it ends


@pytest.mark.parametrize(("error", "code"), [
  (InputError("x=1: no"), 2), (InUseError("in use"), 3), (NoCheckpointError("none"), 4), (DivergedError("nan"), 5),
  (DiskError("full"), 6), (StoppedError("stopped at step 3"), 75),
  (OSError(errno.ENOSPC, "No space left on device", "/disk/x"), 6), (OSError(errno.EDQUOT, "Quota", "/disk/x"), 6),
  (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2),
])
def test_each_end_has_its_code_and_is_said_without_a_traceback(error, code, trained, capfd):
  def end(cfg, run_dir):
    raise error

  trained(end)
  assert entry.run([]) == code
  said = capfd.readouterr()
  assert said.err.startswith("warning: " if code == 75 else "error: ") and "Traceback" not in said.err + said.out


def test_a_bug_ends_with_1_and_its_traceback_and_the_log_has_it_too(trained, in_tmp_path, capfd):
  trained(lambda cfg, run_dir: 1 / 0)
  assert entry.run([]) == 1
  assert "ZeroDivisionError" in capfd.readouterr().err
  run_dir, = runs(in_tmp_path)
  assert "ZeroDivisionError" in (run_dir / "lora_exp.log").read_text()


def test_an_interrupt_before_training_ends_with_130_and_leaves_nothing(trained, in_tmp_path):
  def interrupt(cfg, run_dir):
    raise KeyboardInterrupt

  trained(interrupt)
  assert entry.run([]) == 130
  assert list(in_tmp_path.iterdir()) == []


def test_an_environment_is_left_as_it_was(trained, monkeypatch):
  argv = list(sys.argv)
  monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
  assert entry.run([]) == 0
  assert "HYDRA_FULL_ERROR" not in os.environ and sys.argv == argv


# ---- several runs


def test_a_failed_run_of_a_multirun_is_told_and_the_others_go_on(trained, in_tmp_path, capfd):
  def some(cfg, run_dir):
    if cfg.lora.rank == 2:
      raise DivergedError("loss is nan at step 7")
    if cfg.lora.rank == 3:
      raise ZeroDivisionError("a bug")
    (run_dir / "metrics.jsonl").write_text("{}\n")

  trained(some)
  assert entry.run(["-m", "lora.rank=1,2,3,4"]) == 1
  said = capfd.readouterr().err
  assert "loss is nan at step 7" in said and "ZeroDivisionError: a bug" in said
  sweep, = in_tmp_path.glob("outputs/sweeps/*/*")
  assert [path.parent.name for path in sorted(sweep.glob("*/metrics.jsonl"))] == ["0", "3"]
  assert yaml.safe_load((sweep / "3" / "config.yaml").read_text())["lora"]["rank"] == 4


def test_a_signal_stops_the_whole_multirun(trained):
  seen = []

  def stop(cfg, run_dir):
    seen.append(cfg.lora.rank)
    raise StoppedError("stopped by SIGTERM at step 3")

  trained(stop)
  assert entry.run(["-m", "lora.rank=1,2,3"]) == StoppedError.code
  assert seen == [1]


def test_a_sweep_file_starts_its_runs_without_m(trained, in_tmp_path):
  assert entry.run(["sweep=rank", "hydra/launcher=basic", "train.seed=0"]) == 0
  sweep, = in_tmp_path.glob("outputs/sweeps/*/*-rank")
  ranks = [yaml.safe_load((path / "config.yaml").read_text())["lora"]["rank"] for path in sorted(sweep.glob("[0-6]"))]
  assert ranks == sorted(set(ranks)) and len(ranks) == 7


# ---- going on, and working on a run


def test_resuming_goes_on_in_the_directory_itself(trained, in_tmp_path):
  assert entry.run(["hydra.run.dir=mine", "lora.rank=3", "train.steps=40"]) == 0
  first = (in_tmp_path / "mine" / ".hydra" / "config.yaml").read_text()
  seen = []
  trained(lambda cfg, run_dir: seen.append((cfg.lora.rank, cfg.train.stop_at, run_dir)))
  assert entry.run(["train.resume=mine", "train.stop_at=9"]) == 0
  assert seen == [(3, 9, in_tmp_path / "mine")]
  assert [path.name for path in in_tmp_path.iterdir()] == ["mine"]
  assert (in_tmp_path / "mine" / ".hydra" / "config.yaml").read_text() == first


def test_a_run_that_cannot_go_on_as_asked_keeps_its_config(trained, in_tmp_path):
  assert entry.run(["hydra.run.dir=mine"]) == 0
  before = (in_tmp_path / "mine" / "config.yaml").read_text()
  trained(refuse)
  assert entry.run(["train.resume=mine", "mesh.data=3"]) == 2
  assert (in_tmp_path / "mine" / "config.yaml").read_text() == before
  assert (in_tmp_path / "mine" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("argv", [[], ["-m", "train.eval_tokens=10,20"]])
def test_other_tasks_make_no_directory(argv, trained, in_tmp_path):
  assert entry.run(["hydra.run.dir=mine", "lora.rank=3"]) == 0
  before = sorted(in_tmp_path.rglob("*"))
  seen = []
  trained(lambda cfg: seen.append((cfg.run, cfg.lora.rank)))
  assert entry.run(["task=evaluate", "run=mine", *argv]) == 0
  assert set(seen) == {(str(in_tmp_path / "mine"), 3)} and len(seen) == (2 if argv else 1)
  assert sorted(in_tmp_path.rglob("*")) == before
