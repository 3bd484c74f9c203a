"""Adapters: targets, initialisation, unchanged outputs before training, and storage."""

import ast
import doctest
import math
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from packs import SIZES, quickly

from lora_exp import lora
from lora_exp.config import InputError, ModelConfig
from lora_exp.lora import inject, targets
from lora_exp.lora.initialization import draw_a
from lora_exp.lora.kernels import shape as kernel_shape
from lora_exp.lora.layers import LoRAEmbed, LoRALinearGeneral
from lora_exp.lora.matmul import lora_dot, merges
from lora_exp.models.factory import abstract_model, build_model
from lora_exp.models.registry import get_family
from lora_exp.runtime.mesh import flatten

PRESETS = get_family("minigpt").presets
PATHS = list(lora.modules(abstract_model(ModelConfig(**SIZES), 97)))
X = jax.random.normal(jax.random.key(9), (2, 5, 12))


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


class Small(nnx.Module):
  """A model with every adaptable module type; one module has two parents."""

  def __init__(self, rngs: nnx.Rngs):
    self.emb = nnx.Embed(20, 12, rngs=rngs)
    self.mha = nnx.MultiHeadAttention(3, 12, qkv_features=24, decode=False, rngs=rngs, keep_rngs=False)
    self.blocks = nnx.List([nnx.Linear(12, 12, use_bias=i % 2 == 0, rngs=rngs) for i in range(11)])
    self.twin = nnx.Dict(one=self.emb)

  def __call__(self, tokens):
    x = self.emb(tokens)
    x = x + self.mha(x, deterministic=True)
    for block in self.blocks:
      x = x + nnx.relu(block(x))
    return self.twin["one"].attend(x)


def tiny() -> Small:
  return Small(nnx.Rngs(0))


TOKENS = np.arange(10).reshape(2, 5) % 20


# Targets


@pytest.mark.parametrize(
  ("pattern", "path", "hit"),
  [
    ("query", "blocks.0.mha.query", True),
    ("quer", "blocks.0.mha.query", False),
    ("mha.query", "blocks.0.mha.query", True),
    ("0.query", "blocks.0.mha.query", False),
    ("blocks.*.mha.query", "blocks.10.mha.query", True),
    ("blocks.1", "blocks.10.mha.query", False),
    ("blocks.1", "blocks.1.mha.query", True),
    ("*", "a.b", True),
    ("a.b.c", "b.c", False),
    (r"re:.*\.(query|value)", "blocks.0.mha.value", True),
    (r"re:query", "blocks.0.mha.query", False),
  ],
)
def test_patterns_match_whole_segments_or_a_full_regex(pattern, path, hit):
  assert targets.matches(pattern, path) is hit


def test_targets_exclude_and_layers_combine_in_order():
  choose = lambda *args, **more: targets.select_paths(PATHS, *args, presets=PRESETS, **more)
  assert choose("qv", layers=[1]) == ["blocks.1.mha.query", "blocks.1.mha.value"]
  assert choose(["head", "linear1"]) == ["blocks.0.linear1", "blocks.1.linear1", "output_layer"]
  assert choose("all_linear", exclude=["mlp", "mha.out"], layers=[0]) == [
    f"blocks.0.mha.{name}" for name in ("key", "query", "value")
  ]
  assert set(PATHS) == set(choose(["all_linear", "head", "embeddings"]))  # presets name every module
  assert "output_layer" not in choose("all_linear")


@pytest.mark.parametrize(
  ("settings", "says"),
  [
    ({"targets": "mha.querry"}, ["lora.targets=mha.querry", "matches no module", "mha.query"]),
    ({"targets": "all_liner"}, ["lora.targets=all_liner", "all_linear"]),
    ({"targets": ["linear1", "zzz"]}, ["lora.targets=zzz", "presets: "]),
    ({"targets": []}, ["lora.targets is empty", "lora=frozen"]),
    ({"targets": "linear1", "layers": [0, 2]}, ["lora.layers=2", "0 to 1"]),
    ({"targets": "linear1", "exclude": "mlp"}, ["leaves no module"]),
    ({"targets": "linear1", "exclude": "linnear2"}, ["lora.exclude=linnear2", "linear2"]),
  ],
)
def test_a_pattern_without_a_match_is_refused_with_the_nearest(settings, says):
  with pytest.raises(InputError) as error:
    targets.select_paths(PATHS, presets=PRESETS, **settings)
  assert len(error.value.problems) == 1
  assert all(words in error.value.problems[0] for words in says)


