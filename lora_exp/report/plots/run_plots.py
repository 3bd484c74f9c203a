"""Plots of one run: its losses, and the probabilities of held-out tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_exp.config.errors import InputError
from lora_exp.report.plots.colours import PALETTE
from lora_exp.report.plots.counts import short_count
from lora_exp.report.statistics.running_median import running_median
from lora_exp.runtime.json_lines import read_metrics

COLOURS = {"train": PALETTE[0], "eval": PALETTE[1], "retain": PALETTE[2], "base": PALETTE[7]}
LABELS = {"train": "train", "eval": "held out", "retain": "retain (forgetting)"}


def plot_loss(run_dir: Path) -> Path:
  """Writes plots/loss.png: the losses of metrics.jsonl against steps and tokens. Raises InputError without a loss."""
  run_dir = Path(run_dir)
  rows = [row for row in read_metrics(run_dir) if "loss" in row]
  if not rows:
    raise InputError(f"{run_dir}: metrics.jsonl has no loss yet; train at least one step")
  path = run_dir / "plots" / "loss.png"
  path.parent.mkdir(exist_ok=True)
  loss_figure(rows, run_dir.name).savefig(path, dpi=150)
  return path


def loss_figure(rows: list[dict], title: str) -> Figure:
  """Training loss as a thin line and its running median, held-out and retained loss as markers, the base dashed."""
  figure = Figure(figsize=(8.5, 5), layout="constrained")
  axes = figure.add_subplot()
  for split in ("train", "eval", "retain"):
    steps, losses = _curve(rows, split)
    if not len(steps):
      continue
    if split == "train":
      _draw_train(axes, steps, losses)
    else:
      axes.plot(steps, losses, "o-", ms=5, lw=1.2, color=COLOURS[split], label=f"{LABELS[split]}  {losses[-1]:.3f}")
  base = [row["loss"] for row in rows if row["split"] == "eval" and row["step"] == 0 and row["loss"] is not None]
  if base:
    axes.axhline(base[0], ls="--", lw=1.2, color=COLOURS["base"], label=f"base, held out  {base[0]:.3f}", zorder=1)
  text = not any("counted" in row and "perplexity" not in row for row in rows)  # otherwise numeric examples
  axes.set(xlabel="step", ylabel="loss (nats per token)" if text else "loss", ylim=_limits(rows))
  axes.set_title(title, loc="left", fontsize=11)
  axes.grid(alpha=0.25, lw=0.6)
  axes.spines[["right"]].set_visible(False)
  axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
  figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  _token_axis(axes, rows, "tokens" if text else "examples")
  return figure


def plot_token_probabilities(run_dir: Path, texts: Sequence[Sequence[str]],
                             token_probabilities: Sequence[np.ndarray]) -> Path:
  """Writes plots/answers.png: a row for each example, a cell for each token, coloured by its probability.

  `texts`: the tokens of each example as text. `token_probabilities`: an array (T,) for each example.
  """
  longest = max(map(len, texts))
  grid = np.full((len(texts), longest), np.nan)
  for row, values in zip(grid, token_probabilities, strict=True):
    row[: len(values)] = values
  figure = Figure(figsize=(2 + 0.42 * longest, 1.6 + 0.24 * len(texts)), layout="constrained")
  axes = figure.add_subplot()
  image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
  for y, tokens in enumerate(texts):
    for x, text in enumerate(tokens):
      dark = grid[y, x] < 0.6
      label = text.strip(" ").replace("\n", "↵").replace("$", r"\$") or "␣"
      axes.text(x, y, label[:8], ha="center", va="center", fontsize=6, color="white" if dark else "black")
  axes.set(xlabel="token", ylabel="held-out example", title="Probability of each token, given those before it")
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  figure.colorbar(image, label="probability")
  path = Path(run_dir) / "plots" / "answers.png"
  path.parent.mkdir(exist_ok=True)
  figure.savefig(path, dpi=150)
  return path


def _curve(rows: list[dict], split: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and losses of one split, NaN where a loss was not finite."""
  points = [(row["step"], np.nan if row["loss"] is None else row["loss"]) for row in rows if row["split"] == split]
  steps, losses = np.array(points, dtype=float).reshape(-1, 2).T
  return steps, losses


def _draw_train(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
  """The training losses; from 20 steps on, thin and with their running median."""
  colour, label = COLOURS["train"], LABELS["train"]
  if len(steps) < 20:
    axes.plot(steps, losses, ".-", lw=1.2, color=colour, label=f"{label}  {losses[-1]:.3f}")
    return
  places, medians = running_median(losses, window=max(5, len(steps) // 30))
  axes.plot(steps, losses, lw=0.7, alpha=0.35, color=colour)
  axes.plot(steps[places], medians, lw=1.8, color=colour, label=f"{label}, running median  {medians[-1]:.3f}")


def _limits(rows: list[dict]) -> tuple[float, float] | None:
  """The range of the losses without the highest 1 % of training losses, whose spikes would flatten the rest."""
  finite = [row for row in rows if row["loss"] is not None]
  train = [row["loss"] for row in finite if row["split"] == "train"]
  shown = [row["loss"] for row in finite if row["split"] != "train"]
  shown += list(np.percentile(train, [0, 99])) if train else []
  if not shown or min(shown) == max(shown):
    return None
  margin = 0.06 * (max(shown) - min(shown))
  return min(shown) - margin, max(shown) + margin


def _token_axis(axes: Axes, rows: list[dict], unit: str) -> None:
  """A second x axis above: the tokens (or examples) trained on at the steps of the axis below."""
  points = sorted({(row["step"], row["tokens"]) for row in rows if "tokens" in row})
  if not points or points[-1][1] == 0:
    return
  steps, tokens = np.array(points, dtype=float).T
  low, high = axes.get_xlim()
  ticks = [tick for tick in axes.get_xticks() if max(low, steps[0]) <= tick <= min(high, steps[-1])]
  above = axes.secondary_xaxis("top")
  above.set_xticks(ticks, [short_count(value) for value in np.interp(ticks, steps, tokens)])
  above.set_xlabel(unit)
