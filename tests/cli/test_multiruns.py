"""Multiruns, resumed runs and tasks that work on a run."""

import shutil
from pathlib import Path

import pytest
import yaml

from lora_exp.cli import main as entry
from lora_exp.config import Config, DivergedError, InputError, StoppedError


def refuse(cfg: Config, run_dir: Path) -> None:
  """A run that is rejected after it wrote a file."""
  (run_dir / "half").mkdir()
  (run_dir / "half" / "written").touch()
  raise InputError("lora.targets=nothing: matches nothing")



def test_a_multirun_goes_on_after_a_failed_run(trained, in_tmp_path, capfd):
  def some(cfg, run_dir):
    if cfg.lora.rank == 2:
      raise DivergedError("loss is nan at step 7")
    if cfg.lora.rank == 3:
      raise ZeroDivisionError("a bug")
    (run_dir / "metrics.jsonl").write_text("{}\n")

  trained(some)
  assert entry.run(["-m", "lora.rank=1,2,3,4"]) == 1
  output = capfd.readouterr().err
  assert "loss is nan at step 7" in output and "ZeroDivisionError: a bug" in output
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


def test_a_run_whose_directory_was_deleted_is_trained_again(trained, in_tmp_path, capfd):
  seen = []

  def write(cfg, run_dir):
    seen.append(cfg.lora.rank)
    (run_dir / "summary.json").write_text("{}")

  trained(write)
  argv = ["-m", "lora.rank=1,2,3", "hydra.sweep.dir=mine"]
  assert entry.run(argv) == 0 and seen == [1, 2, 3]
  shutil.rmtree(in_tmp_path / "mine" / "1")
  capfd.readouterr()
  assert entry.run(argv) == 0 and seen == [1, 2, 3, 2]
  assert "mine/1/summary.json is missing; it is trained again" in capfd.readouterr().out
  assert entry.run(argv) == 0 and seen == [1, 2, 3, 2]


def test_a_sweep_file_starts_a_multirun(trained, in_tmp_path):
  assert entry.run(["sweep=alpha", "hydra/launcher=basic", "seed=0"]) == 0
  sweep, = in_tmp_path.glob("outputs/sweeps/*/*-alpha")
  alphas = [yaml.safe_load((path / "config.yaml").read_text())["lora"]["alpha"] for path in sorted(sweep.glob("[0-9]"))]
  assert alphas == sorted(set(alphas)) and len(alphas) > 3



def test_resuming_continues_in_the_same_directory(trained, in_tmp_path):
  assert entry.run(["hydra.run.dir=mine", "lora.rank=3", "train.steps=40"]) == 0
  first = (in_tmp_path / "mine" / ".hydra" / "config.yaml").read_text()
  seen = []
  trained(lambda cfg, run_dir: seen.append((cfg.lora.rank, cfg.train.stop_at, run_dir)))
  assert entry.run(["train.resume=mine", "train.stop_at=9"]) == 0
  assert seen == [(3, 9, in_tmp_path / "mine")]
  assert [path.name for path in in_tmp_path.iterdir()] == ["mine"]
  assert (in_tmp_path / "mine" / ".hydra" / "config.yaml").read_text() == first


def test_a_refused_resume_keeps_the_config(trained, in_tmp_path):
  assert entry.run(["hydra.run.dir=mine"]) == 0
  before = (in_tmp_path / "mine" / "config.yaml").read_text()
  trained(refuse)
  assert entry.run(["train.resume=mine", "mesh.data=3"]) == 2
  assert (in_tmp_path / "mine" / "config.yaml").read_text() == before
  assert (in_tmp_path / "mine" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("argv", [[], ["-m", "train.eval_tokens=10,20"]])
def test_other_tasks_create_no_directory(argv, trained, in_tmp_path):
  assert entry.run(["hydra.run.dir=mine", "lora.rank=3"]) == 0
  before = sorted(in_tmp_path.rglob("*"))
  seen = []
  trained(lambda cfg: seen.append((cfg.run, cfg.lora.rank)))
  assert entry.run(["task=evaluate", "run=mine", *argv]) == 0
  assert set(seen) == {(str(in_tmp_path / "mine"), 3)} and len(seen) == (2 if argv else 1)
  assert sorted(in_tmp_path.rglob("*")) == before
