"""Runs are read from their directories, and results.csv has a row for each."""

import shutil

import pytest
from reports import read_results

from lora_exp.cli import main as entry
from lora_exp.config import InputError
from lora_exp.report.grouping.setting_keys import effective_settings, resolved_alpha
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.sweep_report import make_report, make_table
from sweeps import BASE, ranks, trial


def test_results_table_has_every_trial_with_status_and_reason(tmp_path):
  trial(tmp_path, 0, 2.0)
  trial(tmp_path, 1, None, status="diverged", lora__rank=4)
  trial(tmp_path, 3, 2.5, status="stopped", lora__rank=2)
  (trial(tmp_path, 4, 2.0, lora__rank=16) / "summary.json").unlink()
  trial(tmp_path, 5, float("nan"), lora__rank=32)
  (tmp_path / "6").mkdir()
  failed = trial(tmp_path, 7, 2.0, lora__rank=64, metrics=False)
  (failed / "summary.json").unlink()
  (failed / "lora_exp.log").write_text(f"2026-01-01 00:00:00,000 ERROR lora_exp: {failed}/x: no room\nTraceback\n  …\n"
                                       "2026-01-01 00:00:01,000 INFO hydra: the next\n")
  (trial(tmp_path, 8, 2.0, lora__rank=3) / "summary.json").write_text('{"status": "do')
  make_report(tmp_path)
  rows = {int(r["number"]): r for r in read_results(tmp_path)}
  assert [r["status"] for r in rows.values()] == ["done", "diverged", "missing", "stopped", "unfinished", "done",
                                                  "failed", "failed", "failed"]
  reasons = {0: "", 1: "not a finite number after step 32", 2: "there is no such folder", 3: "stopped at step 32 of 32",
             4: "there is no summary.json", 5: "its held-out loss is not a finite number", 6: "there is no config.yaml",
             7: "7/x: no room", 8: "summary.json cannot be read"}
  page = (tmp_path / "report.html").read_text()
  for number, reason in reasons.items():
    assert reason in rows[number]["reason"] and (reason in page or not reason)
  assert rows[5]["loss"] == "" and rows[4]["rank"] == "16" and rows[7]["run"] == "7"


def test_reason_of_a_bug_is_its_exception(tmp_path):
  path = trial(tmp_path, 0, 2.0)
  (path / "summary.json").unlink()
  (path / "lora_exp.log").write_text("2026-01-01 00:00:00,000 ERROR lora_exp: bug\nTraceback\n  x = 1 / 0\n"
                                     "ZeroDivisionError: division by zero\n")
  assert read_sweep(tmp_path)[0].reason == "a bug: ZeroDivisionError: division by zero"


def test_directory_without_a_sweep_is_an_input_error(tmp_path):
  with pytest.raises(InputError, match="contains no runs"):
    read_sweep(tmp_path)
  one = trial(tmp_path, 0, 2.0)
  with pytest.raises(InputError, match="is one run"):
    read_sweep(one)
  assert entry.run(["task=report"]) == entry.run(["task=report", f"run={tmp_path / 'none'}"]) == 2
  assert not (tmp_path / "report.html").exists()


def test_results_columns_are_varied_settings_and_results(tmp_path):
  trial(tmp_path, 0, 2.0, lora__rank=2, optim__lr=0.01)
  trial(tmp_path, 1, 2.1, lora__rank=4, train__seed=1, data__seed=5, forgetting=0.5)
  trial(tmp_path, 2, 1.9, lora__method="full")
  make_table(tmp_path)
  first, second, full = read_results(tmp_path)
  keys = list(first)
  assert keys[:4] == ["number", "name", "setting", "group"] and keys[-1] == "run"
  assert [k for k in keys if "." in k] == ["lora.method", "lora.rank", "optim.lr"]
  assert (first["rank"], first["alpha"], first["scale"], first["targets"]) == ("2", "16.0", "2.0", "all_linear")
  assert (first["lr"], second["seed_train"], second["seed_data"]) == ("0.01", "1", "5")
  assert float(second["gain"]) == BASE - 2.1 and second["forgetting"] == "0.5" and second["retain_base"] == "2.0"
  assert (full["rank"], full["targets"], full["method"], full["trainable"]) == ("", "", "full", "100000")


def test_an_alpha_of_null_is_twice_the_rank(tmp_path):
  for number, rank in enumerate((2, 8)):
    trial(tmp_path, number, 2.0, lora__rank=rank, lora__alpha=None)
  trial(tmp_path, 2, 2.0, lora__rank=2)
  trial(tmp_path, 3, 2.0, lora__method="vera", lora__alpha=None)
  trial(tmp_path, 4, 2.0, lora__method="vera")
  runs = read_sweep(tmp_path)
  assert [resolved_alpha(run) for run in runs] == [4.0, 16.0, 16.0, None, None]
  assert ["lora.alpha" in effective_settings(run) for run in runs] == [True, True, True, False, False]


def test_equal_sweeps_give_equal_files_without_paths(tmp_path):
  ranks(tmp_path / "one" / "sweep", {1: 2.5, 4: 2.0})
  shutil.copytree(tmp_path / "one", tmp_path / "two")
  for name in ("one", "two"):
    make_report(tmp_path / name / "sweep")
  for path in ("results.csv", "report.html", "report.md", "plots/pareto.png"):
    contents = [(tmp_path / name / "sweep" / path).read_bytes() for name in ("one", "two")]
    assert contents[0] == contents[1] and str(tmp_path).encode() not in contents[0]
  page = (tmp_path / "one" / "sweep" / "report.html").read_bytes()
  make_report(tmp_path / "one" / "sweep")
  assert page == (tmp_path / "one" / "sweep" / "report.html").read_bytes()
