"""`task=list`, `task=compare` and `task=clean`, on directories of runs with known contents."""

import os
import time
from pathlib import Path

import pytest

import sweeps
from lora_exp.cli import main as entry
from lora_exp.config.schema import CleanConfig, Config, FilterConfig
from lora_exp.runtime.byte_sizes import size_of, size_text
from lora_exp.runtime.cache import get_or_make
from lora_exp.runtime.cache_entries import cache_entries
from lora_exp.runtime.locks import run_lock
from lora_exp.tasks import clean, compare
from lora_exp.tasks import list as list_task

DAY = 86400
OLD = 5000  # bytes of the old entries of `cache`


@pytest.fixture
def outputs(in_tmp_path: Path) -> Path:
  """Two runs of one day and a sweep of two ranks with three seeds."""
  day = in_tmp_path / "outputs" / "2026-11-27"
  sweeps.trial(day, "08-00-00-a", 2.5)
  sweeps.trial(day, "09-00-00-b", None, status="stopped", lora__method="dora", lora__rank=4)
  sweeps.ranks(in_tmp_path / "outputs" / "sweeps" / "2026-11-27" / "10-00-00-rank", {1: 2.9, 8: 2.4})
  return in_tmp_path / "outputs"


def names(found: list) -> list[str]:
  return sorted(item.path.name for item in found)


def test_list_shows_runs_and_sweeps(outputs, capsys):
  assert names(list_task.run(Config(task="list"))) == ["08-00-00-a", "09-00-00-b", "10-00-00-rank"]
  lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
  assert lines[0] == "3 of 3 runs and sweeps in outputs"
  assert lines[lines.index("2026-11-27/08-00-00-a") + 1] == "minigpt stdlib lora rank 8 32 steps loss 2.5000 done"
  assert lines[lines.index("2026-11-27/09-00-00-b") + 1] == "minigpt stdlib dora rank 4 32 steps - stopped"
  sweep = lines[lines.index("sweeps/2026-11-27/10-00-00-rank/") + 1]
  assert sweep.startswith("minigpt stdlib lora rank 1, 8 32 steps loss 2.3") and sweep.endswith("6/6 done")


@pytest.mark.parametrize(("wanted", "found"), [
  ({"method": "dora"}, ["09-00-00-b"]), ({"status": "done"}, ["08-00-00-a", "10-00-00-rank"]),
  ({"rank": 1}, ["10-00-00-rank"]), ({"name": "0?-00-00-?"}, ["08-00-00-a", "09-00-00-b"]),
  ({"days": 1}, ["09-00-00-b", "10-00-00-rank"]), ({"model": "minigpt", "data": "std*", "rank": 4}, ["09-00-00-b"]),
])  # fmt: skip
def test_filters_select_runs(outputs, wanted, found):
  age(outputs / "2026-11-27" / "08-00-00-a", 2)
  assert names(list_task.run(Config(task="list", filter=FilterConfig(**wanted)))) == found


def test_a_run_that_holds_its_lock_is_training(outputs):
  run_dir = outputs / "2026-11-27" / "09-00-00-b"
  with run_lock(run_dir):
    [found] = list_task.run(Config(task="list", filter=FilterConfig(status="training")))
  assert found.path == Path("outputs/2026-11-27/09-00-00-b")


def test_what_cannot_be_listed_or_compared_is_said(outputs, capfd):
  run_dir = "outputs/2026-11-27/08-00-00-a"
  for argv, words in (
    (["task=list", "run=nowhere"], "run=" + str(outputs.parent / "nowhere") + ": no such directory"),
    (["task=list", "filter.method=vera"], "none of the 3 runs and sweeps"),
    (["task=list", "filter.days=-1"], "filter.days=-1"),
    (["task=compare"], "task=compare needs runs"),
    (["task=compare", f"runs=[{run_dir}]"], "a comparison needs two"),
    (["task=compare", f"runs=[{run_dir},{run_dir}]"], "a comparison needs two"),
    (["task=compare", f"runs=[{run_dir},nowhere]"], "nowhere: no such directory; task=list"),
    (["task=clean", "cache_limit=20XB"], "cache_limit=20XB: must be a number of bytes"),
    (["task=report", f"run={run_dir}"], "is one run"),
  ):  # fmt: skip
    assert entry.run(argv) == 2, argv
    assert words in capfd.readouterr().err, argv


def test_compare_gives_the_verdicts_of_the_report(outputs, capsys):
  report = compare.run(Config(task="compare", runs=[str(outputs / "sweeps" / "2026-11-27" / "10-00-00-rank"),
                                                    str(outputs / "2026-11-27" / "08-00-00-a")]))
  assert len(report.runs) == 7
  words = " ".join(capsys.readouterr().out.split())
  assert "lora.rank 1: runs 0-2; 8: runs 3-6" in words and "train.seed" in words
  assert "Rank 8 is enough" not in words, "it is the largest rank"
  assert "Shown to be more than 5 % short of it: rank 1 (83 % in the mean)" in words


