"""The metrics of a run. Each is declared once, in `METRICS`, and then appears wherever metrics appear.

A metric is a function of *sums*: numbers that are added up over the tokens, rows and batches of a split, such as the
nats of the loss (`nats`) or the number of target tokens (`count`). `train/evaluating/evaluation.py` computes the sums
and describes each of them. A metric applies to a split if all of its sums exist there: a regression has no `correct`,
so it has no accuracy, and the KL divergence from a teacher gives no `nats`, so it has no perplexity.

Every declared metric that applies is written to metrics.jsonl (training, held-out and retained text), summary.json,
evaluations.jsonl and wandb; it is a column of `task=evaluate`, of results.csv and of the report's table. The report can
rank settings by it (`report.metric=NAME`), a study can optimise it (`hydra.sweeper.objectives=[NAME]`), and an
experiment can require it (`expectations.NAME=NUMBER`).

To add a metric whose sums exist, add one entry to `METRICS`. Its value is the first sum divided by the second, unless
it has a formula:

    Metric("bits_per_token", "bits per token", sums=("nats", "count"), formula=_bits_per_token, unit="bits"),

    def _bits_per_token(totals: Totals) -> float:
      return ratio(totals, "nats", "count") / math.log(2)

The mean of a score of generated answers is such an entry with a function of `answer_scores.py`:

    _answer_metric("rouge_l", "ROUGE-L", answer_scores.rouge_l),

If a metric needs a new sum that comes from the logits, add that to `SUMS` of `train/evaluating/evaluation.py` under the
name that the metric uses. Top-5 accuracy, for example, needs the number of targets among the five most likely tokens:

    def _in_top_five(logits_BV: jax.Array, targets_B: jax.Array) -> jax.Array:
      target_B1 = jnp.take_along_axis(logits_BV, targets_B[:, None], axis=-1)
      return (logits_BV > target_B1).sum(-1) < 5

    def _top_five(predictions: Predictions) -> jax.Array | None:
      if predictions.x_BTD is None:  # numeric examples
        return None
      batch = predictions.batch
      return predictions.map_logits(_in_top_five, batch["targets"]) * batch["weights"]

Nothing else changes. Metrics of generated answers and of choices cost time, and are computed if `eval.metrics` names
them; all others are always computed.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from lora_exp.config import answer_scores
from lora_exp.config.answer_scores import Score

Totals = Mapping[str, float]  # name of a sum -> its total over a split
MAX_EXPONENT = 700.0  # e^710 overflows float64
GENERATED = "generated"  # sum: the number of generated answers
CHOSEN = "chosen"  # sum: the number of questions with choices


@dataclass(frozen=True)
class Metric:
  """A number that says how well a model predicts held-out data."""

  name: str  # in files and in the config
  label: str  # in tables and plots
  sums: tuple[str, ...]  # that `value` needs
  formula: Callable[[Totals], float] | None = None  # None: the first sum divided by the second
  unit: str = ""  # for text; numeric examples have none
  higher_is_better: bool = False
  digits: int = 4  # after the decimal point, in tables
  score: Score | None = None  # of a generated answer; None: not a metric of answers, or defined by eval.metric_file

  def value(self, totals: Totals) -> float:
    """The metric, from the totals of its sums; NaN if it divides by 0."""
    return ratio(totals, *self.sums) if self.formula is None else self.formula(totals)

  @property
  def is_mean(self) -> bool:
    """Whether it is a mean over targets, rows or answers, so that each document has its share of it."""
    return self.formula is None

  @property
  def requested(self) -> bool:
    """Whether it is computed only if `eval.metrics` names it."""
    return self.sums[-1] in (GENERATED, CHOSEN)

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


def _perplexity(totals: Totals) -> float:
  """exp of the mean negative log-likelihood per token."""
  return math.exp(min(ratio(totals, "nats", "count"), MAX_EXPONENT))


def _bits_per_byte(totals: Totals) -> float:
  """Bits per byte of text, which is comparable between tokenizers, unlike the loss per token."""
  return ratio(totals, "nats", "bytes") / math.log(2)


def _answer_metric(name: str, label: str, score: Score | None, digits: int = 4) -> Metric:
  """The mean of a score over the generated answers, of which a higher one is better."""
  return Metric(name, label, sums=(name, GENERATED), score=score, higher_is_better=True, digits=digits)


def _by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
  return {metric.name: metric for metric in metrics}


METRICS: dict[str, Metric] = _by_name([
  # The mean loss per token or example.
  Metric("loss", "loss", sums=("loss", "count"), unit="nats per token"),
  Metric("perplexity", "perplexity", sums=("nats", "count"), formula=_perplexity),
  Metric("bits_per_byte", "bits per byte", sums=("nats", "bytes"), formula=_bits_per_byte),
  # The fraction of targets that are the model's most likely token (or class).
  Metric("accuracy", "accuracy", sums=("correct", "count"), higher_is_better=True),
  # The fraction of rows with responses in which every token of a response, including the end, is the most likely one.
  Metric("exact", "exact match", sums=("exact", "responses"), higher_is_better=True),
  # Means over generated answers.
  _answer_metric("exact_match", "generated exact match", answer_scores.exact_match),
  _answer_metric("f1", "token F1", answer_scores.f1),
  _answer_metric("numeric_match", "numeric match", answer_scores.numeric_match),
  _answer_metric("rouge_l", "ROUGE-L", answer_scores.rouge_l),
  _answer_metric("chrf", "chrF", answer_scores.chrf, digits=2),
  _answer_metric("valid_json", "valid JSON", answer_scores.valid_json),
  _answer_metric("custom", "custom metric", None),  # the function in eval.metric_file
  # The fraction of questions whose correct choice is the most likely one: in total, and per character.
  Metric("choice", "multiple choice", sums=("choice", CHOSEN), higher_is_better=True),
  Metric("choice_norm", "multiple choice, normalised", sums=("choice_norm", CHOSEN), higher_is_better=True),
])
REQUESTED = tuple(name for name, metric in METRICS.items() if metric.requested)  # values of `eval.metrics`


def metric_values(totals: Totals) -> dict[str, float]:
  """The value of every metric that applies, by name, in the order of `METRICS`."""
  return {name: float(metric.value(totals)) for name, metric in METRICS.items() if metric.applies(totals)}
