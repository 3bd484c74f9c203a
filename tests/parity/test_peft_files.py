"""Against PEFT: it loads every adapter file that we say it can, and we load its own, to the same logits."""

import json
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, reduce
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lora_exp import lora
from lora_exp.config import ArchConfig, InputError, ModelConfig
from lora_exp.lora import kernels, methods
from lora_exp.lora.full_parameters import full_paths
from lora_exp.lora.injection import kernels_of
from lora_exp.lora.methods.dora import squared_norm
from lora_exp.models.factory import build_model
from lora_exp.models.hf_config import from_hf
from lora_exp.models.registry import get_family
from lora_exp.models.weights import store

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB, LENGTH = 61, 12
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "intermediate_size": 40, "max_position_embeddings": 32}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], lora.Naming]] = {
  "gpt2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32},
           lora.Naming("transformer.", conv1d=True, tied=lora.TiedHead("wte", "lm_head"), model_type="gpt2")),
  "llama": ("Llama", {**SIZES, "attention_bias": True}, lora.Naming("model.", model_type="llama")),
  "gemma": ("Gemma", {**SIZES, "num_key_value_heads": 1},
            lora.Naming("model.", tied=lora.TiedHead("embed_tokens", "lm_head"), model_type="gemma")),
  "qwen3": ("Qwen3", {**SIZES, "tie_word_embeddings": False}, lora.Naming("model.", model_type="qwen3")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick():
  torch.set_num_threads(1)
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@dataclass
class Pair:
  """One checkpoint, in transformers and here."""

  reference: Any
  ours: nnx.Module
  naming: lora.Naming

  def theirs(self):
    """A fresh copy, because PEFT modifies the model."""
    return deepcopy(self.reference)

  def model(self) -> nnx.Module:
    return nnx.clone(self.ours)

  @property
  def shapes(self) -> dict[str, tuple[int, int]]:
    return {path: kernels.shape(module) for path, module in lora.modules(self.ours).items()}

  @property
  def full_shapes(self) -> dict[str, tuple[int, ...]]:
    state = nnx.to_flat_state(nnx.state(self.ours, nnx.Param))
    return {".".join(map(str, path)): tuple(x.shape) for path, x in state}


@cache
def pair(family: str) -> Pair:
  kind, arguments, naming = FAMILIES[family]
  cfg = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None,
                                               pad_token_id=None, **arguments)  # fmt: skip
  model = transformers.AutoModelForCausalLM.from_config(cfg)
  draw = torch.Generator().manual_seed(len(family))
  for name, x in model.named_parameters():
    noise = torch.randn(x.shape, generator=draw)
    x.data = x.data + 0.3 * noise if x.ndim == 1 else noise * (0.5 if "emb" in name or "wt" in name else 0.2)
  directory = Path(mkdtemp(prefix="lora_exp_peft_"))
  model.save_pretrained(directory)
  return Pair(model.eval(), ours(directory), naming)


def ours(directory: Path, **dtypes: str) -> nnx.Module:
  """The checkpoint in `directory` as our model."""
  fields = from_hf(json.loads((directory / "config.json").read_text()))
  cfg = ModelConfig(**(fields | {"arch": ArchConfig(**fields["arch"]), "dropout": 0.0}), **dtypes)
  model = build_model(cfg, VOCAB)
  state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), state)
  nnx.update(model, store.load(directory, state, places, get_family(cfg.family).stored_names(cfg)))
  return model


@nnx.jit
def forward(model: nnx.Module) -> jax.Array:
  return model(jnp.asarray(TOKENS))


