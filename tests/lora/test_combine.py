"""Adapters apart from their model: summed, resized, taken out of checkpoints; and several of them on one base."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_exp import lora
from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.combine import combine_adapters, ties
from lora_exp.lora.multi_adapter import Adapters
from lora_exp.lora.resizing import extract, resize

SHAPES = {"layers.0": (7, 5), "layers.1": (5, 3)}
METHODS = ["lora", "pissa", "adalora", "vera"]  # pissa: with A₀ and B₀ to subtract
X = np.random.default_rng(5).normal(size=(4, 7)).astype(np.float32)


def net() -> nnx.Sequential:
  return nnx.Sequential(*(nnx.Linear(*s, rngs=nnx.Rngs(i)) for i, s in enumerate(SHAPES.values())))


def drawn(
  method="lora", rank=2, seed=0, *, scale=1.5, paths=tuple(SHAPES), lead=(), dtype=np.float32, shapes=SHAPES
) -> lora.Adapter:
  """An adapter as if trained: every leaf is random."""
  rng = np.random.default_rng(seed)
  declared = methods.get(method).leaves
  rows, leaves = [], {}
  for path in paths:
    fan_in, fan_out = shapes[path]
    sizes = {"I": fan_in, "O": fan_out, "R": rank}
    leaves[path] = {
      name: rng.normal(size=(*lead, *(sizes[axis] for axis in leaf.axes))).astype(dtype)
      for name, leaf in declared.items()
    }
    rows.append(lora.AdaptedModule(path, fan_in, fan_out, rank, scale * rank, scale))
  return lora.Adapter(method, tuple(rows), leaves)


def delta(adapter: lora.Adapter, path: str) -> np.ndarray:
  """ΔW in float64 by the method's own definition, written out here once more; 0 where `path` is not adapted."""
  found = [row for row in adapter.rows if row.path == path]
  if not found:
    return np.zeros(SHAPES[path])
  own = {name: np.asarray(x, np.float64) for name, x in adapter.leaves[path].items()}
  if "vera_a" in own:
    product = own["vera_a"] @ np.diag(own["lambda_d"]) @ own["vera_b"] @ np.diag(own["lambda_b"])
  elif "lora_e" in own:
    product = own["lora_a"] @ np.diag(own["lora_e"]) @ own["lora_b"]
  else:
    product = own["lora_a"] @ own["lora_b"]
  if "start_a" in own:
    product = product - own["start_a"] @ own["start_b"]
  return found[0].scale * product


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def cut(w: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
  """numpy's best approximation of that rank, and its relative error."""
  u, sigma, vt = np.linalg.svd(w, full_matrices=False)
  near = u[..., :rank] * sigma[..., None, :rank] @ vt[..., :rank, :]
  return near, relative(near, w)


# Sums


@pytest.mark.parametrize("method", METHODS)
def test_the_exact_sum_is_the_weighted_sum_of_the_updates(method):
  parts, weights = [drawn(method, 2, 1), drawn("lora", 3, 2, scale=0.25), drawn(method, 1, 3)], [0.7, -1.3, 2.0]
  found = combine_adapters(parts, weights)
  assert found.method == "lora"
  for row in found.rows:
    wanted = sum(w * delta(part, row.path) for w, part in zip(weights, parts, strict=True))
    assert np.abs(delta(found, row.path) - wanted).max() < 1e-5
    np.testing.assert_allclose(found.update_IO(row.path), wanted, atol=1e-5)
    assert row.rank == (9 if method == "pissa" else 6)
    assert (row.scale, row.alpha, row.parameters) == (1, row.rank, row.rank * (row.fan_in + row.fan_out))
    assert all(x.dtype == np.float32 for x in found.leaves[row.path].values())


def test_a_sum_of_adapters_equals_adding_every_update():
  parts, weights = [drawn("pissa", 2, 1), drawn("vera", 3, 2)], [0.5, -0.25]
  model, plain = net(), net()
  lora.attach(model, combine_adapters(parts, weights))
  for i, path in enumerate(SHAPES):
    plain.layers[i].kernel[...] += sum(w * delta(part, path) for w, part in zip(weights, parts, strict=True))
  np.testing.assert_allclose(model(X), plain(X), rtol=1e-5, atol=1e-4)


def test_modules_that_only_some_adapt_are_summed_over_those():
  parts = [drawn(paths=["layers.1"]), drawn(seed=1, paths=["layers.0"]), drawn(seed=2, paths=["layers.1"])]
  found = combine_adapters(parts, [1, 2, 3])
  assert {row.path: row.rank for row in found.rows} == {"layers.1": 4, "layers.0": 2}
  for path in SHAPES:
    wanted = delta(parts[0], path) + 2 * delta(parts[1], path) + 3 * delta(parts[2], path)
    assert relative(delta(found, path), wanted) < 1e-6


def test_an_adapter_minus_itself_is_nothing():
  part = drawn("pissa")
  found = combine_adapters([part, part], [1, -1])
  assert max(np.abs(delta(found, path)).max() for path in SHAPES) < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_svd_is_numpys_best_approximation_of_the_sum(rank):
  parts, weights = [drawn("adalora", 2, 1), drawn("pissa", 1, 2)], [1.0, -0.5]
  found = combine_adapters(parts, weights, how="svd", rank=rank)
  for row in found.rows:
    wanted, _ = cut(sum(w * delta(part, row.path) for w, part in zip(weights, parts, strict=True)), rank)
    assert (row.rank, row.scale) == (rank, 1)
    assert relative(delta(found, row.path), wanted) < 1e-6


def test_stacks_of_kernels_are_summed_kernel_by_kernel():
  parts, weights = [drawn(lead=(2, 3), seed=1), drawn(lead=(2, 3), seed=2)], [2.0, -1.0]
  for how, rank in (("exact", None), ("svd", 3), ("ties", 3)):
    found = combine_adapters(parts, weights, how=how, rank=rank, density=0.5)
    for n in np.ndindex(2, 3):
      alone = [
        lora.Adapter("lora", p.rows, {path: {k: x[n] for k, x in own.items()} for path, own in p.leaves.items()})
        for p in parts
      ]
      wanted = combine_adapters(alone, weights, how=how, rank=rank, density=0.5)
      for path in SHAPES:
        assert relative(delta(found, path)[n], delta(wanted, path)) < 1e-6


def test_float64_stays_float64():
  part = drawn(dtype=np.float64)
  for found in (combine_adapters([part, drawn()], [1, 1]), resize(part, 1)[0]):
    assert {x.dtype for own in found.leaves.values() for x in own.values()} == {np.dtype(np.float64)}


def test_ties_trims_elects_a_sign_and_averages_those_that_agree():
  first = np.array([[4.0, -3.0, 0.1], [0.0, 2.0, -5.0]])
  second = np.array([[-1.0, -5.0, 3.0], [0.2, -2.0, 0.1]])
  # Half of six entries stay: 4, -3, -5 of the first, -5, 3, -2 of the second.
  np.testing.assert_array_equal(ties(np.stack([first, second]), 0.5), [[4, -4, 3], [0, -2, -5]])
  np.testing.assert_array_equal(ties(np.stack([first, second]), 1.0), [[4, -4, 1.55], [0.2, 0, -5]])


def test_combined_by_ties_is_its_best_approximation_of_that_rank():
  parts, weights = [drawn(seed=1), drawn("vera", seed=2, paths=["layers.0"]), drawn(seed=3)], [1.0, 0.5, 2.0]
  found = combine_adapters(parts, weights, how="ties", rank=2, density=0.4)
  for path in SHAPES:
    updates = [w * delta(part, path) for w, part in zip(weights, parts, strict=True)]
    merged = ties(np.stack(updates), 0.4)
    assert np.linalg.matrix_rank(merged) > 2
    assert relative(delta(found, path), cut(merged, 2)[0]) < 1e-6


def test_ties_of_one_adapter_at_full_density_is_that_adapter():
  part = drawn("pissa", 2)
  found = combine_adapters([part], [1], how="ties", rank=4, density=1)
  assert max(relative(delta(found, path), delta(part, path)) for path in SHAPES) < 1e-6


@pytest.mark.parametrize(
  "parts, weights, settings, words",
  [
    ([], [], {}, ["no adapter"]),
    ([drawn()], [1, 2], {}, ["1 adapters and 2 weights"]),
    ([drawn()], [math.nan], {}, ["finite"]),
    ([drawn()], [1], {"how": "svt", "rank": 2}, ["did you mean svd"]),
    ([drawn()], [1], {"how": "svd"}, ["needs a rank"]),
    ([drawn()], [1], {"how": "ties"}, ["needs a rank"]),
    ([drawn()], [1], {"how": "svd", "rank": 0}, ["integer of at least 1"]),
    ([drawn()], [1], {"rank": 2}, ["sum of the ranks"]),
    ([drawn()], [1], {"how": "ties", "rank": 2, "density": 0}, ["density"]),
    ([drawn(), drawn("dora")], [1, 1], {}, ["adapters[1] is a DoRA", "merge it"]),
    (
      [drawn(), drawn(shapes={"layers.0": (7, 6), "layers.1": (5, 3)})],
      [1, 1],
      {},
      ["layers.0 is (7, 6) in adapters[1] and (7, 5) in adapters[0]"],
    ),
    ([drawn(lead=(2,)), drawn()], [1, 1], {}, ["layers.0", "layers.1"]),
    ([drawn(), lora.Adapter("lora", (), {}, {"norm.scale": X})], [1, 1], {}, ["adapters[1]", "norm.scale in full"]),
  ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(parts, weights, settings, words):
  with pytest.raises(InputError) as caught:
    combine_adapters(parts, weights, **settings)
  assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_problems_are_listed_with_nonfinite_values():
  broken = drawn("dora")
  broken.leaves["layers.1"]["lora_b"][0, 0] = np.inf
  with pytest.raises(InputError) as caught:
    combine_adapters([drawn(), broken], [1, 1, 1])
  assert len(caught.value.problems) == 3
  assert "adapters[1]: layers.1.lora_b" in str(caught.value)
  with pytest.raises(InputError, match=r"layers\.1\.lora_b"):
    resize(broken, 1)


# Another rank


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_a_resize_is_the_best_approximation(method, rank):
  before = drawn(method, 3, 4, scale=0.3)
  after, errors = resize(before, rank)
  assert (after.method, list(errors)) == ("lora", list(SHAPES))
  for row in after.rows:
    whole = delta(before, row.path)
    wanted, error = cut(whole, rank)
    assert errors[row.path] == pytest.approx(error, abs=1e-6)
    assert relative(delta(after, row.path), wanted) < 1e-6
    a, b = (after.leaves[row.path][name] for name in ("lora_a", "lora_b"))
    assert (a.shape, b.shape) == ((row.fan_in, rank), (rank, row.fan_out))
    assert (row.rank, row.alpha / row.rank) == (rank, pytest.approx(0.3))
    used = b.any(axis=1)
    np.testing.assert_allclose(a.T[used] @ a[:, used], b[used] @ b[used].T, atol=1e-5)  # balanced


@pytest.mark.parametrize("scale", [-2.0, 0.0])
def test_a_resize_leaves_a_positive_scale(scale):
  before = drawn(scale=scale)
  after, errors = resize(before, 2)
  assert all(row.scale == 1 for row in after.rows)
  for path in SHAPES:
    np.testing.assert_allclose(delta(after, path), delta(before, path), atol=1e-5)
    assert errors[path] < 1e-6


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_a_fresh_adapter_is_resized_exactly_and_trains(init):
  model = net()
  lora.inject(model, rank=3, init=init)
  for rank in (2, 9):
    after, errors = resize(lora.extract_adapter(model), rank)
    assert errors == dict.fromkeys(SHAPES, 0.0)
    for own in after.leaves.values():
      assert not own["lora_b"].any()
      assert np.linalg.norm(own["lora_a"], axis=0).min() > 0  # else no gradient would ever reach B


def test_added_ranks_change_no_output_and_train():
  model, before = net(), drawn("lora", 2)
  lora.attach(model, before)
  y = model(X)
  lora.eject(model)
  after, errors = resize(before, 5)
  lora.attach(model, after)
  np.testing.assert_allclose(model(X), y, rtol=1e-5, atol=1e-5)
  assert max(errors.values()) < 1e-12
  grads = nnx.grad(lambda m: jnp.square(m(X)).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
  assert jnp.abs(grads["layers"][0]["lora_b"][...]).sum(1).min() > 0


def test_stacks_are_resized_kernel_by_kernel():
  before = drawn(rank=3, lead=(4,))
  before.leaves["layers.0"]["lora_b"][2] = 0  # a layer that did not move
  after, errors = resize(before, 2)
  whole = delta(before, "layers.0")
  wanted = np.stack([cut(w, 2)[0] if w.any() else w for w in whole])
  assert relative(delta(after, "layers.0"), wanted) < 1e-6
  assert errors["layers.0"] == pytest.approx(relative(wanted, whole), abs=1e-6)
  assert np.isfinite(after.leaves["layers.0"]["lora_a"]).all()


def trained_dora(model: nnx.Module, rank: int) -> lora.Adapter:
  """A DoRA of `model`'s kernels whose A, B and magnitude have moved; it stays on the model."""
  lora.inject(model, rank=rank, method="dora")
  for i, module in enumerate(lora.adapted_modules(model).values()):
    module.lora_b[...] = jax.random.normal(jax.random.key(i), module.lora_b.shape)
    module.magnitude[...] *= 1.5
  return lora.extract_adapter(model)


def test_a_resized_dora_keeps_the_length_of_every_outputs_kernel():
  model = net()
  before = trained_dora(model, 3)
  y = model(X)
  lora.eject(model)
  same, _ = resize(before, 6)
  lora.attach(model, same)
  np.testing.assert_allclose(model(X), y, rtol=1e-4, atol=1e-5)
  lora.eject(model)
  smaller, errors = resize(before, 1)
  assert smaller.method == "dora" and min(errors.values()) > 0
  lora.attach(model, smaller)
  lora.merge(model)
  for module, own in zip(model.layers, before.leaves.values(), strict=True):
    np.testing.assert_allclose(np.linalg.norm(module.kernel[...], axis=0), own["magnitude"], rtol=1e-5)


def test_a_dora_whose_norm_a_resize_would_change_is_refused():
  with pytest.raises(InputError, match="scale is 0"):
    resize(drawn("dora", scale=0.0), 1)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_a_rank_is_a_whole_number(rank):
  with pytest.raises(InputError, match="integer of at least 1"):
    resize(drawn(), rank)


def test_what_was_trained_in_full_survives_a_resize():
  part = drawn()
  part = lora.Adapter(part.method, part.rows, part.leaves, {"layers.0.bias": X[0]})
  assert resize(part, 1)[0].full == part.full


# Out of two checkpoints


def flat(model: nnx.Module) -> dict[str, np.ndarray]:
  return {".".join(map(str, p)): np.array(v[...]) for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def tuned_flat(seed: int = 3) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {p: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for p, x in flat(net()).items()}


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_extract_is_the_best_lora_between_two_checkpoints(rank):
  base, tuned = flat(net()), tuned_flat()
  adapter, errors, rest = extract(base, tuned, rank)
  for row in adapter.rows:
    wanted, error = cut(np.float64(tuned[f"{row.path}.kernel"]) - base[f"{row.path}.kernel"], rank)
    assert errors[row.path] == pytest.approx(error, abs=1e-6)
    np.testing.assert_allclose(delta(adapter, row.path), wanted, atol=1e-6)
  assert rest == {f"{path}.bias": math.inf for path in SHAPES}  # zero in the base


def test_an_extracted_lora_matches_the_tuned_model():
  model, other = net(), net()
  tuned = tuned_flat()
  for i, layer in enumerate(other.layers):
    layer.kernel[...], layer.bias[...] = tuned[f"layers.{i}.kernel"], tuned[f"layers.{i}.bias"]
  found = extract(flat(model), tuned, 5, keep_rest=True)
  lora.attach(model, found.adapter)
  np.testing.assert_allclose(model(X), other(X), rtol=1e-5, atol=1e-5)


def test_extract_lists_every_other_changed_parameter():
  base = {"emb.embedding": np.ones((6, 4)), "norm.scale": np.ones(4), "out.kernel": np.ones((4, 2, 3)), "b": np.ones(2)}
  tuned = {k: v.copy() for k, v in base.items()}
  tuned["emb.embedding"][2, 1], tuned["norm.scale"][0], tuned["out.kernel"][0, 0, 0] = 3, 2, 5
  adapter, errors, rest = extract(base, tuned, 1)
  assert [row.path for row in adapter.rows] == ["emb"] and errors["emb"] < 1e-12
  assert rest == {"norm.scale": 0.5, "out.kernel": pytest.approx(4 / math.sqrt(24))}
  assert set(extract(base, tuned, 1, keep_rest=True).adapter.full) == set(rest)
  with pytest.raises(InputError, match="two axes"):
    extract(base, tuned, 1, "out")


def test_extract_takes_targets_as_inject_does():
  base, tuned = flat(net()), tuned_flat()
  pick = lambda *args, **kw: [row.path for row in extract(base, tuned, 1, *args, **kw).adapter.rows]
  assert pick("all", presets={"all": ["layers.*"]}, exclude="layers.0") == ["layers.1"]
  assert pick(blocks=[0]) == ["layers.0"]
  assert "layers.1.kernel" in extract(base, tuned, 1, "layers.0").rest
  with pytest.raises(InputError, match=r"lora\.targets=layer\.0 matches no module; nearest: layers\.0"):
    extract(base, tuned, 1, "layer.0")


def test_an_unchanged_checkpoint_gives_an_empty_update():
  adapter, errors, rest = extract(flat(net()), flat(net()), 2)
  assert not any(own["lora_b"].any() for own in adapter.leaves.values())
  assert errors == dict.fromkeys(SHAPES, 0.0) and rest == {}


def test_mismatched_checkpoints_list_every_problem():
  base, tuned = flat(net()), tuned_flat()
  del tuned["layers.0.bias"]
  tuned["extra"] = np.ones(2)
  tuned["layers.1.kernel"] = np.ones((3, 5))
  tuned["layers.0.kernel"][0, 0] = np.nan
  base["layers.1.bias"][0] = np.inf
  with pytest.raises(InputError) as caught:
    extract(base, tuned, 0)
  assert len(caught.value.problems) == 6
  for word in ("rank", "layers.0.bias", "extra", "(3, 5)", "layers.0.kernel", "layers.1.bias"):
    assert word in str(caught.value)


# Names


def bits(model: nnx.Module):
  graph, state = nnx.split(model)
  return graph, {path: np.asarray(v[...]).tobytes() for path, v in nnx.to_flat_state(state)}


def nudge(model: nnx.Module, by: float) -> None:
  """As a step of training would: every trained leaf moves."""
  for _, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
    v[...] = v[...] + by


def test_switching_adapters_is_lossless():
  model = net()
  before = bits(model)
  adapters = Adapters(model)
  adapters.add("math", "layers.0", rank=2)
  adapters.add("code", rank=3, bias="all", key=jax.random.key(1))
  assert bits(model) == before and (adapters.names, adapters.selected) == (["math", "code"], None)
  answers = {}
  for by, name in enumerate(["math", "code"], 1):
    adapters.select(name)
    nudge(model, by)
    answers[name] = np.asarray(model(X))
  for name in ("math", "code", "code", "math"):
    adapters.select(name)
    assert adapters.selected == name
    np.testing.assert_array_equal(model(X), answers[name])
  adapters.select(None)
  assert bits(model) == before
  assert not np.array_equal(answers["math"], answers["code"])


def test_the_selected_adapter_is_given_as_it_stands():
  model = net()
  adapters = Adapters(model)
  adapters.add("math", rank=2)
  adapters.select("math")
  nudge(model, 0.5)
  seen = adapters["math"].leaves["layers.0"]["lora_b"]
  np.testing.assert_array_equal(seen, np.full((2, 5), 0.5))
  nudge(model, 0.5)
  np.testing.assert_array_equal(seen, np.full((2, 5), 0.5))  # a copy
  adapters.select(None)
  np.testing.assert_array_equal(adapters["math"].leaves["layers.0"]["lora_b"], np.ones((2, 5)))


def test_an_external_adapter_is_added_as_a_second_one():
  model = net()
  adapters = Adapters(model)
  adapters.add("math", rank=2)
  adapters.select("math")
  nudge(model, 1)
  answer = np.asarray(model(X))
  both = combine_adapters([adapters["math"], drawn()], [0.5, 0.5])
  assert [row.rank for row in adapters.add("both", adapter=both)] == [4, 4]
  assert adapters.selected == "math"
  np.testing.assert_array_equal(model(X), answer)
  with pytest.raises(InputError, match="kernel"):
    adapters.add("large", adapter=drawn(shapes={"layers.0": (7, 6), "layers.1": (6, 3)}))
  with pytest.raises(InputError, match="matches no module"):
    adapters.add("new", "layer.7")
  assert (adapters.selected, adapters.names) == ("math", ["math", "both"])
  np.testing.assert_array_equal(model(X), answer)


def test_an_adapter_can_be_removed_and_its_name_used_again():
  model = net()
  before = bits(model)
  adapters = Adapters(model)
  adapters.add("math", rank=2)
  adapters.select("math")
  nudge(model, 1)
  gone = adapters.remove("math")
  assert (gone.leaves["layers.1"]["lora_b"] == 1).all() and bits(model) == before
  assert len(adapters) == 0 and "math" not in adapters
  adapters.add("math", rank=1)
  assert list(adapters) == ["math"]


def test_names_that_are_wrong_are_answered_with_the_nearest():
  adapters = Adapters(net())
  with pytest.raises(InputError, match="none yet"):
    adapters.select("math")
  adapters.add("math", rank=2)
  for wrong in (lambda: adapters.select("maths"), lambda: adapters["maths"], lambda: adapters.remove("maths")):
    with pytest.raises(InputError, match="did you mean math"):
      wrong()
  with pytest.raises(InputError, match="already"):
    adapters.add("math")
  with pytest.raises(InputError, match="needs a name"):
    adapters.add("")
  with pytest.raises(InputError, match="either an adapter or settings"):
    adapters.add("other", adapter=drawn(), rank=4)


def test_a_switch_keeps_externally_changed_adapters():
  model = net()
  lora.inject(model, rank=2)
  with pytest.raises(InputError, match="without a name"):
    Adapters(model)
  lora.eject(model)
  adapters = Adapters(model)
  adapters.add("math", rank=2)
  adapters.select("math")
  nudge(model, 1)
  kept = lora.merge(model)
  for switch in (lambda: adapters.select(None), lambda: adapters["math"]):
    with pytest.raises(InputError, match="no longer has the selected adapter math"):
      switch()
  lora.unmerge(model, kept)
  assert (adapters["math"].leaves["layers.0"]["lora_b"] == 1).all()
