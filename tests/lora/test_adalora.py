"""AdaLoRA: the budget is met to the rank and goes where it matters; padding, other leaves and files are safe."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.methods import rank_allocation

MODULES, RANK, SIZE = 4, 4, 12
STEPS = 60


def leaves(key, rank=RANK, padded=RANK, fan_in=SIZE, fan_out=SIZE):
  """An adapter as it starts, its A and B drawn at `rank` and padded with zeros."""
  a_key, b_key = jax.random.split(key)
  a_RI, b_RO = jax.random.normal(a_key, (RANK, fan_in)), jax.random.normal(b_key, (RANK, fan_out))
  pad = [(0, padded - rank), (0, 0)]
  a_RI, b_RO = (jnp.pad(0.02 * x[:rank], pad) for x in (a_RI, b_RO))
  return {"lora_a": a_RI.T, "lora_b": b_RO, "lora_e": jnp.zeros(padded)}


def tree(rank=RANK, padded=RANK):
  """Four adapted modules under keys of both kinds, a bias beside one of them, and a leaf of no module."""
  own = [leaves(jax.random.fold_in(jax.random.key(3), i), rank, padded) for i in range(MODULES)]
  return {
    "blocks": {0: {"q": own[0], "v": {**own[1], "bias": jnp.ones(SIZE)}}, 1: {"q": own[2], "v": own[3]}},
    "norm": {"scale": jnp.ones(SIZE)},
  }


def teacher():
  """ΔW (4, I, O): of rank 3 for the third module, blocks.1.q; zero for the others."""
  u, v = np.linalg.qr(np.random.default_rng(5).normal(size=(2, SIZE, 3)))[0]
  delta = np.zeros((MODULES, SIZE, SIZE), np.float32)
  delta[2] = u @ v.T
  return delta


def loss(params, step):
  """Four maps at once, learnt from their own inputs and noisy answers; the bias and the norm learn as well."""
  key = jax.random.fold_in(jax.random.key(7), step)
  x = jax.random.normal(key, (MODULES, 32, SIZE))
  noise = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (MODULES, 32, SIZE))
  total = jnp.square(params["blocks"][0]["v"]["bias"]).sum() + jnp.square(params["norm"]["scale"] - 3).sum()
  for i, m in enumerate(rank_allocation.adapters(params).values()):
    total += jnp.square(x[i] @ methods.get("adalora").delta(None, m, 1.0) - x[i] @ teacher()[i] - noise[i]).mean()
  return total


INNER = optax.adamw(0.03, weight_decay=0.01)


def rule(steps=STEPS, budget=1.0, orthogonal=0.1):
  return rank_allocation.allocate(INNER, steps=steps, budget=budget, orthogonal=orthogonal, every=5)


def one_step(params, state, i, settings, active=None):
  grads = jax.grad(loss)(params, i)
  if active is not None:
    grads = jax.tree.map(jnp.multiply, grads, active)
  updates, state = rule(**settings).update(grads, state, params)
  return optax.apply_updates(params, updates), state


compiled = jax.jit(one_step)  # once for all tests: what they vary is traced
started = jax.jit(rule().init)
penalty = jax.jit(jax.value_and_grad(rank_allocation.orthogonality))


def first_update(around, grads, params):
  return jax.jit(lambda grads, params: around.update(grads, around.init(params), params)[0])(grads, params)


@pytest.fixture(scope="module", autouse=True)
def quick():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def run(params, budget, steps=STEPS, taken=None, orthogonal=0.1):
  """One trial's params, its state, and its values of e after every step (steps, R) of each module."""
  settings = {"steps": jnp.float32(steps), "budget": jnp.float32(budget), "orthogonal": jnp.float32(orthogonal)}
  state, seen = started(params), []
  for i in range(taken or steps):
    params, state = compiled(params, state, i, settings)
    seen.append({path: m["lora_e"] for path, m in rank_allocation.adapters(params).items()})
  return params, state, {path: np.stack([e[path] for e in seen]) for path in seen[0]}