def our_logits(found: Pair, adapter: lora.Adapter) -> np.ndarray:
  """Logits with g ⊙ (W + s·(A·B − A₀·B₀)) for each kernel, formed in numpy: one program serves a family."""
  model = nnx.clone(found.ours)
  known = lora.modules(model)
  for row in adapter.rows:
    kernel, own = kernels.of(known[row.path]), adapter.leaves[row.path]
    w = np.asarray(kernel[...], np.float64)
    if "hada_w1_a" in own:
      new = w + row.scale * (own["hada_w1_b"] @ own["hada_w1_a"]) * (own["hada_w2_b"] @ own["hada_w2_a"])
    elif "ia3_in" in own or "ia3_out" in own:
      new = w * own["ia3_out"] if "ia3_out" in own else own["ia3_in"][:, None] * w
    elif "vera_a" in own:
      new = w + row.scale * (own["vera_a"] * own["lambda_d"]) @ (own["vera_b"] * own["lambda_b"])
    else:
      a = own["lora_a"] * own["lora_e"] if "lora_e" in own else own["lora_a"]
      start = own["start_a"] @ own["start_b"] if "start_a" in own else 0
      new = w + row.scale * (a @ own["lora_b"] - start)
    if "magnitude" in own:
      new *= own["magnitude"] / np.linalg.norm(new, axis=0)
    kernel[...] = jnp.asarray(np.float32(new))
  for path, x in adapter.full.items():
    *owner, name = path.split(".")
    module = reduce(lambda node, part: node[int(part)] if part.isdigit() else getattr(node, part), owner, model)
    getattr(module, name)[...] = jnp.asarray(x)
  return np.asarray(forward(model))


def their_logits(model) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@cache
def base_logits(family: str) -> np.ndarray:
  return np.asarray(forward(pair(family).ours))


def attached(base: nnx.Module, adapter: lora.Adapter) -> nnx.Module:
  """A copy of `base` with `adapter`, which for DoRA gets the norms of the base's kernels."""
  model = nnx.clone(base)
  known = kernels_of(model, adapter.rows)
  norm2 = lambda path, own: {"kernel_norm2": squared_norm(known[path])} if "magnitude" in own else {}
  lora.attach(model, replace(adapter, leaves={p: {**own, **norm2(p, own)} for p, own in adapter.leaves.items()}))
  return model


def trained(found: Pair, targets, *, method="lora", init="kaiming", bias="none", train_modules=None, layers=None,
            **settings) -> lora.Adapter:  # fmt: skip
  """An adapter with these settings as if it had been trained: every leaf at random."""
  rng = np.random.default_rng(len(repr(settings)))
  presets = get_family("gpt2" if found.naming.conv1d else "llama").presets
  rows = lora.resolve(found.ours, targets, method=method, presets=presets, blocks=layers, **settings)
  known = lora.modules(found.ours)
  shared = {"vera_a": rng.normal(size=(200, 200)), "vera_b": rng.normal(size=(200, 200))}
  leaves = {}
  for row in rows:
    sizes = {"I": row.fan_in, "O": row.fan_out, "R": row.rank}
    kind = methods.variant(method, init)
    names = kind.leaf_names(row.path, {})
    own = {name: 0.3 * rng.normal(size=[sizes[axis] for axis in kind.leaves[name].axes]) for name in names}
    if method == "dora":
      norm = np.linalg.norm(kernels.of(known[row.path])[...], axis=0)
      own |= {"magnitude": norm * (1 + own["magnitude"]), "kernel_norm2": norm**2}
    if method == "vera":
      own["vera_a"] = shared["vera_a"][: row.fan_in, : row.rank]
      own["vera_b"] = shared["vera_b"][: row.rank, : row.fan_out]
    if method == "adalora":
      own["lora_e"][:2] = 0, 3
    leaves[row.path] = {name: np.float32(x) for name, x in own.items()}
  shapes = found.full_shapes
  full = {path: 0.3 * rng.normal(size=shapes[path]) for path in full_paths(found.ours, rows, bias, train_modules)}
  whole = {path: np.float32(x) for path, x in full.items()}
  return lora.Adapter(methods.variant(method, init).name, tuple(rows), leaves, whole)


