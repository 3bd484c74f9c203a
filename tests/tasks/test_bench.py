"""`task=bench`: its file and its table, and the arithmetic of turns and limits."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from runs import TINY, on_stories

from lora_exp.cli import main as entry
from lora_exp.runtime.flops import MatrixProduct, count_flops, matrix_products
from lora_exp.train.benchmarks.matrix_rate import largest, limit_seconds, product_side
from lora_exp.train.benchmarks.turns import Side, Spread, ratios, spread, take_turns

F32 = ("float32", "float32", "float32")
BENCH = [*TINY, "task=bench", "bench.turns=2", "bench.seconds=0.01", "data.seq_len=16", "train.batch_size=2",
         "sample.max_tokens=4", "bench.pack=2", "lora.rank=2"]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """bench.json of a tiny model, without the part that starts processes."""
  out = tmp_path_factory.mktemp("bench")
  assert entry.run([*BENCH, *on_stories(out), "bench.parts=[step,data,eval,generate,pack]", f"out={out}"]) == 0
  return json.loads((out / "bench.json").read_text())


@pytest.mark.slow
def test_every_part_has_positive_spreads_in_order(result):
  assert list(result["parts"]) == ["step", "data", "eval", "generate", "pack"]
  spreads = [value for rows in result["parts"].values() for value in rows.values() if isinstance(value, dict)]
  assert len(spreads) > 10
  for value in spreads:
    assert 0 < value["low"] <= value["median"] <= value["high"]


@pytest.mark.slow
def test_a_pack_processes_the_tokens_of_all_its_trials(result):
  pack = result["parts"]["pack"]
  assert pack["trials"] == 2
  assert pack["tokens_per_s"]["median"] * pack["step_seconds"]["median"] == pytest.approx(2 * 2 * 16, rel=0.5)
  assert result["settings"]["rank"] == 2


@pytest.mark.slow
def test_the_share_of_the_limit_is_that_of_the_rates(result):
  step = result["parts"]["step"]
  for name in ("flops_needed", "step_memory_bytes", "compile_seconds"):
    assert step[name] > 0
  share = step["flops_per_s"]["median"] / step["matrix_flops_per_s"]["median"]
  assert step["share_of_limit"]["low"] * 0.5 <= share <= step["share_of_limit"]["high"] * 2


@pytest.mark.parametrize(("setting", "message"), [
  ("bench.parts=[stpe]", "did you mean step?"),
  ("bench.parts=[]", "nothing to measure"),
  ("bench.turns=0", "at least 1"),
  ("bench.ranks=[1,2,3,4,5]", "bench.pack=5"),
  ("bench.ranks=[0]", "0 is not a rank"),
])  # fmt: skip
def test_bad_settings_are_refused(setting, message, capsys):
  assert entry.run(["task=bench", "model=minigpt_tiny", setting]) == 2
  assert message in capsys.readouterr().err


def test_sides_take_turns_and_repeat_short_work():
  calls = []
  sides = {"a": Side(lambda n: calls.append(("a", n))), "b": Side(lambda n: calls.append(("b", n)), share=0.5)}
  times = take_turns(sides, 3, 1e-4)
  assert [name for name, _ in calls] == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]
  assert all(n > 1 for _, n in calls[4:])
  assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_spreads_are_medians_and_quartiles():
  assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
  assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
  assert ratios([2.0, 9.0], [1.0, 3.0]) == Spread(2.5, 2.25, 2.75)


def test_matrix_products_are_counted_by_shape():
  def program(x, w):
    x.T @ x  # is not needed
    y, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)
    return jnp.einsum("bij,bjk->bik", y.reshape(2, 2, 8), jnp.ones((2, 8, 5)))

  jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 8)), jnp.ones((8, 8))).jaxpr
  found = Counter({product._replace(precision=None): n for product, n in matrix_products(jaxpr).items()})
  square, batched = MatrixProduct(1, 4, 8, 8, F32, None), MatrixProduct(2, 2, 8, 5, F32, None)
  assert found == {square: 3, batched: 1}
  assert count_flops(jaxpr) == 2 * (3 * 4 * 8 * 8 + 2 * 2 * 8 * 5)


def test_the_limit_extends_the_measured_shapes_to_all_needed():
  large, small = MatrixProduct(1, 64, 64, 64, F32, None), MatrixProduct(1, 2, 2, 2, F32, None)
  products = Counter({large: 4, small: 1})
  assert largest(products) == {large: 4}
  assert limit_seconds(products, 8 * large.flops, {large: 0.25}) == pytest.approx(2.0)


def test_a_repeated_product_takes_longer():
  """XLA must not take the product out of the loop."""
  product = MatrixProduct(1, 256, 256, 256, F32, None)
  times = take_turns({"once": product_side(product, 0.0), "many": product_side(product, 1.0)}, 3, 0.05)
  assert min(times["many"]) > 2 * product.flops / 1e13  # seconds of one product at 5 TFLOP/s
