"""The plot of a run shows the values of its metrics.jsonl."""

import json

import numpy as np
import pytest

from lora_exp.config.errors import InputError
from lora_exp.report.plots.run_plots import loss_figure, plot_loss
from lora_exp.report.statistics.running_median import running_median


def rows_of(steps: int) -> list[dict]:
  """A run of 32 tokens a step, evaluated before and after, with a retain split."""
  rows = [{"step": 0, "tokens": 0, "split": split, "loss": loss} for split, loss in (("eval", 4.0), ("retain", 3.0))]
  rows += [{"step": i, "tokens": 32 * i, "split": "train", "loss": 4 - i / steps, "lr": 1e-3}
           for i in range(1, steps + 1)]
  return [*rows, {"step": steps, "tokens": 32 * steps, "split": "eval", "loss": 3.1},
          {"step": steps, "tokens": 32 * steps, "split": "retain", "loss": 3.25}]


def write(run_dir, rows) -> None:
  run_dir.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(figure) -> dict[str, object]:
  return {line.get_label().split("  ")[0]: line for line in figure.axes[0].lines}


def test_loss_plot_is_written_and_overwritten(tmp_path):
  write(tmp_path, rows_of(40))
  for _ in range(2):
    path = plot_loss(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_every_curve_is_drawn_with_its_values():
  lines = lines_of(loss_figure(rows_of(10), "run"))
  np.testing.assert_allclose(lines["train"].get_ydata(), 4 - np.arange(1, 11) / 10)
  assert list(lines["held out"].get_xdata()) == [0, 10]
  assert list(lines["held out"].get_ydata()) == [4.0, 3.1]
  assert list(lines["retain (forgetting)"].get_ydata()) == [3.0, 3.25]
  assert set(lines["base, held out"].get_ydata()) == {4.0}
  assert lines["base, held out"].get_linestyle() == "--"


def test_a_curve_that_is_not_there_is_not_in_the_legend():
  rows = [row for row in rows_of(10) if row["split"] == "train"]
  assert set(lines_of(loss_figure(rows, "run"))) == {"train"}


def test_the_axis_above_counts_the_tokens_of_the_steps_below():
  figure = loss_figure(rows_of(1000), "run")
  figure.draw_without_rendering()
  axes = figure.axes[0]
  above = axes.child_axes[0]
  assert above.get_xlabel() == "tokens"
  labels = {int(x): text.get_text() for x, text in zip(above.get_xticks(), above.get_xticklabels(), strict=True)}
  assert len(labels) >= 4 and labels[0] == "0"
  assert all(text == f"{32 * step / 1000:.3g}k" for step, text in labels.items() if step)


def test_spike_does_not_move_median_or_axis_limits():
  rows = rows_of(200)
  quiet = loss_figure(rows, "run").axes[0].get_ylim()
  next(row for row in rows if row["step"] == 100)["loss"] = 900.0
  figure = loss_figure(rows, "run")
  assert figure.axes[0].get_ylim() == pytest.approx(quiet, rel=0.05)
  assert lines_of(figure)["train, running median"].get_ydata().max() < 4


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