def test_every_bad_pattern_is_named_at_once():
  with pytest.raises(InputError) as error:
    targets.select_paths(PATHS, ["nope", "linear1", "neither"], "nor", presets=PRESETS)
  assert len(error.value.problems) == 3


def test_ranks_alphas_and_scales_go_by_pattern():
  model = abstract_model(ModelConfig(**SIZES), 97)
  rows = lora.resolve(
    model, "all_linear", rank=8, rank_pattern={"blocks.1.linear1": 2, "linear1": 4}, alpha_pattern={"query": 3.0},
    presets=PRESETS, blocks=[1],
  )  # fmt: skip
  found = {row.path.removeprefix("blocks.1."): (row.rank, row.alpha, row.scale) for row in rows}
  assert found["linear1"] == (2, 16.0, 8.0)  # the first match wins; alpha is the same for every rank
  assert found["linear2"] == (8, 16.0, 2.0)
  assert found["mha.query"] == (8, 3.0, 0.375)
  [row] = lora.resolve(model, "output_layer", rank=4, alpha=6, scaling="rslora")
  assert (row.scale, row.fan_in, row.fan_out, row.parameters) == (3.0, 32, 97, 4 * (32 + 97))
  with pytest.raises(InputError, match="rank_pattern"):
    lora.resolve(model, "output_layer", rank_pattern={"mha.query": 2})


@pytest.mark.parametrize(("alpha", "expected"), [({}, [(2, 16.0, 8.0), (32, 16.0, 0.5)]),
                                                 ({"alpha": None}, [(2, 4.0, 2.0), (32, 64.0, 2.0)])])  # fmt: skip
def test_default_alpha_is_constant_and_none_twice_the_rank(alpha, expected):
  model = abstract_model(ModelConfig(**SIZES), 97)
  rows = lora.resolve(model, ["mha.query", "linear1"], rank=32, rank_pattern={"linear1": 2}, blocks=[0], **alpha)
  assert sorted((row.rank, row.alpha, row.scale) for row in rows) == expected


# Surgery


def test_inject_keeps_the_output_and_eject_restores_it():
  model = tiny()
  graph, state = nnx.split(model)
  before = model(TOKENS)
  table = inject(model, rank=3)
  assert [row.path for row in table][:3] == ["blocks.0", "blocks.1", "blocks.2"]
  assert [row.path for row in table][9:12] == ["blocks.9", "blocks.10", "emb"]  # 10 after 9, the shared table once
  assert isinstance(model.mha.query, LoRALinearGeneral) and isinstance(model.twin["one"], LoRAEmbed)
  np.testing.assert_array_equal(model(TOKENS), before)
  with pytest.raises(InputError):  # an adapted module is not adapted twice
    inject(model, "emb")
  lora.eject(model)
  again, restored = nnx.split(model)
  assert again == graph and hash(again) == hash(graph)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  np.testing.assert_array_equal(model(TOKENS), before)


def test_frozen_and_trainable_are_told_apart_by_type():
  model = tiny()
  base = {path: x.shape for path, x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()}
  inject(model, ["mha.query", "emb"], rank=3)
  _, trainable, frozen, _ = nnx.split(model, nnx.LoRAParam, nnx.Param, ...)
  assert {p: x.shape for p, x in flatten(nnx.to_pure_dict(trainable)).items()} == {
    "emb.lora_a": (20, 3), "emb.lora_b": (3, 12), "mha.query.lora_a": (12, 3), "mha.query.lora_b": (3, 24),
  }  # fmt: skip
  assert {path: x.shape for path, x in flatten(nnx.to_pure_dict(frozen)).items()} == base


def module_cases():
  rngs = nnx.Rngs(1)
  mha = nnx.MultiHeadAttention(3, 12, qkv_features=24, decode=False, rngs=rngs, keep_rngs=False)
  swapped = nnx.LinearGeneral((5, 12), (4, 3), axis=(-2, -1), rngs=rngs)
  return {
    "Linear": (nnx.Linear(12, 7, rngs=rngs), X),
    "Linear without bias": (nnx.Linear(12, 7, use_bias=False, rngs=rngs), X),
    "query, (12) to (3, 8)": (mha.query, X),
    "out, (3, 8) to (12)": (mha.out, jax.random.normal(jax.random.key(2), (2, 5, 3, 8))),
    "two axes to two": (swapped, X),
  }


