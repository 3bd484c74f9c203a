"""The test behind every verdict: what it concludes from gains, and what it leaves open."""

import math

import numpy as np
import pytest

from lora_exp.report.verdicts.judgement import ANY, IN_ORDER, INSUFFICIENT, ONE, SUFFICIENT, UNDECIDED, judge

SEEDS = range(3)
SCATTER = (-0.004, 0.001, 0.003)


def gains(*means: float, shared: float = 0.1) -> dict[str, dict[int, float]]:
  """Settings a, b, c, … with these means; seeds shift all of them alike, and each a little by itself."""
  return {chr(97 + i): {k: mean + shared * (k - 1) + SCATTER[(k + i) % 3] for k in SEEDS}
          for i, mean in enumerate(means)}


def states(*args: object, **kwargs: object) -> dict[str, str]:
  return {name: verdict.state for name, verdict in judge(*args, **kwargs).verdicts.items()}


def test_a_plateau_is_sufficient_and_what_lies_below_is_not():
  assert states(gains(0.5, 1.0, 1.0)) == {"a": INSUFFICIENT, "b": SUFFICIENT, "c": SUFFICIENT}


def test_the_margin_is_a_share_of_the_best_gain():
  found = gains(0.90, 1.0, 1.0)
  assert states(found)["a"] == INSUFFICIENT and states(found, margin=0.15)["a"] == SUFFICIENT
  assert states(found, margin=0.10)["a"] == UNDECIDED


def test_the_bound_is_where_the_verdict_changes():
  found = gains(0.93, 1.0, 1.0)
  bound = judge(found).verdicts["a"].at_most
  assert states(found, margin=bound + 1e-3)["a"] == SUFFICIENT
  assert states(found, margin=bound - 1e-3)["a"] != SUFFICIENT
  assert judge(found).verdicts["a"].short == pytest.approx(0.07, abs=0.005)


def test_settings_in_order_are_tested_from_the_best():
  """a is close to the best and b, which lies between, is not shown to be: a is left open with the bound of b."""
  found = gains(0.995, 0.955, 1.0)
  assert states(found, claims=ONE) == {"a": SUFFICIENT, "b": UNDECIDED, "c": SUFFICIENT}
  in_order = judge(found, claims=IN_ORDER)
  assert in_order.names(SUFFICIENT) == ["c"] and in_order.names(UNDECIDED) == ["a", "b"]
  assert in_order.verdicts["b"].at_most >= in_order.verdicts["a"].at_most > 0.05
  dip = gains(0.995, 0.5, 1.0)  # b is resolved
  assert states(dip, claims=IN_ORDER) == {"a": SUFFICIENT, "b": INSUFFICIENT, "c": SUFFICIENT}


def test_several_claims_without_an_order_share_the_level():
  bounds = [judge(gains(0.97, 0.97, 1.0), claims=claims).verdicts["a"].at_most for claims in (ONE, ANY)]
  assert bounds[0] < bounds[1]
  two = [judge(gains(0.97, 1.0), claims=claims).verdicts["a"].at_most for claims in (ONE, ANY)]
  assert two[0] == two[1]


def test_a_diverged_seed_is_never_sufficient():
  found = gains(0.5, 1.0, 1.0)
  found["b"][1] = math.nan
  verdict = judge(found).verdicts["b"]
  assert (verdict.state, verdict.seeds, verdict.diverged) == (UNDECIDED, 3, 1)
  found["b"] = dict.fromkeys(SEEDS, math.nan)
  assert judge(found).verdicts["b"].state == UNDECIDED and judge(found).state("c") == SUFFICIENT


def test_survivors_of_a_diverged_setting_still_count():
  found = gains(0.5, 1.2, 1.0)
  found["b"][1] = math.nan
  assert judge(found).state("c") != SUFFICIENT


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_seeds_conclude_nothing(count):
  few = {name: dict(list(by_seed.items())[:count]) for name, by_seed in gains(0.1, 1.0, 1.0).items()}
  assert set(states(few).values()) == {UNDECIDED}


def test_noise_larger_than_the_gain_concludes_nothing():
  noisy = {"a": {0: -0.45, 1: 0.55, 2: 0.3}, "b": {0: 0.05, 1: 0.45, 2: 0.4}, "c": {0: 0.1, 1: 0.4, 2: -0.5}}
  assert set(states(noisy).values()) == {UNDECIDED}


def test_undecided_settings_say_how_many_seeds_would_decide():
  rng = np.random.default_rng(0)
  noisy = {name: dict(enumerate(1 + 0.05 * rng.standard_normal(3))) for name in "abc"}
  verdict = judge(noisy).verdicts["a"]
  assert verdict.state == UNDECIDED and verdict.more_seeds and verdict.more_seeds >= 3


def test_incomplete_designs_compare_the_seeds_that_are_shared():
  """b has two further seeds on which every setting would gain more: they are no advantage of b."""
  found = gains(0.5, 1.0, 1.0)
  found["b"] |= {3: 1.5, 4: 1.51}
  judged = judge(found)
  assert judged.verdicts["c"].gain == pytest.approx(judged.verdicts["b"].gain, abs=0.005)
  assert judged.state("c") == SUFFICIENT


def test_an_error_of_the_held_out_text_is_added():
  found = gains(0.93, 1.0, 1.0)
  assert states(found, added=0.05**2 * np.eye(3))["a"] == UNDECIDED


def test_a_pair_that_scatters_more_than_the_rest_is_not_pooled():
  """The spread of a, b and c would make d and e look known; by their own spread nothing is."""
  found = gains(0.5, 0.5, 0.5, 1.0, 1.0)
  assert judge(found).pooled and judge(found).state("d") == SUFFICIENT
  for name, sign in (("d", 1), ("e", -1)):
    found[name] = {k: gain + sign * 0.05 * (k - 1) for k, gain in found[name].items()}
  judged = judge(found)
  assert not judged.pooled and judged.state("d") == judged.state("e") == UNDECIDED
  assert judged.state("a") == INSUFFICIENT


def test_more_settings_or_more_noise_lower_the_level():
  scattered = {name: {k: 1 + 12 * SCATTER[(k + i) % 3] for k in SEEDS} for i, name in enumerate("abcd")}
  few = judge(scattered).verdicts["a"].at_most
  copies = {f"{name}{n}": by_seed for n in range(4) for name, by_seed in scattered.items()}
  assert judge(copies).verdicts["a0"].at_most > few


def test_a_stricter_level_concludes_less():
  found = gains(0.93, 1.0, 1.0)
  assert states(found, level=1e-6) == dict.fromkeys("abc", UNDECIDED)