def in_peft(found: Pair, directory: Path):
  """The adapter in `directory` on the checkpoint, in PEFT, which must know every tensor and miss none."""
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = peft.PeftModel.from_pretrained(found.theirs(), str(directory))
    state = peft.load_peft_weights(str(directory), device="cpu")
    result = peft.set_peft_model_state_dict(model, state)
  assert not result.unexpected_keys
  # VeRA's pair is listed in every layer, too.
  ends = ("lora_", "hada_", "ia3_", "vera_lambda", "modules_to_save", "base_model.vera_")
  assert not [key for key in result.missing_keys if any(part in key for part in ends)]
  assert not [w for w in said if "missing adapter keys" in str(w.message)]
  return model.eval()


def of(**settings) -> dict[str, Any]:
  return settings


BOTH = {
  "lora": of(rank=3, alpha=7.0),
  "lora, some layers, patterns": of(
    rank=4, alpha=5.0, layers=[1], rank_pattern={"mlp": 2}, alpha_pattern={"attention": 9.0}),
  "rslora": of(rank=4, alpha=3.0, scaling="rslora", rank_pattern={"mlp": 3}),
  "dora": of(rank=3, alpha=5.0, method="dora", layers=[1]),
  "pissa": of(rank=2, alpha=3.0, init="pissa", layers=[0]),
  "olora, rslora": of(rank=2, alpha=3.0, init="olora", scaling="rslora", layers=[0]),
  "vera": of(rank=16, method="vera"),
  "adalora": of(rank=4, alpha=9.0, method="adalora", layers=[1]),
  "biases": of(rank=2, alpha=5.0, bias="lora_only", layers=[1]),
  "all biases": of(rank=2, alpha=5.0, bias="all", layers=[1]),
}  # fmt: skip
MORE: dict[str, dict[str, tuple]] = {  # targets and settings of one family
  "gpt2": {
    "tied table": (["wte", "attn.c_attn"], of(rank=3, alpha=5.0)),
    "tied table, rslora": (["wte", "wpe", "h.1.mlp"],
                           of(rank=3, alpha=5.0, scaling="rslora", rank_pattern={"wte": 2})),
    "whole modules": (["c_attn"], of(rank=3, alpha=5.0, train_modules=["ln_f", "h.0.mlp"])),
    "whole table": (["c_attn"], of(rank=3, alpha=5.0, train_modules=["wte"])),
  },
  "llama": {
    "table and head": (["embed_tokens", "lm_head", "q_proj"], of(rank=3, alpha=5.0)),
    "whole head, norms": (["q_proj"], of(rank=3, alpha=5.0, train_modules=["lm_head", "norm", "layers.1.mlp"])),
    "dora of a table": (["embed_tokens", "lm_head"], of(rank=3, alpha=5.0, method="dora")),
    "loha": (["all_linear"], of(rank=3, alpha=5.0, method="loha", rank_pattern={"mlp": 2})),
    "loha, whole norm": (["mlp"], of(rank=2, alpha=5.0, method="loha", train_modules=["norm"])),
    "ia3 of layers without biases": (["mlp"], of(method="ia3")),
    "vera, whole table": (["q_proj"], of(rank=5, method="vera", train_modules=["embed_tokens"], bias="lora_only")),
  },
  "gemma": {
    "tied table": (["embed_tokens", "mlp"], of(rank=3, alpha=5.0, rank_pattern={"embed_tokens": 2})),
    "ia3": (["all_linear"], of(method="ia3")),
    "pissa of the tied table": (["embed_tokens"], of(rank=2, alpha=3.0, init="pissa")),
    "whole table, norms": (["q_proj"], of(rank=3, alpha=5.0, train_modules=["embed_tokens", "input_layernorm"])),
  },
  "qwen3": {"norms": (["v_proj"], of(rank=3, alpha=5.0, train_modules=["q_norm", "norm"]))},
}  # fmt: skip


