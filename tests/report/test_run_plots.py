"""The plot of a run shows the values of its metrics.jsonl."""

import json
import re

import numpy as np
import pytest

from lora_exp.config.errors import InputError
from lora_exp.report.estimation.running_median import running_median
from lora_exp.report.plots.run_plots import loss_figure, plot_loss


def rows_of(steps: int) -> list[dict]:
  """A run of 32 tokens a step, evaluated before and after, with a retain split."""
  rows = [{"step": 0, "tokens": 0, "split": split, "loss": loss} for split, loss in (("eval", 4.0), ("retain", 3.0))]
  rows += [{"step": i, "tokens": 32 * i, "split": "train", "loss": 4 - i / steps, "lr": 1e-3}
           for i in range(1, steps + 1)]
  return [*rows, {"step": steps, "tokens": 32 * steps, "split": "eval", "loss": 3.1},
          {"step": steps, "tokens": 32 * steps, "split": "retain", "loss": 3.25}]


def write(run_dir, rows) -> None:
  run_dir.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(figure) -> dict[str, list[tuple[int, float]]]:
  """Curve -> its (step, loss), as drawn; the base has no step. Of training losses, the last layer counts."""
  [spec] = figure.specs
  curves = {}
  for layer in spec["layer"]:
    rows = spec["datasets"][layer.get("data", spec.get("data"))["name"]]  # one layer has the data of the chart
    curves[rows[0]["series"].split("  ")[0]] = [(row.get("step"), row["loss"]) for row in rows]
  return curves


def axis_of(figure, name: str) -> dict:
  return figure.specs[0]["layer"][-1]["encoding"][name]


def test_loss_plot_is_written_and_overwritten(tmp_path):
  write(tmp_path, rows_of(40))
  for _ in range(2):
    path = plot_loss(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_every_curve_is_drawn_with_its_values():
  figure = loss_figure(rows_of(10), "run")
  lines = lines_of(figure)
  np.testing.assert_allclose([loss for _, loss in lines["train"]], 4 - np.arange(1, 11) / 10)
  assert lines["held out"] == [(0, 4.0), (10, 3.1)]
  assert lines["retain (forgetting)"] == [(0, 3.0), (10, 3.25)]
  assert lines["base, held out"] == [(None, 4.0)]
  assert figure.specs[0]["layer"][0]["mark"] == {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.4}
  assert figure.entries == ("train  3.000", "held out  3.100", "retain (forgetting)  3.250", "base, held out  4.000")


def test_a_curve_that_is_not_there_is_not_in_the_legend():
  rows = [row for row in rows_of(10) if row["split"] == "train"]
  assert set(lines_of(loss_figure(rows, "run"))) == {"train"}


def test_the_axis_counts_the_tokens_of_the_steps():
  figure = loss_figure(rows_of(1000), "run")
  assert axis_of(figure, "x")["title"] == ["step", "tokens"]
  shown = re.findall(r">([\d.]+k?)<", figure.svg)
  assert {"200", "6.4k", "1,000", "32k"} <= set(re.findall(r">([\d.,]+k?)<", figure.svg)), shown


def test_spike_does_not_move_median_or_axis_limits():
  rows = rows_of(200)
  quiet = axis_of(loss_figure(rows, "run"), "y")["scale"]["domain"]
  next(row for row in rows if row["step"] == 100)["loss"] = 900.0
  figure = loss_figure(rows, "run")
  assert axis_of(figure, "y")["scale"]["domain"] == pytest.approx(quiet, rel=0.05)
  assert max(loss for _, loss in lines_of(figure)["train, running median"]) < 4


def test_a_long_run_keeps_a_bounded_number_of_points():
  assert sum(map(len, loss_figure(rows_of(30_000), "run").specs[0]["datasets"].values())) < 3000


def test_a_diverged_run_can_be_looked_at(tmp_path):
  write(tmp_path, [row | ({"loss": None} if row["step"] >= 30 else {}) for row in rows_of(40)])
  assert plot_loss(tmp_path).exists()
  write(tmp_path, [{"step": 1, "tokens": 8, "split": "train", "loss": None}])
  assert plot_loss(tmp_path).exists()


def test_the_running_median_is_the_median_of_the_window():
  values = np.array([5.0, 1, 9, 3, np.nan, 7])
  places, medians = running_median(values, window=3)
  assert list(places) == [0, 1, 2, 3, 4, 5]
  assert list(medians) == [3, 5, 3, 6, 5, 7]
  assert len(running_median(np.ones(100_000), window=3333)[0]) == 400


def test_without_a_loss_the_error_says_so(tmp_path):
  with pytest.raises(InputError, match=r"metrics\.jsonl does not exist"):
    plot_loss(tmp_path)
  write(tmp_path, [])
  with pytest.raises(InputError, match="no loss yet"):
    plot_loss(tmp_path)