def test_compare_says_which_runs_repeat_others(in_tmp_path, capsys):
  for name in ("a", "b"):
    sweeps.ranks(in_tmp_path / name, {1: 2.9 if name == "a" else 2.6, 8: 2.4})
  report = compare.run(Config(task="compare", runs=["a", "b"]))
  assert len(report.damage) == 6 and "repeats trial 0" in report.damage[0]
  assert "repeats trial" in capsys.readouterr().err


def test_compare_separates_what_cannot_be_compared(in_tmp_path, capsys):
  for name, steps in (("a", 32), ("b", 64)):
    sweeps.trial(in_tmp_path, name, 2.5, train__steps=steps)
  report = compare.run(Config(task="compare", runs=["a", "b"]))
  assert len(report.sections) == 2
  captured = capsys.readouterr()
  assert captured.out.count("2 trials (2 done) of 2 settings.") == 1, "of all groups together"
  assert "train.steps  32: run 0; 64: run 1" in captured.out and "the number of steps" in captured.err


# ---- task=clean


def age(path: Path, days: float) -> None:
  """Makes a directory and its files look as old as this."""
  then = time.time() - days * DAY
  for file in [*path.rglob("*"), path]:
    os.utime(file, (then, then))


def fill(directory: Path) -> None:
  (directory / "data").write_bytes(b"x" * 1000)


@pytest.fixture
def cache(in_tmp_path: Path) -> Path:
  """A cache with entries of 40, 20 and 0 days, and files that the cache did not write."""
  root = in_tmp_path / "cache"
  for key, days in (("a", 40), ("b", 20), ("c", 0)):
    entry = get_or_make(root, "rows", key * 64, fill)
    age(entry, days)
  (root / "programs").mkdir()
  (root / "programs" / "jit_step-1234-cache").write_bytes(b"x" * (OLD - size_of(entry)))
  age(root / "programs" / "jit_step-1234-cache", 40)
  (root / "mine").mkdir()
  (root / "mine" / "thesis.txt").write_text("text")
  age(root / "mine", 400)
  return root


def config(cache: Path, limit: str | None = None, **settings) -> Config:
  return Config(task="clean", cache=str(cache), cache_limit=limit, clean=CleanConfig(**settings))


def test_clean_shows_and_deletes_nothing_by_default(cache, capsys):
  assert clean.run(config(cache)) == OLD
  assert f"Nothing was deleted. {size_text(OLD)} would be" in capsys.readouterr().out
  assert len(cache_entries(cache)) == 4


def test_clean_deletes_old_entries_and_nothing_else(cache, capsys):
  clean.run(config(cache, delete=True))
  assert f"Deleted {size_text(OLD)}" in capsys.readouterr().out
  assert sorted(item.path.name[:1] for item in cache_entries(cache)) == ["b", "c"]
  assert (cache / "mine" / "thesis.txt").is_file()


def test_a_damaged_entry_that_was_set_aside_is_deleted(cache):
  entry = get_or_make(cache, "rows", "c" * 64, fill)
  entry.rename(entry.with_name(f"{entry.name}.damaged"))
  clean.run(config(cache, days=0, delete=True))
  assert cache_entries(cache) == [] and not list((cache / "rows").glob("c*"))


def test_an_entry_that_is_used_stays(cache):
  get_or_make(cache, "rows", "a" * 64, fill)
  clean.run(config(cache, delete=True))
  assert sorted(item.path.name[:1] for item in cache_entries(cache)) == ["a", "b", "c"]


def test_the_limit_removes_the_least_recently_used(cache):
  clean.run(config(cache, limit="1500", days=1000, delete=True))
  assert [item.path.name[:1] for item in cache_entries(cache)] == ["c"]


def test_clean_deletes_checkpoints_of_old_finished_runs(outputs, cache):
  for name in ("08-00-00-a", "09-00-00-b"):
    folder = outputs / "2026-11-27" / name / "checkpoints"
    folder.mkdir()
    fill(folder)
    age(folder.parent, 50)
  assert clean.run(config(cache, days=60, delete=True)) == 0
  assert clean.run(config(cache, min_size="1MB", delete=True)) == 0
  assert clean.run(config(cache, delete=True)) == OLD + 1000
  left = sorted(path.parent.name for path in outputs.rglob("checkpoints"))
  assert left == ["09-00-00-b"], "a stopped run can be resumed"
  assert (outputs / "2026-11-27" / "08-00-00-a" / "summary.json").is_file()


def test_clean_keeps_the_checkpoints_of_trials_that_do_not_match(outputs, cache):
  sweep = outputs / "sweeps" / "2026-11-27" / "10-00-00-rank"
  for trial in sweep.iterdir():  # ranks 1 and 8, with three seeds each
    (trial / "checkpoints").mkdir()
    fill(trial / "checkpoints")
    age(trial, 50 if trial.name != "0" else 80)
  cfg = config(cache, days=41, delete=True)  # no entry of the cache is so old
  cfg.filter = FilterConfig(name="10-*", rank=1, days=60)
  assert clean.run(cfg) == 2000
  assert sorted(path.parent.name for path in sweep.rglob("checkpoints")) == ["0", "3", "4", "5"]
