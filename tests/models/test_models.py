"""Every module: a token sees its own document up to itself, and decoding with a cache is the plain forward pass."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packs import SIZES, bent, job_of, quickly, rows, small
from tiny_models import GEMMA, MIXTRAL, OLMO2, PHI3

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.factory import build_model
from lora_exp.models.modules.attention import attend, causal_mask
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.step import batch_loss

VOCAB = 97
LLAMA = {"family": "llama", "dropout": 0.0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
MODELS = {
  "minigpt": {},
  "gpt2": {"family": "gpt2", "dropout": 0.0, "arch": ArchConfig(activation="gelu_tanh")},
  "llama": LLAMA | {"arch": ArchConfig(kv_heads=2, head_dim=6, tied=False, qkv_bias=True, mlp_bias=True)},
  "gemma": LLAMA | {"arch": ArchConfig(**GEMMA, rope_scaling=LINEAR, attn_softcap=20.0)},
  "olmo2": LLAMA | {"family": "olmo2", "arch": ArchConfig(**OLMO2)},
  "mixtral": LLAMA | {"family": "mixtral", "arch": ArchConfig(**MIXTRAL)},
  "phi3": LLAMA | {"family": "phi3", "arch": ArchConfig(**PHI3)},
}


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@cache
def model_of(name: str) -> LanguageModel:
  with quickly():
    return jax.jit(lambda: build_model(ModelConfig(**(SIZES | MODELS[name])), VOCAB))()


@cache
def minigpt(**more):
  with quickly():
    return jax.jit(lambda: build_model(ModelConfig(**(SIZES | more)), VOCAB))()


@jax.jit
def logits(model, tokens, positions=None, segments=None):
  if positions is None:
    return model(tokens)
  return model.logits(model.hidden(tokens, positions, causal_mask(segments))[0])


def tokens_of(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, VOCAB, shape, dtype=np.int32)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_changes_no_logit_before_it(name):
  model, tokens = model_of(name), tokens_of(0, 2, 12)
  changed = tokens.copy()
  changed[:, 7] = (changed[:, 7] + 1) % VOCAB
  before, after = logits(model, tokens), logits(model, changed)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert all((before[:, t] != after[:, t]).any() for t in range(7, 12))


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_a_packed_row_has_the_logits_it_has_alone(name):
  model, tokens = model_of(name), tokens_of(1, 1, 16)
  positions = np.array([[*range(5), *range(8), 0, 0, 0]])
  segments = np.array([[1] * 5 + [2] * 8 + [0] * 3])
  packed = logits(model, tokens, positions, segments)
  assert np.isfinite(packed).all()  # padding too
  for piece in (slice(0, 5), slice(5, 13)):
    np.testing.assert_allclose(packed[:, piece], logits(model, tokens[:, piece]), atol=2e-5)
  # The first document matters: where both are one segment, the second sees it.
  merged = logits(model, tokens, positions, np.minimum(segments, 1))
  assert np.abs(merged[:, 5:13] - packed[:, 5:13]).max() > 1e-3


def test_attention_is_the_softmax_of_its_definition():
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 4, 8)) * 3
  mask = causal_mask(jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]]))
  expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
  np.testing.assert_allclose(jax.jit(attend)(q, k, v, mask), expected, atol=2e-6)

  def gradients(function):
    return jax.jit(jax.grad(lambda *arrays: (function(*arrays) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

  reference = gradients(lambda *arrays: jax.nn.dot_product_attention(*arrays, mask=mask[:, None]))
  for ours, g in zip(gradients(lambda *arrays: attend(*arrays, mask)), reference, strict=True):
    assert np.abs(ours - g).max() <= 1e-5 * np.abs(g).max()


def test_the_order_of_tokens_matters():
  tokens = tokens_of(2, 1, 10)
  swapped = tokens[:, [1, 0, *range(2, 10)]]
  assert np.abs(logits(minigpt(), tokens)[:, -1] - logits(minigpt(), swapped)[:, -1]).max() > 1e-3


def test_a_window_hides_what_lies_before_it():
  arch = ArchConfig(**{**GEMMA, "full_layers": None})
  local = jax.jit(lambda: build_model(ModelConfig(**(SIZES | LLAMA | {"arch": arch})), VOCAB))()
  tokens = tokens_of(5, 1, 12)
  changed = tokens.copy()
  changed[:, 0] = (changed[:, 0] + 1) % VOCAB
  before, after = logits(local, tokens), logits(local, changed)  # two layers of 4 reach back 2·3 positions
  assert (before[:, 6] != after[:, 6]).any()
  np.testing.assert_array_equal(before[:, 7:], after[:, 7:])
  before, after = logits(model_of("gemma"), tokens), logits(model_of("gemma"), changed)
  assert (before[:, 11] != after[:, 11]).any()  # its second layer sees everything


def test_query_heads_of_a_group_share_a_key_head():
  q = jax.random.normal(jax.random.key(0), (2, 6, 4, 8)) * 3
  k, v = jax.random.normal(jax.random.key(1), (2, 2, 6, 2, 8)) * 3
  mask = causal_mask(jnp.ones((2, 6), int))
  expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=0.2)
  np.testing.assert_allclose(attend(q, k, v, mask, scale=0.2), expected, atol=2e-6)


@pytest.mark.slow
def test_a_tied_table_is_adapted_once_and_both_uses_see_it():
  sizes = {f"model__{k}": v for k, v in MODELS["gemma"].items()}
  job = job_of(small(**sizes, lora__targets=["embeddings", "attention"]))
  params, trial = jax.tree.map(lambda x: x[0], (job.state.params, job.trials))
  assert "lora_a" in params["embed_tokens"] and "lm_head" not in params

  @jax.jit
  def whole(params, tokens):
    return assemble(job.program, params, trial, job.frozen, None)(tokens)

  base, tokens = build_model(ModelConfig(**(SIZES | MODELS["gemma"])), 257), tokens_of(6, 1, 8)
  np.testing.assert_allclose(whole(params, tokens), base(tokens), atol=2e-5)
  bent_params = bent(params)
  table = base.embed_tokens.embedding[...]
  update = trial.scale[job.program.modules.index("embed_tokens")] * (
    bent_params["embed_tokens"]["lora_a"] @ bent_params["embed_tokens"]["lora_b"]
  )
  base.embed_tokens.embedding[...] = table + update
  only_table = jax.tree.map(jnp.zeros_like, params) | {"embed_tokens": bent_params["embed_tokens"]}
  np.testing.assert_allclose(whole(only_table, tokens), base(tokens), atol=2e-4)
  loss = lambda p: batch_loss(job.program, p, trial, job.frozen, rows(), job.keys[0]).loss
  grads = jax.jit(jax.grad(loss))(bent_params)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", MODELS)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row(name):
  model, tokens = model_of(name), tokens_of(3, 2, 12)

  @jax.jit
  def cached(model, tokens):
    store, found = model.empty_cache(2, 12), []
    slots = jnp.arange(12)
    for first, last in [(0, 5), *((t, t + 1) for t in range(5, 12))]:
      at = jnp.arange(first, last)
      seen = jnp.broadcast_to(slots <= at[:, None], (2, last - first, 12))
      x, store = model.hidden(tokens[:, first:last], jnp.broadcast_to(at, (2, last - first)), seen, store, first)
      found.append(model.logits(x))
    return jnp.concatenate(found, axis=1)

  np.testing.assert_allclose(cached(model, tokens), logits(model, tokens), atol=2e-5)


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient():
  found = []
  for remat in (False, True):
    job = job_of(small(model__remat=remat, model__layers=1, lora__dropout=0.1))
    params, trial = jax.tree.map(lambda x: x[0], (bent(job.state.params), job.trials))

    def loss(params, job=job, trial=trial):
      return batch_loss(job.program, params, trial, job.frozen, rows(), job.keys[0]).loss

    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    assert ("remat" in str(traced.jaxpr)) is remat
    found.append(jax.tree.leaves(traced.lower().compile()(params)))
  for a, b in zip(*found, strict=True):
    assert float(jnp.abs(a - b).max()) <= 1e-5 * float(jnp.abs(a).max())


def test_dropout_is_on_in_training_only_and_follows_its_key():
  job = job_of(small(lora__dropout=0.1, model__layers=1))
  params, trial = jax.tree.map(lambda x: x[0], (bent(job.state.params), job.trials))
  loss = jax.jit(lambda key: batch_loss(job.program, params, trial, job.frozen, rows(), key).loss)
  one, two = loss(jax.random.key(1)), loss(jax.random.key(2))
  still = jax.jit(lambda: batch_loss(job.program, params, trial, job.frozen, rows(), None).loss)()
  assert one == loss(jax.random.key(1)) and len({float(one), float(two), float(still)}) == 3


def test_the_base_depends_on_its_seed_alone():
  leaves = lambda seed: flatten(job_of(small(model__seed=seed, model__layers=1)).frozen)
  one, other = leaves(0), leaves(1)
  assert (np.asarray(one["output_layer.kernel"]) != np.asarray(other["output_layer.kernel"])).any()
  eager = build_model(ModelConfig(**(SIZES | {"layers": 1})), 257)
  for path, x in flatten(nnx.to_pure_dict(nnx.state(eager, nnx.Param))).items():
    np.testing.assert_allclose(one[path], x, atol=1e-6)


def test_bfloat16_activations_with_float32_parameters():
  model = minigpt(dtype="bfloat16")
  tokens = tokens_of(4, 2, 12)
  low, high = logits(model, tokens), logits(minigpt(), tokens)
  assert low.dtype == jnp.bfloat16 and model.output_layer.kernel[...].dtype == jnp.float32
  assert 0 < np.abs(low - high).max() < 0.1 * np.abs(high).max()
