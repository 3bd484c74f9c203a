"""A damaged, edited or repeated trial is named in the report, and the rest of the report stands."""

import html
import json

import pytest
import yaml
from reports import read_results

from lora_exp.cli import main as entry
from lora_exp.report.reading.run_reader import read_run, read_sweep
from lora_exp.report.sweep_report import make_report, make_table
from sweeps import ranks, trial

HUGE = 10**400


def _edit_summary(path, **change):
  summary = json.loads((path / "summary.json").read_text()) | change
  (path / "summary.json").write_text(json.dumps(summary))


def _edit_config(path, key, value):
  config = yaml.safe_load((path / "config.yaml").read_text())
  *groups, name = key.split(".")
  node = config
  for group in groups:
    node = node[group]
  node[name] = value
  (path / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("key, value, reason", [
  ("lora.rank", None, "config.yaml: lora.rank=null: must be a whole number"),
  ("lora.rank", "eight", "config.yaml: lora.rank=eight: must be a whole number"),
  pytest.param("lora.rank", HUGE, f"config.yaml: lora.rank={str(HUGE)[:57]}...: is too large", id="huge"),
  ("optim.lr", "fast", "config.yaml: optim.lr=fast: must be a number"),
  ("lora.targets", 5, "config.yaml: lora.targets=5: must be a preset, a pattern, or a list of them"),
  ("lora", None, "config.yaml: lora=null: must be a group of settings"),
])
def test_wrong_setting_is_named_and_its_trial_left_out(tmp_path, key, value, reason):
  path = trial(tmp_path, 0, 2.0)
  _edit_config(path, key, value)
  run = read_run(0, path)
  assert run.status == "failed" and run.reason.startswith(reason) and run.result("loss") is None


def test_number_that_yaml_reads_as_text_is_a_number(tmp_path):
  path = trial(tmp_path, 0, 2.0)
  (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("  lr: 0.005", "  lr: 5e-3"))
  assert read_run(0, path).reason is None and read_run(0, path).config["optim.lr"] == 0.005


@pytest.mark.parametrize("change, reason", [
  ({"fingerprints": "abc"}, "fingerprints=abc: must be a mapping"),
  ({"base": "random"}, "base=random: must be a mapping"),
  ({"targets": 7}, "targets=7: must be a list"),
  ({"targets": ["a"]}, "targets[0]=a: must be a mapping"),
  ({"losses": {"best": "low"}}, "losses.best=low: must be a number"),
  ({"parameters": {"trainable": [1]}}, "parameters.trainable=[1]: must be a number"),
  ({"status": "dune"}, "status=dune: must be one of done, "),
])
def test_wrong_field_of_summary_is_named(tmp_path, change, reason):
  path = trial(tmp_path, 0, 2.0)
  _edit_summary(path, **change)
  run = read_run(0, path)
  assert run.status == "failed" and run.reason.startswith(f"summary.json: {reason}")


@pytest.mark.parametrize("line, reason", [
  ('{"step": 40, "loss": 1.0}', "has no split"),
  ('{"step": 40, "split": ["eval"], "loss": 1.0}', "has split=['eval'], which must be train, eval or retain"),
  ('{"step": "40", "split": "eval"}', "has step=40, which must be a whole number from 0"),
  ('{"step": 40, "split": "eval", "loss": "low"}', "has loss=low, which must be a number"),
  ("[40]", "is not a JSON object"),
])
def test_wrong_line_of_metrics_is_named_and_the_trial_counts(tmp_path, line, reason):
  ranks(tmp_path, {1: 2.5, 4: 2.0})
  with open(tmp_path / "0" / "metrics.jsonl", "a") as file:
    file.write(f"{line}\n")
  report = make_report(tmp_path)
  assert report.warnings == [f"Trial 0 counts, but metrics.jsonl: line 35 {reason}."]
  assert f"metrics.jsonl: line 35 {reason}" in html.unescape((tmp_path / "report.html").read_text())
  assert report.runs[0].result("loss") is not None and len(report.runs[0].curve("eval")) == 2


def test_damaged_lines_of_the_ledger_are_named(tmp_path):
  ranks(tmp_path, {1: 2.5, 4: 2.0})
  lines = ['{"event": "trial", "study_trial": 0}', '{"event": "trial", "study_trial": 1, "runs": [3]}', "no JSON",
           '{"event": "pack", "trials": "all"}', '{"event": "done", "trial": 5}']
  (tmp_path / "sweep.jsonl").write_text("\n".join([*lines, '{"event": "do']))
  assert make_report(tmp_path).warnings == [
    "sweep.jsonl: line 1 is a trial of a study without the runs that it trained.",
    "sweep.jsonl: line 3 is not a JSON object.",
    "sweep.jsonl: line 4 has trials=all, which must be a list of trials.",
  ]


@pytest.mark.parametrize("seed, text", [
  (2.0, "and the same loss. Trial 0 counts."), (2.1, "and another loss, 2.1 instead of 2. Trial 0 counts."),
])
def test_a_repeated_trial_is_named_and_counts_once(tmp_path, seed, text):
  trial(tmp_path, 0, 2.0)
  trial(tmp_path, 1, 2.5, train__seed=1)
  trial(tmp_path, 2, seed)
  report = make_report(tmp_path)
  assert report.warnings == [f"Trial 2 repeats trial 0: it has the same settings and seeds {text}"]
  assert report.sections[0].group.settings[0].score.mean == 2.25


def test_metrics_that_contradict_the_summary_are_named(tmp_path):
  _edit_summary(trial(tmp_path, 0, 2.0), losses={"base": 3.0, "best": 1.5, "best_step": 32, "final": 1.5})
  [run] = read_sweep(tmp_path)
  assert run.reason == (
    "metrics.jsonl has the held-out loss 2 at step 32, but summary.json has losses.best=1.5; "
    "metrics.jsonl has the held-out loss 2 at step 32, but summary.json has losses.final=1.5"
  )


@pytest.mark.parametrize("key, value, other", [("lora.rank", 4, 8), ("lora.alpha", 4.0, 16.0)])
def test_an_edited_rank_or_alpha_is_named_and_left_out(tmp_path, key, value, other):
  rows = [{"path": "a", "rank": 8, "alpha": 16.0, "scale": 2.0}]
  path = trial(tmp_path, 0, 2.0, change={"targets": rows}, lora__rank=8, lora__alpha=16.0)
  assert read_run(0, path).status == "done"
  _edit_config(path, key, value)
  run = read_run(0, path)
  assert (run.status, run.reason) == ("failed", f"config.yaml has {key}={value:g}, but summary.json has {other:g}")


def test_a_rank_other_than_the_adapters_is_named(tmp_path):
  path = trial(tmp_path, 0, 2.0, lora__rank=4)
  (path / "adapter").mkdir()
  (path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
  assert read_run(0, path).reason == "config.yaml has lora.rank=4, but adapter/adapter_config.json has 8"


def test_trials_of_other_dtypes_are_not_compared(tmp_path):
  for n, dtype in enumerate(("float32", "bfloat16")):
    trial(tmp_path, n, 2.0 + n, model__dtype=dtype, lora__rank=2 + n)
  _, groups, _ = make_table(tmp_path)
  assert [group.why for group in groups] == ["the dtypes", "the dtypes"]


def test_a_folder_named_like_a_date_is_no_trial(tmp_path):
  ranks(tmp_path, {1: 2.5})
  for name in ("2026112", "20261127", "99999999", "007"):
    (tmp_path / name).mkdir()
  assert [run.number for run in read_sweep(tmp_path)] == [0, 1, 2]
  trial(tmp_path, 99999999 * 10, 2.5)
  assert [run.number for run in read_sweep(tmp_path)] == [0, 1, 2, 999999990]


def test_the_ledger_tells_which_trials_exist(tmp_path):
  ranks(tmp_path, {1: 2.5})
  (tmp_path / "sweep.jsonl").write_text('{"event": "pack", "arms": [0, 1, 2, 3]}\n{"event": "failed", "trial": 150}\n')
  (tmp_path / "17").mkdir()
  assert [(run.number, run.status) for run in read_sweep(tmp_path)] == [
    (0, "done"), (1, "done"), (2, "done"), (3, "missing"), (150, "missing")]


def test_a_single_finished_run_is_not_a_sweep(tmp_path, capsys):
  path = trial(tmp_path, 0, 2.0)
  (path / ".hydra").mkdir()
  (path / ".hydra" / "config.yaml").write_text("a: 1")
  assert entry.run(["task=report", f"run={path}"]) == 2
  assert "is one run" in capsys.readouterr().err and not (path / "report.html").exists()
  make_table(tmp_path)
  assert len(read_results(tmp_path)) == 1


@pytest.mark.parametrize("name", ["=HYPERLINK(0)", "+1", "-1+cmd", "@SUM(A1)", "\t=1"])
def test_results_csv_holds_no_formula(tmp_path, name):
  ranks(tmp_path, {2: 2.5, 4: 2.4})
  trial(tmp_path, 9, 2.3, name=name, lora__rank=8)
  make_report(tmp_path)
  [row] = [row for row in read_results(tmp_path) if row["number"] == "9"]
  assert row["name"] == f"'{name}"
  assert float(row["gain"]) == pytest.approx(0.7)