def cases():
  for family in FAMILIES:
    for name, settings in BOTH.items():
      if family in ("gpt2", "llama") or name in ("lora, some layers, patterns", "dora", "adalora"):
        yield pytest.param(family, ["all_linear"], settings, id=f"{family}-{name}")
    for name, (targets, settings) in MORE[family].items():
      yield pytest.param(family, targets, settings, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "targets", "settings"), list(cases()))
def test_peft_computes_what_we_do_from_our_file_and_so_do_we(tmp_path, family, targets, settings):
  found = pair(family)
  adapter = trained(found, targets, **settings)
  metadata = {"scaling": settings.get("scaling", "standard")}
  assert lora.save_adapter(tmp_path, adapter, found.naming, metadata, base="x/y") is True
  want = our_logits(found, adapter)
  assert np.abs(want - base_logits(family)).max() > 0.05, "the adapter does nothing"
  np.testing.assert_allclose(their_logits(in_peft(found, tmp_path)), want, atol=1e-4, rtol=0)
  again = lora.load_adapter(tmp_path, found.naming, found.shapes, found.full_shapes)
  np.testing.assert_allclose(our_logits(found, again), want, atol=2e-5, rtol=0)


# Adapters of PEFT's own making

THEIRS: dict[str, tuple[str, Any]] = {
  "lora": ("gpt2", of(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"])),
  "lora, patterns": ("llama", of(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj", "v_proj"],
                                   rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
                                   alpha_pattern={"v_proj": 1.5})),
  "rslora, some layers": ("qwen3", of(r=4, lora_alpha=3, use_rslora=True, target_modules=["o_proj", "gate_proj"],
                                        layers_to_transform=[1], layers_pattern="layers")),
  "a pattern of names": ("llama", of(r=2, lora_alpha=3, target_modules=r".*\.(1|12)\.(self_attn|mlp)\.(q|up)_proj")),
  "dora": ("gpt2", of(r=3, lora_alpha=5, use_dora=True, target_modules=["c_attn", "c_proj"])),
  "dora, biases": ("llama", of(r=3, lora_alpha=5, use_dora=True, target_modules="all-linear", bias="all",
                                 exclude_modules=["up_proj"])),
  "table and head": ("llama", of(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head"])),
  "whole modules": ("qwen3", of(r=3, lora_alpha=5, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
  "tied table": ("gemma", of(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
  "whole tied table": ("gemma", of(r=3, lora_alpha=5, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
                                     ensure_weight_tying=True)),
  "loha": ("llama", peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"], init_weights=False)),
  "loha, patterns": ("qwen3", peft.LoHaConfig(r=3, alpha=5, target_modules=["v_proj", "up_proj"], init_weights=False,
                                              rank_pattern={"up_proj": 2}, alpha_pattern={"v_proj": 2.5})),
  "ia3": ("qwen3", peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
  "vera": ("llama", peft.VeraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"])),
  "vera of Conv1D": ("gpt2", peft.VeraConfig(r=16, target_modules=["c_attn", "c_fc"], bias="vera_only")),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_a_peft_adapter_computes_the_same_here(tmp_path, name):
  family, settings = THEIRS[name]
  found = pair(family)
  config = peft.LoraConfig(**settings, task_type="CAUSAL_LM") if isinstance(settings, dict) else deepcopy(settings)
  theirs = peft.get_peft_model(found.theirs(), config)
  draw = torch.Generator().manual_seed(1)
  for x in theirs.parameters():
    if x.requires_grad:
      x.data += 0.2 * torch.randn(x.shape, generator=draw)  # in place: PEFT's tied parameters share their data
  theirs.save_pretrained(tmp_path)
  adapter = lora.load_adapter(tmp_path, found.naming, found.shapes, found.full_shapes)
  want = their_logits(theirs.eval())
  assert np.abs(want - base_logits(family)).max() > 0.05, "the adapter does nothing"
  np.testing.assert_allclose(our_logits(found, adapter), want, atol=1e-4, rtol=0)
  through_layers = ("lora", "dora, biases", "tied table", "vera of Conv1D", "loha", "ia3")
  if name in through_layers:
    np.testing.assert_allclose(np.asarray(forward(attached(found.ours, adapter))), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "targets", "method", "why"), [
  ("gpt2", ["attn.c_attn"], "loha", "Conv1D"), ("llama", ["q_proj"], "ia3", "rescales the bias"),
  ("gemma", ["embed_tokens"], "loha", "is an embedding"),
])  # fmt: skip
def test_what_peft_cannot_compute_is_written_with_the_reason(tmp_path, family, targets, method, why):
  found = pair(family)
  adapter = trained(found, targets, method=method)
  assert lora.save_adapter(tmp_path, adapter, found.naming, {}) is False
  config, metadata = (json.loads((tmp_path / name).read_text()) for name in ("adapter_config.json", "lora_exp.json"))
  assert why in metadata["reason"] and config["peft"] is False
  again = lora.load_adapter(tmp_path, found.naming, found.shapes, found.full_shapes)
  assert again.method == method
  np.testing.assert_array_equal(our_logits(found, again), our_logits(found, adapter))


def test_an_ia3_of_peft_that_rescales_biases_is_refused(tmp_path):
  config = peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
  peft.get_peft_model(pair("llama").theirs(), config).save_pretrained(tmp_path)
  with pytest.raises(InputError, match=r"rescales the bias of layers\.0\.self_attn\.v_proj"):
    lora.load_adapter(tmp_path, pair("llama").naming, pair("llama").shapes, pair("llama").full_shapes)


# Training


TRAINED = {
  "lora": of(lora_alpha=8), "rslora": of(lora_alpha=3, use_rslora=True), "dora": of(lora_alpha=8, use_dora=True),
}  # fmt: skip


@pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)
def test_twenty_losses_of_adamw_are_pefts_in_float64(tmp_path, settings):
  targets = ["q_proj", "v_proj", "down_proj"]
  theirs = peft.get_peft_model(pair("llama").theirs().double(),
                               peft.LoraConfig(r=4, target_modules=targets, **settings))  # fmt: skip
  theirs.save_pretrained(tmp_path / "adapter")
  pair("llama").reference.save_pretrained(tmp_path / "base")
  rng = np.random.default_rng(3)
  batches = [rng.integers(0, VOCAB, (2, LENGTH)) for _ in range(20)]
  rule = {"eps": 1e-8, "weight_decay": 0.1}
  adam = torch.optim.AdamW([x for x in theirs.parameters() if x.requires_grad], lr=5e-3, **rule)
  want = []
  for tokens in batches:
    adam.zero_grad()
    loss = theirs(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    loss.backward()
    adam.step()
    want.append(loss.item())
  with jax.enable_x64(True):
    got = our_losses(tmp_path, batches, optax.adamw(5e-3, **rule))
  assert want[0] - want[-1] > 1e-3
  # transformers computes RMS norms and softmax in float32 whatever the model's dtype (eps 1.2e-7), in an order that
  # depends on its threads: AdamW had made 1.4e-6 of that after twenty steps.
  np.testing.assert_allclose(got, want, rtol=1e-5)


def our_losses(directory: Path, batches, rule) -> list[float]:
  found = Pair(None, ours(directory / "base", dtype="float64", param_dtype="float64"), FAMILIES["llama"][2])
  model = attached(found.ours, lora.load_adapter(directory / "adapter", found.naming, found.shapes))
  graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)
  assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float64")}
  params, opt, losses = trained, rule.init(trained), []

  @jax.jit
  def step(params, opt, tokens):
    def loss(params):
      logits = nnx.merge(graph, params, rest)(tokens[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt = rule.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, value

  for tokens in batches:
    params, opt, value = step(params, opt, jnp.asarray(tokens))
    losses.append(float(value))
  return losses
