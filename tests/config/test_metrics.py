"""Declared metrics: their values, where they apply, and how a config names them."""

import math
import re

import pytest

from lora_exp.config import check, to_config
from lora_exp.config.metrics import METRICS, Metric, Totals, metric_values, ratio

NAMES = ("loss", "perplexity", "bits_per_byte", "accuracy", "exact")  # the tests hold for any other metric besides
SETTINGS = {"model": {"base": "random"}, "data": {"view": "docs"}}
TEXT = {"loss": 60.0, "nats": 60.0, "correct": 5.0, "count": 20.0, "bytes": 80.0, "exact": 1.0, "responses": 4.0}


def without(*names: str) -> dict[str, float]:
  return {name: value for name, value in TEXT.items() if name not in names}


def test_values_follow_from_the_sums():
  expected = {
    "loss": 3.0, "perplexity": math.exp(3), "bits_per_byte": 60 / 80 / math.log(2), "accuracy": 0.25, "exact": 0.25}
  values = metric_values(TEXT)
  assert {name: values[name] for name in NAMES} == pytest.approx(expected)


@pytest.mark.parametrize(("missing", "names"), [
  (("nats", "bytes", "exact", "responses"), ["loss", "accuracy"]),  # a teacher, or classes
  (("nats", "bytes", "exact", "responses", "correct"), ["loss"]),  # a regression
  (("bytes", "exact", "responses"), ["loss", "perplexity", "accuracy"]),  # padding in the loss
])
def test_a_metric_applies_where_its_sums_exist(missing, names):
  assert [name for name in metric_values(without(*missing)) if name in NAMES] == names


def test_nothing_counted_is_nan_and_a_huge_loss_is_finite():
  assert math.isnan(ratio({"a": 1.0, "b": 0.0}, "a", "b"))
  assert math.isfinite(METRICS["perplexity"].value({"nats": 1e6, "count": 1.0}))


def test_the_sign_makes_every_metric_a_penalty():
  assert [METRICS[name].sign for name in NAMES] == [1, 1, 1, -1, -1]


@pytest.mark.parametrize(("setting", "problem"), [
  ({"report": {"metric": "acuracy"}}, "report.metric=acuracy: choose loss, perplexity, .*; did you mean accuracy?"),
  ({"expectations": {"perplexty": 9.0}}, "expectations.perplexty: choose .*; did you mean perplexity?"),
])
def test_an_unknown_metric_names_the_nearest(setting, problem):
  [found] = check(to_config(SETTINGS | setting))
  assert re.search(problem, found)


def test_a_declared_metric_is_a_choice(monkeypatch):
  cfg = to_config(SETTINGS | {"report": {"metric": "targets"}})
  assert len(check(cfg)) == 1
  monkeypatch.setitem(METRICS, "targets", Metric("targets", "targets", sums=("count",), formula=_count))
  assert check(cfg) == []
  assert metric_values(TEXT)["targets"] == 20


def _count(totals: Totals) -> float:
  return totals["count"]
