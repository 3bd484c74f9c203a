"""Every method on a custom NNX model with only `from lora_exp import lora`: inject, train, merge, eject."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from packs import quickly

from lora_exp import lora
from lora_exp.config import InputError
from lora_exp.lora import methods

LAYERS = 3


class Mixed(nnx.Module):
  """Modules of every kind that can be adapted, the head tied to the embedding, three layers scanned over."""

  def __init__(self, rngs: nnx.Rngs):
    self.emb = nnx.Embed(20, 8, rngs=rngs)
    self.mha = nnx.MultiHeadAttention(2, 8, qkv_features=12, decode=False, rngs=rngs, keep_rngs=False)
    self.conv = nnx.Conv(8, 8, kernel_size=(3,), padding="CAUSAL", rngs=rngs)
    self.per_head = nnx.Einsum("btnh,nhk->btnk", (2, 4, 5), (2, 5), rngs=rngs)
    self.from_heads = nnx.Einsum("btnk,nki->bti", (2, 5, 8), rngs=rngs)
    self.each = nnx.LinearGeneral((4,), (4,), axis=-1, batch_axis={0: 2}, rngs=rngs)
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.stack = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), LAYERS))

  def __call__(self, tokens_BT):
    x = self.emb(tokens_BT)
    x = x + self.mha(x, deterministic=True)
    x = x + self.conv(x)
    split = lambda x: x.reshape(*x.shape[:2], 2, 4)
    x = x + self.from_heads(self.per_head(split(x)))
    x = x + jnp.moveaxis(self.each(jnp.moveaxis(split(x), 2, 0)), 0, 2).reshape(x.shape)
    layers = nnx.scan(lambda x, layer: x + nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return self.emb.attend(self.norm(layers(x, self.stack)))


@cache
def untouched() -> Mixed:
  return Mixed(nnx.Rngs(0))


def fresh() -> Mixed:
  return nnx.clone(untouched())


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


CASES: dict[str, dict] = {
  "lora": {"alpha": 5.0},
  "merged": {"alpha": 5.0, "compute": "merged"},
  "rslora": {"alpha": 5.0, "scaling": "rslora", "init": "orthogonal"},
  "pissa": {"alpha": 5.0, "init": "pissa"},
  "olora": {"alpha": 5.0, "init": "olora"},
  "dora": {"alpha": 5.0, "method": "dora"},
  "adalora": {"alpha": 5.0, "method": "adalora"},
  "vera": {"method": "vera", "exclude": ["per_head", "each", "stack"]},
  "bias": {"alpha": 5.0, "bias": "all"},
  "train_modules": {"alpha": 5.0, "train_modules": ["norm", "stack"], "exclude": "stack"},
}
for method in methods.every():
  if method.adapts_kernels and method.name not in CASES:
    stacks = {} if method.stackable else {"exclude": ["per_head", "each", "stack"]}
    CASES[method.name] = {"method": method.name, **stacks}
SLOW = ("merged", "rslora", "olora", "adalora", "bias", "train_modules")
LONG = dict.fromkeys(SLOW, pytest.mark.slow) | dict.fromkeys(("dora", "vera"), pytest.mark.slow)
EACH = [pytest.param(case, marks=LONG.get(case, [])) for case in CASES]
TOKENS = np.random.default_rng(0).integers(0, 20, (4, 7))


@cache
def base() -> tuple[nnx.GraphDef, dict[str, np.ndarray], np.ndarray]:
  """The model before it is adapted: graph, bytes, and what it says."""
  model = fresh()
  return nnx.graphdef(model), arrays(model), say(model)


def arrays(model, kind=...) -> dict[str, np.ndarray]:
  """Every array of a kind by dotted path, but for the keys of dropout."""
  found = {".".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(nnx.state(model, kind))}
  return {p: np.asarray(x) for p, x in found.items() if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}


def as_bytes(found) -> dict[str, tuple]:
  return {path: (x.shape, x.dtype, x.tobytes()) for path, x in found.items()}


@jax.jit(static_argnums=0)
def _answer(graph, state, tokens):
  return nnx.merge(graph, state)(tokens)


def say(model) -> np.ndarray:
  return np.asarray(_answer(*nnx.split(model), TOKENS))


def adapted(case: str) -> tuple[Mixed, list[lora.AdaptedModule]]:
  model = fresh()
  return model, lora.inject(model, **{"rank": 3, "key": jax.random.key(7)} | CASES[case])


def loss_of(model, tokens):
  logits = model(tokens[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(model, steps: int = 8, rate: float = 2e-2) -> list[float]:
  """Steps of AdamW on what has the type of an adapter's leaf, in place; the losses."""
  graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)
  rule = optax.adamw(rate)

  @jax.jit
  def step(trained, opt):
    loss, grads = jax.value_and_grad(lambda t: loss_of(nnx.merge(graph, t, rest, copy=True), TOKENS))(trained)
    updates, opt = rule.update(grads, opt, trained)
    return optax.apply_updates(trained, updates), opt, loss

  losses, opt = [], rule.init(trained)
  for _ in range(steps):
    trained, opt, loss = step(trained, opt)
    losses.append(float(loss))
  nnx.update(model, trained)
  return losses


