"""Each run has its own directory, which is removed if nothing was trained."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_exp.cli import main as entry
from lora_exp.cli.claim import claim_directory
from lora_exp.config import Config, InputError, InUseError
from lora_exp.config.override_grammar import quoted
from lora_exp.runtime.locks import run_lock

ROOT = Path(__file__).resolve().parents[2]


def run_directories(root: Path) -> list[Path]:
  """The run directories under `root`."""
  return sorted(path.parent for path in root.glob("outputs/**/.lock"))


def refuse(cfg: Config, run_dir: Path) -> None:
  """A run that is refused after it wrote a file."""
  (run_dir / "half").mkdir()
  (run_dir / "half" / "written").touch()
  raise InputError("lora.targets=nothing: matches nothing")



def test_a_run_has_its_config_in_its_own_directory(trained, in_tmp_path):
  seen = []
  trained(lambda cfg, run_dir: seen.append((cfg, run_dir)))
  assert entry.run(["lora.rank=3"]) == 0
  (cfg, run_dir), = seen
  assert run_dir.parent.parent == in_tmp_path / "outputs" and run_dir.name.endswith("-minigpt-lora-r3")
  saved = yaml.safe_load((run_dir / "config.yaml").read_text())
  assert saved["lora"]["rank"] == cfg.lora.rank == 3 and saved["data"]["seq_len"] == cfg.data.seq_len
  assert (run_dir / ".hydra" / "overrides.yaml").read_text() == "- lora.rank=3\n"
  assert (run_dir / "lora_exp.log").is_file()


def test_runs_of_the_same_second_have_different_directories(tmp_path):
  paths = [claim_directory(tmp_path / "day" / "12-00-00-run", typed=False).path for _ in range(3)]
  assert [path.name for path in paths] == ["12-00-00-run", "12-00-00-run-2", "12-00-00-run-3"]


@pytest.mark.parametrize("name", ["a b", "a=b", "a,b", 'a"b', "a'b", "ä[1]{2}", "back\\slash\\"])
def test_a_run_directory_may_have_any_name(name, trained, in_tmp_path):
  trained(lambda cfg, run_dir: (run_dir / "here").touch())
  assert entry.run([f"hydra.run.dir={quoted(f'runs/{name}')}"]) == 0
  assert (in_tmp_path / "runs" / name / "here").is_file()


def test_a_directory_with_a_run_is_not_overwritten(trained, in_tmp_path, capfd):
  assert entry.run(["hydra.run.dir=mine"]) == 0
  before = {path: path.stat().st_mtime_ns for path in in_tmp_path.rglob("*")}
  assert entry.run(["hydra.run.dir=mine"]) == InUseError.code == 3
  assert "train.resume=" in capfd.readouterr().err
  assert {path: path.stat().st_mtime_ns for path in in_tmp_path.rglob("*")} == before


def test_a_file_in_the_way_is_reported(in_tmp_path, capfd):
  (in_tmp_path / "file").write_text("precious")
  for typed in ("file", "file/below"):
    assert entry.run([f"hydra.run.dir={typed}"]) == 2
    assert "a file is in the way" in capfd.readouterr().err
  assert (in_tmp_path / "file").read_text() == "precious"


def test_nothing_is_left_of_a_refused_run(trained, in_tmp_path, capfd):
  trained(refuse)
  assert entry.run(["lora.rank=3"]) == 2
  assert "matches nothing" in capfd.readouterr().err
  assert list(in_tmp_path.iterdir()) == []


def test_existing_files_survive_a_refused_run(trained, in_tmp_path):
  trained(refuse)
  (in_tmp_path / "mine").mkdir()
  (in_tmp_path / "mine" / "notes.txt").write_text("precious")
  (in_tmp_path / "outputs" / "other").mkdir(parents=True)
  assert entry.run(["hydra.run.dir=mine"]) == 2
  assert entry.run([]) == 2
  assert sorted(path.name for path in in_tmp_path.rglob("*")) == ["mine", "notes.txt", "other", "outputs"]


def test_a_run_that_trained_is_kept_after_an_error(trained, in_tmp_path):
  def late(cfg, run_dir):
    (run_dir / "metrics.jsonl").write_text("{}\n")
    raise InputError("too late")

  trained(late)
  assert entry.run([]) == 2
  assert [(path / "metrics.jsonl").is_file() for path in run_directories(in_tmp_path)] == [True]


def test_two_processes_cannot_train_in_one_directory(tmp_path):
  with run_lock(tmp_path):
    code = "import sys, pathlib, lora_exp.runtime.locks as r; r.run_lock(pathlib.Path(sys.argv[1])).__enter__()"
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert "InUseError" in done.stderr and "another process is training here" in done.stderr
  with run_lock(tmp_path):
    pass
