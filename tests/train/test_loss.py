"""The chunked loss equals the plain one, value and every gradient, whatever the head, the chunks and the mapping."""

import math
import re
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from packs import quickly

from lora_exp.lora.layers import attach
from lora_exp.runtime.dropout import dropout
from lora_exp.train.compute import loss as loss_module
from lora_exp.train.compute.loss import head_loss

B, T, D, V, R = 3, 7, 12, 37, 4
SCALE, RATE = 1.5, 0.3


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@dataclass
class Case:
  adapted: bool = True
  compute: str = "factored"
  rate: float | None = None  # of the adapter's dropout
  bias: bool = True
  train_kernel: bool = False
  tied: bool = False  # the head is an embedding table (V, D)
  softcap: float | None = None
  dtype: str = "float32"


CASES = {
  "plain": Case(adapted=False),
  "plain without bias": Case(adapted=False, bias=False),
  "trained kernel": Case(adapted=False, train_kernel=True),
  "trained kernel without bias": Case(adapted=False, train_kernel=True, bias=False),
  "factored": Case(),
  "factored without bias": Case(bias=False),
  "merged": Case(compute="merged"),
  "auto": Case(compute="auto"),
  "dropped": Case(rate=RATE),
  "tied": Case(adapted=False, bias=False, tied=True),
  "tied, trained": Case(adapted=False, bias=False, tied=True, train_kernel=True),
  "tied, adapted": Case(bias=False, tied=True),
  "tied, merged": Case(bias=False, tied=True, compute="merged"),
  "soft-capped": Case(softcap=3.0),
  "soft-capped, merged": Case(softcap=3.0, compute="merged"),
  "soft-capped, tied, trained": Case(adapted=False, bias=False, tied=True, train_kernel=True, softcap=2.0),
  "dropped at rate 0": Case(rate=0.0),
}

SOME = ["plain", "factored", "merged", "dropped", "trained kernel", "tied, adapted", "soft-capped"]


def inputs(seed: int = 0) -> dict:
  """Arrays of a head, features, targets, and weights that are neither 0 nor 1 alone."""
  k = iter(jax.random.split(jax.random.key(seed), 10))
  normal = lambda *shape: jax.random.normal(next(k), shape)
  weights = jax.random.uniform(next(k), (B, T)) * (jax.random.uniform(next(k), (B, T)) < 0.7)
  p = {
    "x": normal(B, T, D),
    "kernel": normal(D, V) / 3,
    "bias": normal(V),
    "a": normal(D, R) / 3,
    "b": normal(R, V) / 3,
    "targets": jax.random.randint(next(k), (B, T), 0, V),
    "weights": weights.at[1].set(0),
  }
  likely = (p["x"] @ p["kernel"] + p["bias"]).argmax(-1)  # so that some are correct
  return p | {"targets": jnp.where(jax.random.bernoulli(next(k), 0.3, (B, T)), likely, p["targets"])}


def ours(case: Case, p: dict):
  """`Sums` of the function under test, on a real head."""
  sizes = (D, p["kernel"].shape[1])
  if case.tied:
    head: nnx.Linear | nnx.Embed = nnx.Embed(*sizes[::-1], dtype=jnp.dtype(case.dtype), rngs=nnx.Rngs(0))
    head.embedding[...] = p["kernel"].T
  else:
    head = nnx.Linear(*sizes, use_bias=case.bias, dtype=jnp.dtype(case.dtype), rngs=nnx.Rngs(0))
    head.kernel[...] = p["kernel"]
  if case.bias:
    head.bias[...] = p["bias"]
  if case.adapted:
    a, b = (p["b"].T, p["a"].T) if case.tied else (p["a"], p["b"])
    attach(head, "lora", {"lora_a": a, "lora_b": b}, SCALE, case.compute)
    if case.rate is not None:
      head.deterministic, head.rate[...] = False, jnp.float32(case.rate)
  static = {"train_all": case.train_kernel, "softcap": case.softcap}
  return head_loss(head, p["x"].astype(case.dtype), p["targets"], p["weights"], **static)


def plain(case: Case, p: dict):
  """The same in float32 with all logits at once, by autodiff."""
  x = p["x"]
  z = x @ p["kernel"]
  if case.adapted:
    seen = x if case.rate is None else dropout(x, case.rate, jax.random.key(0))
    z += SCALE * (seen @ p["a"]) @ p["b"]
  if case.bias:
    z += p["bias"]
  if case.softcap is not None:
    z = case.softcap * jnp.tanh(z / case.softcap)
  nats = optax.softmax_cross_entropy_with_integer_labels(z, p["targets"])
  return (nats * p["weights"]).sum(), ((z.argmax(-1) == p["targets"]) * p["weights"]).sum()


def trained(case: Case) -> list[str]:
  return ["x"] + ["a", "b"] * case.adapted + (["kernel"] + ["bias"] * case.bias) * case.train_kernel


def results(function, case: Case, p: dict) -> dict:
  """Value, correct count, and the gradient of 3·loss for everything that is trained."""

  def of(part):
    loss, correct = function(case, p | part)
    return 3 * loss, (loss, correct)

  grads, (loss, correct) = jax.grad(of, has_aux=True)({k: p[k] for k in trained(case)})
  return grads | {"loss": loss, "correct": correct}


@cache
def expected(name: str, seed: int = 0) -> dict:
  """What the plain loss gives for a case, once for all tests."""
  return jax.jit(lambda p: results(plain, CASES[name], p))(inputs(seed))


