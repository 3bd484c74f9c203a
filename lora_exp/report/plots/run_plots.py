"""Plots of one run: its losses, and the probabilities of held-out tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.report.estimation.running_median import running_median
from lora_exp.report.plots.axes import limits
from lora_exp.report.plots.colours import PALETTE, evenly_picked
from lora_exp.report.plots.figure import WIDTH, Figure, chart, layered
from lora_exp.runtime.json_lines import read_metrics

COLOURS = {"train": PALETTE[0], "eval": PALETTE[1], "retain": PALETTE[2], "base": PALETTE[7]}
LABELS = {"train": "train", "eval": "held out", "retain": "retain (forgetting)"}
SMOOTHED = 20  # training steps from which their running median is drawn
MOST_POINTS = 1000  # of a curve
CELL_WIDTH, CELL_HEIGHT = 44, 24  # pixels of a token


def plot_loss(run_dir: Path) -> Path:
  """Writes plots/loss.png: the losses of metrics.jsonl against steps and tokens. Raises InputError without a loss."""
  run_dir = Path(run_dir)
  rows = [row for row in read_metrics(run_dir) if "loss" in row]
  if not rows:
    raise InputError(f"{run_dir}: metrics.jsonl has no loss yet; train at least one step")
  return _write(run_dir, "loss.png", loss_figure(rows, f"Loss of {run_dir.name}"))


def _write(run_dir: Path, name: str, figure: Figure) -> Path:
  path = run_dir / "plots" / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(figure.png)
  return path


def loss_figure(rows: list[dict], title: str) -> Figure:
  """Training loss as a thin line and its running median, held-out and retained loss as markers, the base dashed."""
  text = not any("counted" in row and "perplexity" not in row for row in rows)  # otherwise numeric examples
  series = {split: _curve(rows, split) for split in ("train", "eval", "retain")}
  series = {split: points for split, points in series.items() if points}
  names = {split: _name(split, points) for split, points in series.items()}
  base = [row["loss"] for row in rows if row["split"] == "eval" and row["step"] == 0 and row["loss"] is not None]
  if base:
    names["base"] = f"base, held out  {base[0]:.3f}"
  colours = alt.Color("series:N", title=None, scale=alt.Scale(
    domain=list(names.values()), range=[COLOURS[split] for split in names]), legend=alt.Legend(symbolType="stroke"))
  y = alt.Y("loss:Q", title="loss (nats per token)" if text else "loss", scale=_scale(rows))
  x = alt.X("step:Q", **_step_axis(rows, "tokens" if text else "examples"))

  def encoded(points: Sequence[dict[str, Any]]) -> alt.Chart:
    return chart(points).encode(x=x, y=y, color=colours)

  layers = []
  if base:
    layers.append(chart([{"loss": base[0], "series": names["base"]}]).mark_rule(
      strokeDash=[5, 4], strokeWidth=1.4).encode(y=y, color=colours))
  for split, points in series.items():
    named = [point | {"series": names[split]} for point in points]
    if split != "train":
      layers.append(encoded(named).mark_line(strokeWidth=1.4, point={"size": 45, "filled": True}))
    elif len(points) < SMOOTHED:
      layers.append(encoded(named).mark_line(clip=True, strokeWidth=1.4, point={"size": 20, "filled": True}))
    else:
      layers.append(encoded(evenly_picked(named, MOST_POINTS)).mark_line(clip=True, strokeWidth=0.8, opacity=0.4))
      layers.append(encoded(_medians(named)).mark_line(strokeWidth=2))
  return Figure(title, (layered(layers),), entries=tuple(names.values()))


def _curve(rows: list[dict], split: str) -> list[dict[str, Any]]:
  """Steps and losses of one split; None where a loss was not finite."""
  return [{"step": row["step"], "loss": row["loss"]} for row in rows if row["split"] == split]


def _name(split: str, points: Sequence[dict[str, Any]]) -> str:
  """The entry of the legend, with the last value."""
  label, losses = LABELS[split], _losses(points)
  if split == "train" and len(points) >= SMOOTHED:
    label, losses = f"{label}, running median", _losses(_medians(points))
  return f"{label}  {losses[-1]:.3f}"


def _losses(points: Sequence[dict[str, Any]]) -> np.ndarray:
  return np.array([np.nan if point["loss"] is None else point["loss"] for point in points], dtype=float)


def _medians(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The running median of training losses."""
  places, medians = running_median(_losses(points), window=max(5, len(points) // 30))
  return [points[place] | {"loss": float(median)} for place, median in zip(places, medians, strict=True)]


def _scale(rows: list[dict]) -> alt.Scale:
  """The range of the losses without the highest 1 % of training losses, whose spikes would flatten the rest."""
  finite = [row for row in rows if row["loss"] is not None]
  train = [row["loss"] for row in finite if row["split"] == "train"]
  shown = [row["loss"] for row in finite if row["split"] != "train"]
  shown += np.percentile(train, [0, 99]).tolist() if train else []
  around = limits(shown, 0.06)
  return alt.Scale(zero=False) if around is None else alt.Scale(domain=around, nice=False, zero=False)


def _step_axis(rows: list[dict], unit: str) -> dict[str, Any]:
  """The axis of steps, with the tokens (or examples) that were trained on below each of them."""
  last = max(rows, key=_step)
  if not last.get("tokens"):
    return {"title": "step", "axis": alt.Axis(tickMinStep=1)}
  each = last["tokens"] / max(1, last["step"])
  count = f"replace(format(datum.value * {each:.6g}, '.3~s'), 'G', 'B')"
  return {"title": ["step", unit],
          "axis": alt.Axis(tickMinStep=1, labelExpr=f"[datum.label, {count}]", labelLineHeight=15)}


def _step(row: dict) -> int:
  return int(row["step"])


def plot_token_probabilities(run_dir: Path, texts: Sequence[Sequence[str]],
                             token_probabilities: Sequence[np.ndarray]) -> Path:
  """Writes plots/answers.png: a row for each example, a cell for each token, coloured by its probability.

  `texts`: the tokens of each example as text. `token_probabilities`: an array (T,) for each example.
  """
  cells = []
  for example, (tokens, values) in enumerate(zip(texts, token_probabilities, strict=True)):
    for position, (text, value) in enumerate(zip(tokens, values, strict=True)):
      label = text.strip(" ").replace("\n", "↵") or "␣"
      share = float(value)
      cells.append({"x": position, "y": example, "text": label[:8], "probability": share, "dark": share < 0.6})
  x = alt.X("x:O", title="token", axis=alt.Axis(labelAngle=0))
  y = alt.Y("y:O", title="held-out example")
  scale = alt.Scale(scheme="viridis", domain=[0, 1])
  colour = alt.Color("probability:Q", title="probability", scale=scale)
  ink = alt.Color("dark:N", scale=alt.Scale(domain=[True, False], range=["white", "black"]), legend=None)
  squares = chart(cells).mark_rect().encode(x=x, y=y, color=colour)
  words = chart(cells).mark_text(fontSize=8).encode(x=x, y=y, text="text:N", color=ink)
  panel = layered([squares, words], height=CELL_HEIGHT * len(texts)).resolve_scale(color="independent")
  longest = max(map(len, texts))
  return _write(Path(run_dir), "answers.png", Figure(
    "Probability of each token, given those before it", (panel,), width=max(WIDTH // 2, CELL_WIDTH * longest)))