def nonzero(seen):
  """Values of e (steps,) that are not zero after each step, of all modules."""
  return sum(np.asarray(e != 0).sum(-1) for e in seen.values())


def test_the_budget_goes_to_the_module_that_learns():
  params, _, _ = run(tree(), 0.75)
  assert rank_allocation.kept_ranks(params) == {"blocks.0.q": 0, "blocks.0.v": 0, "blocks.1.q": 3, "blocks.1.v": 0}
  learnt = methods.get("adalora").delta(None, params["blocks"][1]["q"], 1.0)
  assert jnp.abs(learnt - teacher()[2]).max() < 0.1 < np.abs(teacher()[2]).max()


@pytest.mark.parametrize("budget", [0.0, 0.25, 1.1, 1.5, 3.99, 4.0, 9.0])
def test_exactly_the_budget_is_left_at_the_end(budget):
  params, _, seen = run(tree(), budget)
  want = min(round(budget * MODULES), RANK * MODULES)
  assert sum(rank_allocation.kept_ranks(params).values()) == want
  assert (nonzero(seen)[-18:] == want).all(), "the last 30 % of the steps keep what the last pruning left"


def test_a_pruned_rank_stays_zero_after_the_last_pruning():
  _, state, seen = run(tree(), 1.0)
  e = np.concatenate([np.asarray(x) for x in seen.values()], axis=1)  # (steps, all ranks)
  count = (e != 0).sum(1)
  assert (count[:9] == MODULES * RANK).all(), "nothing is pruned at the start"
  allowed = [int(rank_allocation.budget_at(t, 6, 42, MODULES * RANK, MODULES)) for t in range(STEPS + 1)]
  for t in range(10, 42, 5):  # step t is seen at t - 1
    assert count[t - 1] == allowed[t]
    assert count[t] == MODULES * RANK, "between two prunings every rank trains"
  assert ((e[41:] != 0) == (e[41] != 0)).all(), "after the last pruning the choice stands"
  mask = np.concatenate([np.asarray(m["lora_e"]) for m in rank_allocation.adapters(state.mask).values()])
  assert (mask == (e[-1] != 0)).all()


def test_the_budget_schedule_is_cubic():
  budgets = [float(rank_allocation.budget_at(t, 10, 70, 64, 10)) for t in range(101)]
  assert budgets[:11] == [64.0] * 11
  assert budgets[70:] == [10.0] * 31
  assert all(a >= b for a, b in zip(budgets, budgets[1:], strict=False))
  assert budgets[40] == np.floor(10 + 54 / 8)
  assert budgets[11] < 64


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_short_run_meets_its_budget_too(steps):
  params, _, _ = run(tree(), 1.25, steps=steps)
  assert sum(rank_allocation.kept_ranks(params).values()) == 5


def test_ties_are_broken_in_the_order_of_the_modules():
  scores = {("a",): jnp.ones(3), ("b",): jnp.ones(3)}
  real = {("a",): jnp.array([True, False, True]), ("b",): jnp.array([True, True, True])}
  kept = rank_allocation.choose(scores, real, budget=1.5, step=9, first=1, last=9)
  assert [list(map(bool, x)) for x in kept.values()] == [[True, False, True], [True, False, False]]


def test_an_important_rank_is_one_whose_three_parts_are():
  """Eq. 7: e's own score and the means, not the sums, of A's and B's."""
  ones = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 7)), "lora_e": jnp.ones(2)}
  spread = {"lora_a": jnp.full((5, 2), 2.0), "lora_b": jnp.full((2, 7), 3.0), "lora_e": jnp.array([4.0, 5.0])}
  np.testing.assert_allclose(rank_allocation.importance({(): ones}, {(): spread})[()], [9.0, 10.0])


# Padding


