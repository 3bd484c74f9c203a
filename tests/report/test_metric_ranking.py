"""A report ranks settings by the metric that is asked for, in its better direction."""

import csv
import json
from pathlib import Path

import pytest

from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.findings.finding import Finding
from lora_exp.report.grouping.group import Group, make_groups
from lora_exp.report.plots.axes import axis_label
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.sweep_report import make_report
from lora_exp.report.verdicts.tuning import best_of
from sweeps import trial

LOSSES = {1: 2.0, 2: 2.2, 4: 2.4}  # of each rank
ACCURACIES = {1: 0.30, 2: 0.50, 4: 0.501}  # the order of the losses, reversed
BASE_ACCURACY = 0.2
LEARNING_RATES = (0.001, 0.01, 0.1)


def make_sweep(directory: Path) -> Path:
  """Three ranks at three learning rates, the middle one best, three seeds each, and full fine-tuning."""
  number = 0
  for rank in LOSSES:
    for lr in LEARNING_RATES:
      for seed in range(3):
        worse = 0 if lr == 0.01 else 0.05
        shift = 0.001 * (seed - 1) + 0.0001 * ((rank * 7 + seed * 3) % 5 - 2)
        best = {"loss": LOSSES[rank] + worse + shift, "accuracy": ACCURACIES[rank] - worse + shift}
        scores = {"base": {"loss": 3.0, "accuracy": BASE_ACCURACY}, "best": best}
        settings = {"lora__rank": rank, "optim__lr": lr, "train__seed": seed}
        trial(directory, number, best["loss"], change={"scores": scores}, **settings)
        number += 1
  full = {"base": {"loss": 3.0, "accuracy": BASE_ACCURACY}, "best": {"loss": 1.9, "accuracy": 0.6}}
  trial(directory, number, 1.9, change={"scores": full}, lora__method="full")
  return directory


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return make_sweep(tmp_path_factory.mktemp("ranking"))


def group_by(sweep: Path, metric: str) -> Group:
  [group] = make_groups(read_sweep(sweep), METRICS[metric])
  return group


def finding(group: Group, topic: str) -> Finding:
  [found] = [f for f in all_findings(group) if f.topic == topic]
  return found


def test_the_best_setting_is_that_of_the_metric(sweep):
  assert [best_of(group_by(sweep, metric).adapted).values["lora.rank"] for metric in ("loss", "accuracy")] == [1, 4]


def test_gain_and_share_are_positive_in_both_directions(sweep):
  group = group_by(sweep, "accuracy")
  best = best_of(group.adapted)
  assert best.gain.mean == pytest.approx(ACCURACIES[4] - BASE_ACCURACY, abs=1e-3)
  assert group.share(best).mean == pytest.approx((ACCURACIES[4] - BASE_ACCURACY) / (0.6 - BASE_ACCURACY), abs=1e-2)


def test_the_findings_follow_the_metric(sweep):
  by_accuracy = group_by(sweep, "accuracy")
  rank = finding(by_accuracy, "Rank")
  assert rank.concluded and rank.text.startswith("Rank 2 is enough")
  assert "held-out accuracy" in rank.text and rank.values["insufficient"] == [1] and rank.values["best"] == 4
  assert "highest mean held-out accuracy: rank 1: 0.01" in finding(by_accuracy, "Rate").text
  by_loss = finding(group_by(sweep, "loss"), "Rank")
  assert by_loss.values["rank"] == 1 and by_loss.values["insufficient"] == [2, 4]


def test_metrics_that_disagree_are_told_first(sweep):
  first = all_findings(group_by(sweep, "loss"))[0]
  assert first.topic == "Metrics" and "loss and the accuracy disagree on the order" in first.text
  assert any("rank 1" in better and "rank 4" in worse for worse, better in first.values["pairs"])


def test_the_page_and_the_table_show_every_metric(sweep):
  make_report(sweep, "accuracy")
  page = (sweep / "report.md").read_text()
  headings = next(line for line in page.splitlines() if line.startswith("| setting"))
  assert "held-out accuracy" in headings and "| loss |" in headings and "perplexity" not in headings
  assert "the held-out accuracy rises from" in page and "highest held-out accuracy" in page
  assert {path.name for path in (sweep / "plots").iterdir()} >= {"pareto.png", "rate.png", "curves.png"}
  with open(sweep / "results.csv", newline="") as file:
    row = next(csv.DictReader(file))
  assert (float(row["accuracy_base"]), row["loss"] < row["loss_base"]) == (BASE_ACCURACY, True)
  assert "perplexity" not in row


def test_an_axis_states_unit_and_direction(sweep):
  assert axis_label(group_by(sweep, "loss")) == "held-out loss (nats per token)"
  assert axis_label(group_by(sweep, "accuracy")) == "held-out accuracy (higher is better)"


def test_a_metric_that_no_trial_has_counts_none(sweep):
  report = make_report(sweep, "exact")
  assert {reason for *_, reason in report.not_counted} == {"it has no held-out exact match"}
  assert len(report.not_counted) == len(report.runs)


def test_the_metric_of_an_old_run_is_in_its_curve(tmp_path):
  """Version 0.1.0 kept the scores of the first and the last evaluation only."""
  run = trial(tmp_path, 0, 2.0, change={"scores": {"base": {"accuracy": 0.1}, "final": {"accuracy": 0.3}}})
  step = json.loads((run / "summary.json").read_text())["losses"]["best_step"]
  with open(run / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": step, "tokens": 0, "split": "eval", "loss": 2.0, "accuracy": 0.4}) + "\n")
  [record] = read_sweep(tmp_path)
  assert (record.base("accuracy"), record.exported("accuracy")) == (0.1, 0.4)


def test_a_study_is_ranked_by_what_it_optimised(tmp_path):
  scores = {"base": {"accuracy": 0.2}, "best": {"accuracy": 0.5}}
  trial(tmp_path, 0, 2.0, change={"scores": scores})
  (tmp_path / "sweep.jsonl").write_text('{"event": "study", "objectives": ["trainable", "accuracy"]}\n')
  assert make_report(tmp_path).metric.name == "accuracy"
  assert make_report(tmp_path, "loss").metric.name == "loss"
