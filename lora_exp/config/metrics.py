"""The metrics of a run. Each is declared once, in `METRICS`, and then appears wherever metrics appear.

A metric is a function of *sums*: numbers that are added up over the tokens, rows and batches of a split, such as the
nats of the loss (`nats`) or the number of target tokens (`count`). `train/evaluation.py` computes the sums and
describes each of them. A metric applies to a split if all of its sums exist there: a regression has no `correct`, so
it has no accuracy, and the KL divergence from a teacher gives no `nats`, so it has no perplexity.

Every declared metric that applies is written to metrics.jsonl (training, held-out and retained text), summary.json,
evaluations.jsonl and wandb; it is a column of `task=evaluate`, of results.csv and of the report's table. The report can
rank settings by it (`report.metric=NAME`), a study can optimise it (`hydra.sweeper.objectives=[NAME]`), and an
experiment can require it (`expectations.NAME=NUMBER`).

To add a metric whose sums exist, add one entry to `METRICS`:

    Metric("bits_per_token", "bits per token", sums=("nats", "count"), value=_bits_per_token, unit="bits"),

with its value, a function of the sums:

    def _bits_per_token(totals: Totals) -> float:
      return ratio(totals, "nats", "count") / math.log(2)

If it needs a new sum, add that to `SUMS` of `train/evaluation.py` under the name that the metric uses; top-5 accuracy,
for example, needs the number of targets among the five most likely tokens:

    def _in_top_five(logits_BV: jax.Array, targets_B: jax.Array) -> jax.Array:
      target_B1 = jnp.take_along_axis(logits_BV, targets_B[:, None], axis=-1)
      return (logits_BV > target_B1).sum(-1) < 5

    def _top_five(predictions: Predictions) -> jax.Array | None:
      if predictions.x_BTD is None:  # numeric examples
        return None
      batch = predictions.batch
      return predictions.map_logits(_in_top_five, batch["targets"]) * batch["weights"]

Nothing else changes.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

Totals = Mapping[str, float]  # name of a sum -> its total over a split
MAX_EXPONENT = 700.0  # e^710 overflows float64


@dataclass(frozen=True)
class Metric:
  """A number that says how well a model predicts held-out data."""

  name: str  # in files and in the config
  label: str  # in tables and plots
  sums: tuple[str, ...]  # that `value` needs
  value: Callable[[Totals], float]
  unit: str = ""  # for text; numeric examples have none
  higher_is_better: bool = False
  digits: int = 4  # after the decimal point, in tables

  @property
  def sign(self) -> int:
    """1 if a lower value is better, -1 if a higher one is: `sign * value` is always to be minimised."""
    return -1 if self.higher_is_better else 1

  @property
  def best_word(self) -> str:
    return "highest" if self.higher_is_better else "lowest"

  @property
  def worst_word(self) -> str:
    return "lowest" if self.higher_is_better else "highest"

  @property
  def better_side(self) -> str:
    """Where a better value lies: "above" or "below" a worse one."""
    return "above" if self.higher_is_better else "below"

  def applies(self, sums: Collection[str]) -> bool:
    """Whether every sum that it needs is among `sums`."""
    return all(name in sums for name in self.sums)


def ratio(totals: Totals, numerator: str, denominator: str) -> float:
  """One sum divided by another; NaN if the divisor is 0."""
  return totals[numerator] / totals[denominator] if totals[denominator] else math.nan


def _loss(totals: Totals) -> float:
  """Mean loss per token or example."""
  return ratio(totals, "loss", "count")


def _perplexity(totals: Totals) -> float:
  """exp of the mean negative log-likelihood per token."""
  return math.exp(min(ratio(totals, "nats", "count"), MAX_EXPONENT))


def _bits_per_byte(totals: Totals) -> float:
  """Bits per byte of text, which is comparable between tokenizers, unlike the loss per token."""
  return ratio(totals, "nats", "bytes") / math.log(2)


def _accuracy(totals: Totals) -> float:
  """Fraction of targets that are the model's most likely token (or class)."""
  return ratio(totals, "correct", "count")


def _exact(totals: Totals) -> float:
  """Fraction of responses in which every token, including the end, is the most likely one."""
  return ratio(totals, "exact", "responses")


def _by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
  return {metric.name: metric for metric in metrics}


METRICS: dict[str, Metric] = _by_name([
  Metric("loss", "loss", sums=("loss", "count"), value=_loss, unit="nats per token"),
  Metric("perplexity", "perplexity", sums=("nats", "count"), value=_perplexity),
  Metric("bits_per_byte", "bits per byte", sums=("nats", "bytes"), value=_bits_per_byte),
  Metric("accuracy", "accuracy", sums=("correct", "count"), value=_accuracy, higher_is_better=True),
  Metric("exact", "exact match", sums=("exact", "responses"), value=_exact, higher_is_better=True),
])


def metric_values(totals: Totals) -> dict[str, float]:
  """The value of every metric that applies, by name, in the order of `METRICS`."""
  return {name: float(metric.value(totals)) for name, metric in METRICS.items() if metric.applies(totals)}