@cache
def life(case: str) -> dict:
  """An adapted model's life: what it said and held at each station of it."""
  model, table = adapted(case)
  seen = {"table": table, "start": say(model)}
  seen["leaves"] = arrays(model, lora.Constant)
  seen["losses"] = train(model)
  seen["constants"], seen["frozen"] = arrays(model, lora.Constant), arrays(model)
  seen["adapter"], seen["trained"] = arrays(model, nnx.LoRAParam), say(model)
  with lora.disabled(model):
    seen["off"] = say(model)
  with lora.merged(model):
    seen["within"] = say(model)
  seen["on"] = say(model)
  kept = lora.merge(model)
  seen["merged"], seen["merged_graph"] = say(model), nnx.graphdef(model)
  lora.unmerge(model, kept)
  seen["back"], seen["again"], seen["said_again"] = arrays(model), arrays(model, nnx.LoRAParam), say(model)
  lora.eject(model)
  seen["ejected"] = (nnx.graphdef(model), arrays(model), say(model))
  return seen


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH)
def test_nothing_changes_before_the_first_step(case):
  np.testing.assert_array_equal(life(case)["start"], base()[2])


@pytest.mark.parametrize("case", EACH)
def test_training_by_variable_type_changes_only_the_adapter(case):
  seen = life(case)
  assert seen["losses"][-1] < 0.99 * seen["losses"][0]
  assert as_bytes(seen["constants"]) == as_bytes(seen["leaves"])
  for path, x in base()[1].items():
    module, _, leaf = path.rpartition(".")
    name = path if path not in seen["adapter"] else f"{module}.{lora.FROZEN_PREFIX}{leaf}"
    assert seen["frozen"][name].tobytes() == x.tobytes(), path
  fresh = arrays(adapted(case)[0], nnx.LoRAParam)
  assert fresh.keys() == seen["adapter"].keys()
  for path, x in seen["adapter"].items():
    moved = (x != fresh[path]).reshape(LAYERS, -1) if path.startswith("stack") else [(x != fresh[path])]
    assert all(layer.any() for layer in moved) or path.endswith("key.bias"), path


@pytest.mark.parametrize("case", EACH)
def test_merged_it_says_the_same_with_one_product_a_kernel(case):
  seen = life(case)
  assert seen["merged_graph"] == base()[0]
  largest = np.abs(seen["trained"]).max()
  assert np.abs(seen["trained"] - base()[2]).max() > 1e-2 * largest
  for name in ("within", "merged"):
    assert np.abs(seen[name] - seen["trained"]).max() <= 1e-4 * largest, name


@pytest.mark.parametrize("case", EACH)
def test_disable_unmerge_and_eject_restore_every_bit(case):
  seen = life(case)
  np.testing.assert_array_equal(seen["off"], base()[2])
  np.testing.assert_array_equal(seen["on"], seen["trained"])
  assert as_bytes(seen["again"]) == as_bytes(seen["adapter"])
  assert as_bytes(seen["back"]) == as_bytes(seen["frozen"])
  np.testing.assert_array_equal(seen["said_again"], seen["trained"])
  graph, held, said = seen["ejected"]
  assert graph == base()[0] and hash(graph) == hash(base()[0])
  assert as_bytes(held) == as_bytes(base()[1])
  np.testing.assert_array_equal(said, base()[2])


