"""Estimatess and fits against textbook formulas."""

import math
import statistics

import numpy as np
import pytest

from lora_exp.report.estimation.estimates import estimate, ratio, t_quantile
from lora_exp.report.estimation.fits import fit_parabola

T2 = 4.3027  # Student's t, 0.975, two degrees of freedom


@pytest.mark.parametrize(("df", "t"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (13, 2.1604), (25, 2.0595),
                                       (40, 2.0211), (1000, 1.9623)])
def test_t_quantile(df, t):
  assert t_quantile(df) == pytest.approx(t, rel=3e-4)


def test_estimate_has_students_interval():
  assert estimate([1.0, 2.0, 4.0]).half == pytest.approx(T2 * statistics.stdev([1, 2, 4]) / math.sqrt(3), rel=1e-4)
  assert estimate([1.0]).half is None and math.isnan(estimate([]).mean)


def test_fit_parabola_recovers_a_vertex_and_refuses_a_hill():
  x = [math.log(v) for v in (1e-4, 1e-3, 1e-2, 1e-1)]
  assert fit_parabola(x, [1.0, 0.9, 0.8, 0.7]) is None and fit_parabola(x, [0.7, 0.9, 0.85, 0.9]) is None  # at an edge
  fit = fit_parabola(x, [0.3 * (v - math.log(4e-3)) ** 2 + 2 for v in x])
  assert math.exp(fit.vertex) == pytest.approx(4e-3) and fit.minimum == pytest.approx(2)
  assert fit_parabola(x[:3], [1, 2, 1]) is None and fit_parabola(x[:2], [1, 2]) is None


def test_ratio_has_fiellers_interval():
  """At the ends of the interval, a − r · b is just not distinguishable from 0."""
  a = {(0,): 0.80, (1,): 0.83, (2,): 0.78, (3,): 0.81}
  b = {(0,): 1.0, (1,): 1.1, (2,): 0.9, (3,): 1.02}
  found = ratio(a, b)
  for r in (found.low, found.high):
    rest = [a[k] - r * b[k] for k in a]
    assert abs(statistics.mean(rest)) == pytest.approx(t_quantile(3) * statistics.stdev(rest) / 2)
  assert found.mean == pytest.approx(3.22 / 4.02) and found.low < found.mean < found.high


def test_an_error_that_both_means_share_cancels_in_their_ratio():
  a = {(0,): 0.96, (1,): 0.961, (2,): 0.959}
  b = {(0,): 1.0, (1,): 1.002, (2,): 0.998}
  shared = np.outer([0.96, 1.0], [0.96, 1.0]) * 0.05**2
  alone, together, apart = ratio(a, b), ratio(a, b, shared), ratio(a, b, np.diag(np.diag(shared)))
  assert together.half == pytest.approx(alone.half, rel=0.05)
  assert apart.half == pytest.approx(1.96 * 0.96 * 0.05 * math.sqrt(2), rel=0.1)  # a normal: the error is known well


def test_ratio_to_a_mean_that_may_be_zero_is_unbounded():
  found = ratio({(0,): 0.2, (1,): 0.21}, {(0,): 0.1, (1,): -0.05})
  assert found.half is None and math.isinf(found.high)
  assert ratio({(0,): 0.2}, {(0,): -0.1}) is None
