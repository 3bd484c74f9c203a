"""Runs and sweeps written by version 0.1.0, in tests/fixtures/v0.1.0, still work."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from runs import cache, curve, rows, summary

from lora_exp.cli import main as entry

OLD = Path(__file__).parent / "fixtures" / "v0.1.0"
METHODS = sorted(path.name for path in (OLD / "methods").iterdir())
TRIALS = ["lora.rank=1,2", "train.seed=0,1"]
CLOCK = ("seconds", "tokens_per_s", "memory", "run")  # columns of results.csv that depend on the machine
RENAMED = {"study": "group"}  # columns of results.csv


@pytest.fixture
def old(tmp_path):
  """old(name): a copy of what version 0.1.0 left under that name."""

  def copy(name: str) -> Path:
    return Path(shutil.copytree(OLD / name, tmp_path / Path(name).name))

  return copy


def start(*argv: str) -> int:
  """The exit code of a command line; the cache that the old config names is not written to."""
  return entry.run([*argv, f"cache={cache()}"])


def sweep_overrides(directory: Path) -> list[str]:
  """What was typed for the sweep in `directory`: the overrides of its first trial, without those that vary."""
  typed = yaml.safe_load((directory / "0" / ".hydra" / "overrides.yaml").read_text())
  varied = {text.split("=")[0] for text in TRIALS}
  return [text for text in typed if text.split("=")[0] not in varied]


def test_fixture_files_name_no_private_path():
  texts = [path.read_text() for path in OLD.rglob("*") if path.suffix in (".yaml", ".json", ".jsonl", ".md", ".csv")]
  assert len(texts) > 50
  assert not [text for text in texts if any(private in text for private in ("/work", "/root", "/home"))]


def same(cell: str, other: str) -> bool:
  """Whether two cells of results.csv are equal, but for the last digit of a sum, which depends on Python's version."""
  try:
    return math.isclose(float(cell), float(other), rel_tol=1e-12)
  except ValueError:
    return cell == other


def test_report_reads_an_old_sweep(old):
  sweep = old("sweep")
  before = list(csv.DictReader((sweep / "results.csv").open()))
  assert start("task=report", f"run={sweep}") == 0
  after = list(csv.DictReader((sweep / "results.csv").open()))
  assert len(after) == len(before) == 4
  for old_row, new_row in zip(before, after, strict=True):
    expected = {key: value for key, value in old_row.items() if not key.startswith(CLOCK)}
    found = {key: new_row[RENAMED.get(key, key)] for key in expected}
    assert [key for key in expected if not same(found[key], expected[key])] == []
  assert "4 trials (4 done) of 2 settings" in (sweep / "report.md").read_text()


def test_old_sweep_that_has_ended_trains_nothing_again(old):
  sweep = old("sweep")
  before = {path: path.read_bytes() for path in sweep.glob("*/metrics.jsonl")}
  argv = [*sweep_overrides(sweep), *TRIALS, "hydra/launcher=packed", f"hydra.sweep.dir={sweep}"]
  assert start("-m", *argv) == 0
  assert len(before) == 4 and all(path.read_bytes() == text for path, text in before.items())


@pytest.mark.slow
def test_old_sweep_that_was_stopped_goes_on(old):
  sweep = old("halted_sweep")
  before = rows(sweep / "0")
  argv = [*sweep_overrides(sweep), "lora.rank=1,2", "hydra/launcher=packed", f"hydra.sweep.dir={sweep}"]
  assert start("-m", *argv) == 0
  for number in (0, 1):
    assert summary(sweep / str(number))["status"] == "done"
    assert [row["step"] for row in rows(sweep / str(number), "train")] == [1, *range(20, 201, 20)]
  assert rows(sweep / "0")[: len(before)] == before


@pytest.mark.slow
def test_old_run_is_resumed_as_the_unbroken_one(old):
  run, unbroken = old("stopped"), curve(OLD / "finished")
  assert start(f"train.resume={run}") == 0
  lines = curve(run)
  assert len(lines) == len(unbroken)
  for line, expected in zip(lines, unbroken, strict=True):
    assert line["split"] == expected["split"]
    numbers = {key: value for key, value in expected.items() if key != "split"}
    assert {key: line[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


def test_old_run_is_evaluated(old):
  run = old("finished")
  assert start("task=evaluate", f"run={run}", "train.eval_tokens=256") == 0
  base, trained = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
  losses = summary(run)["losses"]
  assert base["loss"] == pytest.approx(losses["base"], rel=1e-5)
  assert trained["loss"] == pytest.approx(losses["final"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_old_adapter_of_each_method_has_its_loss(old, method):
  run = old(f"methods/{method}")
  assert start("task=evaluate", f"run={run}", "train.eval_tokens=256") == 0
  base, trained = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
  losses = summary(run)["losses"]
  assert base["loss"] == pytest.approx(losses["base"], rel=1e-5)
  assert trained["loss"] == pytest.approx(losses["final"], rel=1e-5) != base["loss"]


def test_old_run_generates_the_same_text_each_time(old, capfd):
  run = old("finished")
  capfd.readouterr()
  command = ("task=generate", f"run={run}", 'prompt=">>> mystery"', "sample.temperature=0")
  texts = []
  for _ in range(2):
    assert start(*command) == 0
    texts.append(capfd.readouterr().out)
  assert ">>> mystery" in texts[0] and texts[0] == texts[1]


def test_old_run_is_merged_and_exported(old, tmp_path):
  run = old("finished")
  assert start("task=merge", f"run={run}", f"out={tmp_path / 'merged'}") == 0
  assert (tmp_path / "merged" / "model.safetensors").is_file()
  assert start("task=export", f"run={run}", "format=peft", f"out={tmp_path / 'peft'}") == 0
  assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