def test_every_kind_of_kernel_is_seen_as_in_and_out():
  sizes = {row.path: (row.fan_in, row.fan_out) for row in life("lora")["table"]}
  assert sizes == {
    "conv": (24, 8), "each": (4, 4), "emb": (20, 8), "from_heads": (5 * 2, 8), "mha.key": (8, 12), "mha.out": (12, 8),
    "mha.query": (8, 12), "mha.value": (8, 12), "per_head": (4, 5), "stack": (8, 8),
  }  # fmt: skip
  shape = {path: x.shape for path, x in life("lora")["adapter"].items()}
  assert shape["stack.lora_a"] == (LAYERS, 8, 3)
  assert shape["per_head.lora_a"] == (2, 4, 3) and shape["each.lora_b"] == (2, 3, 4)
  for row in life("lora")["table"]:
    own = [x.size for path, x in life("lora")["adapter"].items() if path.startswith(f"{row.path}.")]
    assert row.parameters == sum(own)


def heads_of_layers(heads: int) -> nnx.Dict:
  """Three layers, each with a kernel for every head."""
  make = lambda key: nnx.Einsum("bnh,nhk->bnk", (heads, 6, 5), (heads, 5), rngs=nnx.Rngs(key))
  return nnx.Dict(stack=nnx.vmap(make)(jax.random.split(jax.random.key(0), LAYERS)))


@pytest.mark.parametrize("model", [lambda: nnx.Dict(stack=fresh().stack), lambda: heads_of_layers(2)])
def test_each_kernel_of_a_stack_is_drawn_within_its_own_bound(model):
  of = model()
  lora.inject(of, "stack", rank=64)
  a = np.asarray(of.stack.lora_a[...])
  flat, bound = a.reshape(-1, *a.shape[-2:]), 1 / np.sqrt(a.shape[-2])
  assert all(0.95 * bound < np.abs(one).max() <= bound for one in flat)
  assert all((flat[0] != other).mean() > 0.99 for other in flat[1:])


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", [2, LAYERS])
def test_stacked_per_head_kernels_merge_and_unmerge(heads, method):
  model = heads_of_layers(heads)
  lora.inject(model, "stack", rank=2, alpha=3.0, method=method)
  model.stack.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(1), model.stack.lora_b[...].shape)
  model.stack.scale[...] = jnp.array([0.5, 1.0, 2.0])  # a layer's own
  x = jax.random.normal(jax.random.key(2), (LAYERS, 4, heads, 6))
  each = lambda: np.asarray(nnx.vmap(lambda layer, x: layer(x))(model.stack, x))
  w, b, s = model.stack.kernel[...], model.stack.bias[...], model.stack.scale[...][:, None, None, None]
  whole = w + s * model.stack.lora_a[...] @ model.stack.lora_b[...]
  if method == "dora":
    whole = whole * jnp.linalg.norm(w, axis=-2, keepdims=True) / jnp.linalg.norm(whole, axis=-2, keepdims=True)
  found = each()
  np.testing.assert_allclose(found, jnp.einsum("lbnh,lnhk->lbnk", x, whole) + b[:, None], atol=1e-5)
  with lora.merged(model):
    np.testing.assert_allclose(each(), found, atol=1e-5)
  np.testing.assert_array_equal(each(), found)


def test_vera_refuses_a_stack_of_kernels_by_name():
  with pytest.raises(InputError, match="stack of kernels"):
    lora.inject(fresh(), "stack", method="vera", rank=3)


def test_the_ten_lines_of_the_readme(tmp_path):
  from pathlib import Path  # a name of the reader's

  model, tokens, folder = fresh(), TOKENS, Path(tmp_path) / "adapter"
  # README: begin
  table = lora.inject(model, ["mha", "stack"], rank=4, alpha=8)  # in place; its outputs are the base's, bit for bit
  optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, tokens)
    optimizer.update(model, grads)
    return loss

  losses = [step(model, optimizer) for _ in range(10)]
  lora.save_adapter(folder, lora.extract_adapter(model), lora.Naming(), {"base": "Mixed"})
  kept = lora.merge(model)  # a plain model of its own classes; lora.unmerge(model, kept) undoes it
  # README: end
  assert losses[-1] < losses[0] and len(table) == 5
  assert nnx.graphdef(model) == base()[0] and (folder / "adapter_model.safetensors").stat().st_size > 0
  lora.unmerge(model, kept)
  assert set(lora.adapted_modules(model)) == {row.path for row in table}