def padded_pack():
  """Three trials of ranks 2, 4 and 4 in leaves of rank 6; the last does not adapt the module blocks.1.v."""
  trials = [tree(2, 6), tree(4, 6), tree(4, 6)]
  own = trials[2]["blocks"][1]["v"]
  trials[2]["blocks"][1]["v"] = jax.tree.map(jnp.zeros_like, own)
  active = [jax.tree.map(lambda x: jnp.ones(()), trial) for trial in trials]
  active[2]["blocks"][1]["v"] = jax.tree.map(lambda x: jnp.zeros(()), own)
  stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  return stack(trials), stack(active), jnp.array([1.0, 1.5, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["vmap", "map"])
def test_padding_stays_zero_and_a_pack_matches_solo_runs(mapping):
  packed, active, budget = padded_pack()
  state = jax.jit(jax.vmap(rule().init))(packed)

  @jax.jit
  def step(packed, state, i):
    trial = lambda p, s, b, a: one_step(p, s, i, {"steps": 45, "budget": b}, a)
    trees = (packed, state, budget, active)
    return jax.vmap(trial)(*trees) if mapping == "vmap" else jax.lax.map(lambda t: trial(*t), trees)

  for i in range(45):
    packed, state = step(packed, state, i)
  for n, (rank, want) in enumerate([(2, 4), (4, 6), (4, 6)]):
    mine = jax.tree.map(lambda x, n=n: x[n], packed)
    assert sum(rank_allocation.kept_ranks(mine).values()) == want, "padding is never kept in the place of a real rank"
    for part in (mine, state.sensitivity, state.mask):
      for leaf in rank_allocation.adapters(part).values():
        for name, x in leaf.items():
          x = np.asarray(x if part is mine else x[n])
          assert not (x[rank:] if name == "lora_b" else x[..., rank:]).any()
    if n < 2:
      alone, _, _ = run(tree(rank, rank), budget[n], steps=45)
      for path, m in rank_allocation.adapters(alone).items():
        for name, want_x in m.items():
          got = rank_allocation.adapters(mine)[path][name]
          got = got[:rank] if name == "lora_b" else got[..., :rank]
          np.testing.assert_allclose(got, want_x, atol=2e-5, err_msg=f"{n} {path} {name}")
  assert not any(np.asarray(x[2]).any() for x in packed["blocks"][1]["v"].values()), "a module that is not adapted"


def test_the_regulariser_does_not_see_padding():
  alone, alone_grads = penalty(rank_allocation.adapters(tree(3, 3)))
  untargeted = jax.tree.map(jnp.zeros_like, leaves(jax.random.key(0)))
  among, grads = penalty(rank_allocation.adapters(tree(3, 7) | {"none": untargeted}))
  np.testing.assert_allclose(among, alone, rtol=1e-6)
  for path, m in alone_grads.items():
    np.testing.assert_allclose(grads[path]["lora_a"][:, :3], m["lora_a"], atol=1e-7)
    assert not grads[path]["lora_a"][:, 3:].any() and not grads[path]["lora_b"][3:].any()
  assert not any(x.any() for x in grads[("none",)].values())


def test_orthonormal_columns_have_no_regulariser_gradient():
  exact = {(): {"lora_a": jnp.eye(5, 2), "lora_b": jnp.eye(2, 5), "lora_e": jnp.ones(2)}}
  value, grads = penalty(exact)
  assert value == 0
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads))


def test_the_regulariser_makes_the_columns_orthonormal():
  loose, _, _ = run(tree(), 4.0, orthogonal=0.0)
  tight, _, _ = run(tree(), 4.0, orthogonal=2.0)
  assert penalty(rank_allocation.adapters(tight))[0] < 0.2 < penalty(rank_allocation.adapters(loose))[0]