@pytest.mark.parametrize("compute", ["factored", "merged"])
@pytest.mark.parametrize("name", module_cases())
def test_an_adapted_module_computes_with_w_plus_s_a_b(name, compute):
  module, x = module_cases()[name]
  whole = nnx.clone(module)
  shape = kernel_shape(module)
  a = jax.random.normal(jax.random.key(3), (shape[0], 2))
  b = jax.random.normal(jax.random.key(4), (2, shape[1]))
  update = (1.5 * a @ b).reshape(module.kernel[...].shape)
  whole.kernel[...] = whole.kernel[...] + update
  lora.layers.attach(module, "lora", {"lora_a": a, "lora_b": b}, 1.5, compute)

  def results(module, wrt):
    graph, part, rest = nnx.split(module, wrt, ...)
    loss = lambda part, x: jnp.sin(nnx.merge(graph, part, rest)(x)).sum()
    return module(x), *jax.grad(loss, argnums=(0, 1))(part, x)

  y, grads, dx = results(module, nnx.LoRAParam)
  y_whole, grads_whole, dx_whole = results(whole, nnx.PathContains("kernel"))
  dw = grads_whole["kernel"][...].reshape(shape)
  wanted = {"y": y_whole, "dx": dx_whole, "a": 1.5 * dw @ b.T, "b": 1.5 * a.T @ dw}
  found = {"y": y, "dx": dx, "a": grads["lora_a"][...], "b": grads["lora_b"][...]}
  for key, g in wanted.items():
    assert np.abs(found[key] - g).max() <= 1e-5 * np.abs(g).max(), key


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order of operands matters on a CPU")
@pytest.mark.parametrize("compute", ["factored", "merged"])
def test_the_gradient_of_a_transposes_the_thin_operand(compute):
  x, w, a, b = jnp.ones((40, 20)), jnp.ones((20, 11)), jnp.ones((20, 3)), jnp.ones((3, 11))

  def loss(a):
    return jnp.sin(lora_dot(x, w, a, b, jnp.float32(2), None, compute)).sum()

  program = jax.jit(jax.grad(loss)).lower(a).compile().as_text()
  assert re.search(r"f32\[3,20\]\S* dot\(", program) and not re.search(r"f32\[20,3\]\S* dot\(", program)


@pytest.mark.parametrize(
  ("rows", "kept", "merged"), [(20, True, False), (20, False, True), (100, True, True), (5, False, False)]
)
def test_a_kernel_is_merged_where_that_is_worth_a_copy_of_it(rows, kept, merged):
  assert merges("auto", rows, jnp.ones((20, 30)), jnp.ones((20, 2)), kept) == merged


def test_an_adapted_embedding_changes_lookup_and_tied_head():
  module, ids = nnx.Embed(20, 12, rngs=nnx.Rngs(0)), jnp.array([[1, 5, 19]])
  whole = nnx.clone(module)
  a, b = jax.random.normal(jax.random.key(3), (20, 2)), jax.random.normal(jax.random.key(4), (2, 12))
  whole.embedding[...] = whole.embedding[...] + 0.5 * a @ b
  lora.layers.attach(module, "lora", {"lora_a": a, "lora_b": b}, 0.5)
  np.testing.assert_allclose(module(ids), whole(ids), atol=1e-5)
  np.testing.assert_allclose(module.attend(X), whole.attend(X), atol=2e-5)


def test_dropout_applies_to_the_adapter_input_in_training():
  base = nnx.Linear(12, 12, rngs=nnx.Rngs(0))
  module = nnx.clone(base)
  lora.layers.attach(module, "lora", {"lora_a": jnp.eye(12), "lora_b": jnp.eye(12)}, 1.0)  # y = base(x) + dropout(x)
  np.testing.assert_allclose(module(X), base(X) + X, atol=1e-5)
  module.deterministic, module.rate[...] = False, jnp.float32(0.25)
  seen = np.asarray(module(X) - base(X))
  dropped = np.abs(seen) < 1e-5
  assert 0.1 < dropped.mean() < 0.4
  np.testing.assert_allclose(seen[~dropped], np.asarray(X / 0.75)[~dropped], atol=1e-5)
  module.rate[...] = jnp.float32(0.0)
  np.testing.assert_allclose(module(X), base(X) + X, atol=1e-5)