def same(found: dict, wanted: dict, rtol: float = 2e-6) -> None:
  assert found.keys() == wanted.keys()
  for name, x in wanted.items():
    assert name == "correct" or np.abs(x).max() > 0, f"{name} is nothing to compare"
    assert np.abs(found[name] - x).max() <= rtol * np.abs(x).max(), name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("positions", [T, 4, 1])  # of a chunk; 4 does not divide T: the last is padded
def test_value_and_every_gradient_equal_the_plain_loss(monkeypatch, name, positions):
  monkeypatch.setattr(loss_module, "CHUNK_LOGITS", V * B * positions)
  same(jax.jit(lambda p: results(ours, CASES[name], p))(inputs()), expected(name))
  assert expected(name)["correct"] > 0


@pytest.mark.parametrize("mapping", ["vmap", "map"])
@pytest.mark.parametrize("name", SOME)
def test_mapped_over_trials_it_equals_each_trial_alone(monkeypatch, name, mapping):
  monkeypatch.setattr(loss_module, "CHUNK_LOGITS", V * B * 3)
  trials = [inputs(seed) for seed in (1, 2, 3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *trials)
  mapped = {"vmap": jax.vmap, "map": lambda f: lambda p: jax.lax.map(f, p)}[mapping]
  found = jax.jit(mapped(lambda p: results(ours, CASES[name], p)))(stacked)
  for n in range(3):
    same(jax.tree.map(lambda x, n=n: x[n], found), expected(name, n + 1))


@pytest.mark.parametrize("name", SOME)
def test_in_bfloat16_it_is_as_near_as_bfloat16_allows(monkeypatch, name):
  monkeypatch.setattr(loss_module, "CHUNK_LOGITS", V * B * 3)
  p = inputs()
  case = Case(**{**CASES[name].__dict__, "dtype": "bfloat16"})
  found = jax.jit(lambda p: results(ours, case, p))(p)
  assert found["loss"].dtype == jnp.float32 and all(found[k].dtype == p[k].dtype for k in trained(case))
  wanted = {k: x for k, x in expected(name).items() if k != "correct"}  # a near tie may fall the other way
  del found["correct"]
  same(found, wanted, rtol=0.03)


def test_rate_0_is_no_dropout_and_alpha_0_no_adapter():
  p = inputs()
  same(results(ours, CASES["dropped at rate 0"], p), results(ours, CASES["factored"], p))
  off = p | {"b": jnp.zeros_like(p["b"])}
  np.testing.assert_allclose(ours(CASES["factored"], off).loss, ours(CASES["plain"], off).loss, rtol=1e-7)


def test_tokens_without_weight_do_not_count():
  p, case = inputs(), CASES["factored"]
  found = results(ours, case, p)
  idle = p["weights"] == 0
  other = p | {"targets": jnp.where(idle, (p["targets"] + 5) % V, p["targets"])}
  np.testing.assert_array_equal(results(ours, case, other)["a"], found["a"])
  assert not found["x"][idle].any() and found["x"][~idle].any()
  none = ours(case, p | {"weights": jnp.zeros((B, T))})
  assert none.loss == 0 and none.correct == 0


def test_correct_counts_tokens_whose_target_is_the_likeliest():
  p = inputs() | {"weights": jnp.ones((B, T))}
  z = p["x"] @ p["kernel"] + p["bias"] + SCALE * (p["x"] @ p["a"]) @ p["b"]
  best, worst = z.argmax(-1), z.argmin(-1)
  assert ours(CASES["factored"], p | {"targets": best}).correct == B * T
  assert ours(CASES["factored"], p | {"targets": worst}).correct == 0
  mixed = best.at[0].set(worst[0])
  assert ours(CASES["merged"], p | {"targets": mixed}).correct == (B - 1) * T


def test_a_tied_head_holds_no_copy_of_its_table(monkeypatch):
  monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 4 * 20_011)
  head = nnx.Embed(20_011, 64, rngs=nnx.Rngs(0))
  graph, table = nnx.split(head)
  x, targets = jnp.ones((2, 4, 64)), jnp.zeros((2, 4), jnp.int32)

  def loss(x: jax.Array, table: nnx.State) -> jax.Array:
    return head_loss(nnx.merge(graph, table), x, targets, jnp.ones((2, 4))).loss

  memory = jax.jit(jax.grad(loss)).lower(x, table).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.8 * head.embedding[...].nbytes


def test_large_logits_do_not_overflow():
  p = inputs()
  big = p | {"kernel": p["kernel"] * 1e4}
  same(results(ours, CASES["factored"], big), results(plain, CASES["factored"], big), rtol=1e-5)


def test_the_logits_of_all_tokens_are_never_held(monkeypatch):
  rows, length, vocab = 8, 64, 101
  p = {"x": jnp.ones((rows, length, D)), "kernel": jnp.ones((D, vocab)), "bias": jnp.ones(vocab)}
  p |= {"a": jnp.ones((D, R)), "b": jnp.ones((R, vocab))}
  p |= {"targets": jnp.zeros((rows, length), int), "weights": jnp.ones((rows, length))}

  def largest(limit: int) -> int:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", limit)
    text = str(jax.make_jaxpr(lambda p: results(ours, Case(), p))(p))
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text))

  assert largest(vocab * rows * 4) == rows * length * D  # the features themselves
  assert largest(2**25) == rows * length * vocab