def test_the_kernels_of_a_stack_are_modules_of_their_own():
  one = [leaves(jax.random.key(i)) for i in range(3)]
  stack = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *one)}
  apart = {f"layer{i}": m for i, m in enumerate(one)}
  np.testing.assert_allclose(*(penalty(rank_allocation.adapters(t))[0] for t in (stack, apart)), rtol=1e-6)
  noise = jax.random.normal(jax.random.key(9), (3, RANK))
  results = []
  for params, parts in ((stack, {("layers",): noise}), (apart, {(f"layer{n}",): noise[n] for n in range(3)})):
    grads = jax.tree.map(jnp.zeros_like, params)
    grads = rank_allocation.replaced(grads, {path: {"lora_e": x} for path, x in parts.items()})
    choice = rank_allocation.allocate(optax.sgd(1.0), steps=1, budget=1.0)
    updates = first_update(choice, grads, params)
    results.append(np.concatenate([np.ravel(m["lora_e"]) for m in rank_allocation.adapters(updates).values()]))
  assert (results[0] != 0).sum() == 3
  np.testing.assert_allclose(*results, rtol=1e-5)


# SidecarFiles the adapters


def test_other_leaves_get_the_inner_update_to_the_last_bit():
  params = tree()
  grads = jax.tree.map(lambda x: jnp.cos(x) + x, params)
  updates, plain = (first_update(r, grads, params) for r in (rule(steps=1), INNER))
  assert jax.tree.structure(updates) == jax.tree.structure(plain)
  for where in (lambda t: t["norm"]["scale"], lambda t: t["blocks"][0]["v"]["bias"]):
    assert (where(updates) == where(plain)).all()


def test_without_budget_or_regulariser_it_is_the_inner_rule():
  got, _, _ = run(tree(), RANK, steps=20, orthogonal=0.0)
  params = tree()
  state = INNER.init(params)

  @jax.jit
  def step(params, state, i):
    updates, state = INNER.update(jax.grad(loss)(params, i), state, params)
    return optax.apply_updates(params, updates), state

  for i in range(20):
    params, state = step(params, state, i)
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, params)


def test_a_run_goes_on_from_its_state_put_away_as_arrays():
  params, state, _ = run(tree(), 1.0, steps=20)
  half, kept, _ = run(tree(), 1.0, steps=20, taken=11)
  flat, form = jax.tree.flatten((half, kept))
  flat = [np.array(x) for x in flat]  # as a checkpoint holds them
  assert form == jax.tree.structure((params, state))
  settings = {"steps": jnp.float32(20), "budget": jnp.float32(1), "orthogonal": jnp.float32(0.1)}
  again = jax.tree.unflatten(form, map(jnp.asarray, flat))
  for i in range(11, 20):
    again = compiled(*again, i, settings)
  jax.tree.map(np.testing.assert_array_equal, (params, state), again)


def test_the_state_has_the_keys_of_the_params_and_no_array_twice():
  params = tree()
  state = rule().init(params)  # as it comes, not compiled
  for part in (state.sensitivity, state.uncertainty, state.mask):
    assert list(rank_allocation.adapters(part)) == list(rank_allocation.adapters(params))
  assert set(state.sensitivity["blocks"][0]["v"]) == set(rank_allocation.LEAVES), "nothing is kept for other leaves"
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers), "a state may be donated"


def test_half_precision_stays_half_precision():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
  params, _, _ = run(params, 1.0, steps=4)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  assert sum(rank_allocation.kept_ranks(params).values()) == MODULES


def test_settings_out_of_range_are_refused_all_at_once():
  with pytest.raises(InputError) as error:
    rank_allocation.allocate(optax.sgd(1), steps=10, budget=1, every=0, begin=0.6, end=0.5, beta1=1.0)
  assert len(error.value.problems) == 3
  with pytest.raises(InputError, match="lora.method=adalora"):
    rank_allocation.allocate(optax.sgd(1), steps=10, budget=1).init({"q": {"lora_a": jnp.ones((2, 1))}})