# The draw of A


@pytest.mark.parametrize("init", ["kaiming", "he_uniform"])
def test_rank_4_starts_as_the_first_half_of_rank_8(init):
  key = jax.random.key(5)
  np.testing.assert_array_equal(draw_a(key, init, 64, 64, 4), draw_a(key, init, 64, 64, 8)[:, :4])


@pytest.mark.parametrize(("init", "bound"), [("kaiming", 1 / math.sqrt(64)), ("he_uniform", math.sqrt(6 / 64))])
def test_a_is_uniform_within_its_bound_and_b_is_zero(init, bound):
  model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
  inject(model, rank=32, init=init)
  a, b = model.layers[0].lora_a[...], model.layers[0].lora_b[...]
  assert 0.99 * bound < np.abs(a).max() <= bound
  assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05) and abs(float(a.mean())) < 0.05 * bound
  assert not b.any() and a.shape == (64, 32) and b.shape == (32, 8)


def test_another_target_changes_no_other_modules_start():
  few, many = tiny(), tiny()
  inject(few, "blocks.3", rank=4), inject(many, rank=4)
  np.testing.assert_array_equal(few.blocks[3].lora_a[...], many.blocks[3].lora_a[...])
  assert (many.blocks[3].lora_a[...] != many.blocks[4].lora_a[...]).all()
  other = tiny()
  inject(other, "blocks.3", rank=4, key=jax.random.key(1))
  assert (few.blocks[3].lora_a[...] != other.blocks[3].lora_a[...]).all()


# The tutorial's filter


@cache
def after_five_steps(filtered: str):
  """MiniGPT before and after five steps of Adam on the leaves that a filter selects; its first gradient, too."""
  with quickly():
    model = build_model(ModelConfig(**(SIZES | {"layers": 1})), 97)
  lora.inject(model, ["all_linear", "head"], rank=4, presets=PRESETS)
  chosen = {
    "tutorial": nnx.All(nnx.Param, nnx.PathContains("lora_a") or nnx.PathContains("lora_b")),
    "ours": nnx.LoRAParam,
  }[filtered]
  tokens = np.random.default_rng(0).integers(0, 97, (2, 9))
  graph, trained, rest = nnx.split(model, chosen, ...)
  rule = optax.adam(1e-3)

  def loss(trained):
    logits = nnx.merge(graph, trained, rest)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

  @jax.jit
  def step(trained, opt):
    grads = jax.grad(loss)(trained)
    updates, opt = rule.update(grads, opt)
    return optax.apply_updates(trained, updates), opt, grads

  logits = jax.jit(lambda trained: nnx.merge(graph, trained, rest)(tokens))
  before, opt, first = logits(trained), rule.init(trained), None
  for _ in range(5):
    trained, opt, grads = step(trained, opt)
    first = grads if first is None else first
  return np.asarray(before), np.asarray(logits(trained)), flatten(nnx.to_pure_dict(first))


def test_the_tutorials_filter_trains_nothing():
  """`P or Q` is Python's `or`: it is P. A alone is selected, and its gradient is exactly 0 while B is."""
  before, after, grads = after_five_steps("tutorial")
  assert grads and all(path.endswith("lora_a") for path in grads)
  assert not any(np.asarray(g).any() for g in grads.values())
  np.testing.assert_array_equal(before, after)


def test_a_and_b_by_type_do_train():
  before, after, grads = after_five_steps("ours")
  assert {path.rsplit(".", 1)[1] for path in grads} == {"lora_a", "lora_b"}
  assert all(np.asarray(g).any() for path, g in grads.items() if path.endswith("lora_b"))
  assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("module", ["lora_exp.lora", "lora_exp.lora.injection"])
def test_the_examples_in_the_docstrings_run(module):
  failed, ran = doctest.testmod(sys.modules[module])
  assert ran > 0 and failed == 0


def test_type_checkers_see_the_names_that_the_package_exports():
  block = next(node for node in ast.parse(Path(lora.__file__).read_text()).body if isinstance(node, ast.If))
  typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
  assert typed == {name: f"lora_exp.lora.{module}" for name, module in lora.MODULE_OF.items()}
  for name, module in typed.items():
    assert getattr(lora, name) is getattr(import_module(str(module)), name)
