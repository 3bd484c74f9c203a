"""Every method equals its base before training, has the gradients of its formula, and never changes the base."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx
from packs import bent, job_of, quickly, rows, small
from runs import script_output

from lora_exp import lora
from lora_exp.config import ArchConfig, Config, MlpConfig
from lora_exp.config.lora_checks import lora_problems
from lora_exp.lora import methods
from lora_exp.lora.method_checks import method_problems
from lora_exp.lora.methods import rank_allocation
from lora_exp.lora.quantization import dense, is_quantised
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.train.compiled_step import CompiledStep, compile_step
from lora_exp.train.compute import loss
from lora_exp.train.compute.program import assemble, join_constants, split_constants
from lora_exp.train.compute.step import gradient, outputs, over_trials
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.job import Job
from lora_exp.train.plan import make_plan
from lora_exp.train.records import checkpoint

CONF = Path(__file__).resolve().parents[2] / "conf" / "lora"
METHODS = sorted({file.stem for file in CONF.glob("[!_]*.yaml")} - {"full", "frozen"})
VARIANTS: dict[str, dict] = {  # beside the files of conf/lora: what goes with any method
  "bias_all": dict.fromkeys(("mlp", "minigpt"), {"bias": "all"}),
  "bias_lora_only": {
    "mlp": {"bias": "lora_only", "exclude": "layers.1"}, "minigpt": {"bias": "lora_only", "exclude": "mha.key"}
  },
  "train_modules": {
    "mlp": {"train_modules": "output", "targets": "all_linear"},
    "minigpt": {"train_modules": ["layer_norm1", "output_layer"], "targets": "all_linear"},
  },
}  # fmt: skip
CASES = [*METHODS, *VARIANTS]
LEAVES = dict.fromkeys(name for kind in methods.every() for name in kind.leaves)
EVERY = ["all_linear", "embeddings", "head"]
SMALL = {
  "model__layers": 1, "model__width": 16, "model__heads": 2, "model__ff": 24, "model__dropout": 0.0,
  "model__vocab_size": 264, "optim__lr": 1e-2, "optim__weight_decay": 0.1,
}  # fmt: skip
GEMMA = {
  "kv_heads": 1, "head_dim": 8, "norm_offset": True, "post_norms": True, "qk_norm": True, "activation": "gelu_tanh",
  "embed_scale": True, "query_scale": 5.0, "logit_softcap": 9.0,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
  "mlp": {"model__family": "mlp", "model__mlp": MlpConfig(inputs=8, hidden=[16, 12], outputs=8)},
  "minigpt": {},
  "llama": {"model__family": "llama", "model__arch": ArchConfig(kv_heads=1, head_dim=8)},
  "untied": {"model__family": "llama", "model__arch": ArchConfig(kv_heads=2, head_dim=8, tied=False, qkv_bias=True)},
  "gemma": {"model__family": "llama", "model__arch": ArchConfig(**GEMMA)},
}


TARGETS = {"mlp": ["all_linear", "head"], "minigpt": EVERY, "untied": EVERY, "llama": EVERY[:2], "gemma": EVERY[:2]}
QUICK = ("dora", "pissa", "vera", "adalora", "qlora", "train_modules")  # programs that are each another
EACH = [  # case by case: a multi-layer perceptron compiles quickly, and MiniGPT has a head whose loss is chunked
  pytest.param(family, case, marks=[] if family == "mlp" and case in QUICK else pytest.mark.slow)
  for family in ("mlp", "minigpt")
  for case in CASES
]


def config(case: str, family: str = "minigpt", **more) -> Config:
  """A file of conf/lora (or a variant) on a small model, with `more` on top; alpha is nowhere the rank."""
  files = ("_base", "lora" if case in VARIANTS else case)
  found = {key: x for file in files for key, x in yaml.safe_load((CONF / f"{file}.yaml").read_text()).items()}
  del found["defaults"]
  method = methods.variant(found["method"], found["init"])
  found |= {"rank": 4, "targets": TARGETS[family], "dropout": 0.1 if method.drops_input else 0.0}
  found |= VARIANTS.get(case, {}).get(family, {}) | ({"alpha": 6.0} if method.uses_alpha else {})
  found |= {} if found["budget"] is None else {"budget": 2.2}
  cfg = small(**SMALL | FAMILIES[family] | {f"lora__{k}": v for k, v in found.items()} | more)
  assert not [*lora_problems(cfg), *method_problems(cfg)]
  return cfg


@cache
def job(family: str, case: str):
  """The job of a case; its state is not trained in place, so that tests may share it."""
  return job_of(config(case, family))


def only(tree):
  """The only trial of a tree of trials."""
  return jax.tree.map(lambda x: x[0], tree)


def by_path(tree) -> dict[str, np.ndarray]:
  return {path: np.asarray(x) for path, x in flatten(tree).items()}


def batch_of(family: str, seed: int = 0) -> dict[str, np.ndarray]:
  return numbers(seed) if family == "mlp" else rows(seed)


def numbers(seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of examples for a multi-layer perceptron."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, 8, 12)
  return {"x": rng.normal(size=(12, 8)).astype(np.float32) + y[:, None], "y": y, "weights": np.ones(12, np.float32)}


def job_batch(job) -> dict[str, jax.Array]:
  """A batch for the model family of `job`."""
  family = "minigpt" if any("emb" in path for path in flatten(job.frozen)) else "mlp"
  return job.program.layout.put_batch(batch_of(family))


class StepCache(dict[int, tuple[Job, CompiledStep]]):
  """Compiled steps by the id of their job, which is kept so that its id stays its own. conftest.py clears them."""

  def cache_clear(self) -> None:
    self.clear()


_steps = StepCache()


def compiled_step(job: Job) -> CompiledStep:
  """The compiled step of `job`; compiled once."""
  if id(job) not in _steps:
    with quickly():
      _steps[id(job)] = job, compile_step(job, job_batch(job))
  return _steps[id(job)][1]


def steps(job, state, count: int):
  """`count` optimizer steps on one batch from `state`, which stays; the state after them, losses (steps, trials)."""
  batch = job_batch(job)
  state, losses = jax.tree.map(jnp.array, state), []
  step = compiled_step(job)
  for _ in range(count):
    state, metrics = step(state, batch)
    losses.append(np.asarray(metrics["loss"]))
  return state, np.array(losses)


# The formulas, written out with jnp alone


def base_of(job) -> dict[str, jax.Array]:
  """The base that a job runs on, by dotted path; quantised kernels are made whole."""
  leaves = jax.tree_util.tree_leaves_with_path(job.frozen, is_leaf=is_quantised)
  return {dotted(path).replace(lora.FROZEN_PREFIX, ""): dense(x) for path, x in leaves}


def plain(plan, values: dict):
  """The model of `plan` without adapters, with these values for its parameters."""
  model = plan.model()
  state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  nnx.update(model, jax.tree_util.tree_map_with_path(lambda path, _: values[dotted(path)], state))
  return model


def by_hand(w_IO, own: dict, scale: float):
  """The kernel of an adapted module by the papers' formulas."""
  w = w_IO.astype(jnp.float32)
  if "hada_w1_a" in own:
    return w + scale * (own["hada_w1_b"] @ own["hada_w1_a"]) * (own["hada_w2_b"] @ own["hada_w2_a"])
  if "ia3_out" in own or "ia3_in" in own:
    return w @ jnp.diag(own["ia3_out"]) if "ia3_out" in own else jnp.diag(own["ia3_in"]) @ w
  if not {"vera_a", "lora_a"} & set(own):
    pytest.skip(f"by_hand has no formula for the leaves {', '.join(sorted(own))}: add the paper's")
  if "vera_a" in own:
    a, b = own["vera_a"][: w.shape[0]], own["vera_b"][:, : w.shape[1]]
    return w + a @ jnp.diag(own["lambda_d"]) @ b @ jnp.diag(own["lambda_b"])
  a = own["lora_a"] @ jnp.diag(own["lora_e"]) if "lora_e" in own else own["lora_a"]
  whole = w + scale * (a @ own["lora_b"])
  if "start_a" in own:
    whole = whole - scale * (own["start_a"] @ own["start_b"])
  if "magnitude" in own:
    norm = jnp.sqrt((whole * whole).sum(0))
    whole = own["magnitude"] * whole / jax.lax.stop_gradient(norm)
  return whole


def effective(base: dict, flat: dict, table) -> dict:
  """The parameters of the plain model that answers as one with the trained leaves and constants `flat` does."""
  shared = tuple(name for kind in methods.every() for name in kind.shared_leaves)
  pair = {name: x for path, x in flat.items() if (name := path.rpartition(".")[2]) in shared}
  values = {**base, **{path: x for path, x in flat.items() if path in base}}  # trained in full
  for row in table:
    own = pair | {name: flat[f"{row.path}.{name}"] for name in LEAVES if f"{row.path}.{name}" in flat}
    path = next(p for p in (f"{row.path}.kernel", f"{row.path}.embedding") if p in base)
    values[path] = by_hand(base[path], own, row.scale)
  return values


def mean_loss(model, batch: dict):
  """The mean loss of a token (or example), from the logits of all."""
  labels = batch["y"] if "y" in batch else batch["targets"]
  nats = optax.softmax_cross_entropy_with_integer_labels(outputs(model, batch), labels)
  return (nats * batch["weights"]).sum() / batch["weights"].sum()


# The start


def logits_of(plan, family: str, values: dict) -> np.ndarray:
  """The logits of the plain model, from a separately compiled program."""
  return np.asarray(jax.jit(lambda values: outputs(plain(plan, values), batch_of(family)))(values))


def start_logits(of, family: str) -> np.ndarray:
  """The logits of the adapted model before the first step."""
  say = lambda params, trial, frozen: outputs(assemble(of.program, params, trial, frozen, None), batch_of(family))
  return np.asarray(jax.jit(say)(*only((of.state.params, of.trials)), of.frozen))


STARTS = [("mlp", case, None) for case in CASES]
STARTS += [("mlp", "lora", init) for init in ("gaussian", "normal", "orthogonal", "he_uniform", "xavier_uniform")]
STARTS += [(family, case, None) for family in FAMILIES if family != "mlp" for case in METHODS if case != "bitfit"]
FAST = {("minigpt", "vera"), ("llama", "pissa"), ("gemma", "dora")}


@pytest.mark.parametrize(
  ("family", "case", "init"),
  [pytest.param(*s, marks=[] if pytest.param(*s[:2]) in EACH or s[:2] in FAST else pytest.mark.slow) for s in STARTS],
)
def test_the_untrained_model_is_bit_equal_to_its_base(family, case, init):
  """Head and embeddings are adapted too, tied or not. Without LLVM's optimisations, to be quick: see the next test."""
  cfg = config(case, family, **({"lora__init": init} if init else {}))
  of = job_of(cfg) if init else job(family, case)
  with quickly():
    found = start_logits(of, family)
    expected = logits_of(make_plan(cfg), family, base_of(of))
  np.testing.assert_array_equal(found, expected)
  assert len(np.unique(expected)) > 50  # not one number everywhere


@pytest.mark.parametrize(
  ("family", "case"),
  [pytest.param(*s[:2], marks=[] if s[:2] in (("gemma", "dora"), ("minigpt", "lora")) else pytest.mark.slow)
   for s in STARTS if s[0] != "mlp"],
)
def test_optimised_it_answers_as_its_base_to_the_last_bit_too(family, case):
  """What an adapter gives is not fused into the norm that follows, where LLVM would add a sum in another order."""
  cfg = config(case, family)
  of = job_of(cfg)
  np.testing.assert_array_equal(start_logits(of, family), logits_of(make_plan(cfg), family, base_of(of)))


# Gradients


@cache
def gradients(family: str, case: str):
  """{point: (params, gradient)} before the first step and where all leaves have moved a little; nothing is dropped."""
  of = job(family, case)
  trained, constants = split_constants(of.program, of.state.params)
  trial, batch = only(of.trials._replace(dropout=0 * of.trials.dropout)), batch_of(family)
  found = jax.jit(lambda params, frozen: gradient(of.program, params, trial, frozen, batch, of.keys[0])[0])
  points = {"start": trained, "moved": bent(trained)}
  with quickly():
    whole = {name: only(join_constants(point, constants)) for name, point in points.items()}
    return {name: (params, by_path(found(params, of.frozen))) for name, params in whole.items()}


WAITS = {
  "lora": ("lora_a",), "dora": ("lora_a",), "adalora": ("lora_a", "lora_b"), "vera": ("lambda_d",), "ia3": (),
  "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a"), "pissa": (), "olora": (), "bitfit": (),
}  # fmt: skip


@pytest.mark.parametrize(("family", "case"), EACH)
def test_the_first_gradient_is_zero_only_beside_a_zero_factor(family, case):
  """B has a gradient at once and A from the second step on; of VeRA b and then d, of AdaLoRA e and then A and B."""
  cfg = config(case, family).lora
  name = methods.of(cfg).name
  waits = WAITS.get(name, ())
  at_start, later = gradients(family, case)["start"][1], gradients(family, case)["moved"][1]
  of = job(family, case)
  assert at_start.keys() == later.keys() == by_path(split_constants(of.program, of.state.params)[0]).keys()
  assert any(g.any() for g in at_start.values())
  for path, g in at_start.items() if name in WAITS else ():
    assert g.any() == (not path.endswith(waits) if waits else True), path
  for path, g in later.items():
    assert np.isfinite(g).all() and g.any(), path


@pytest.mark.parametrize(("family", "case"), EACH)
def test_every_gradient_leaf_is_that_of_the_formula_written_out(family, case):
  of, plan = job(family, case), make_plan(config(case, family))
  params, found = gradients(family, case)["moved"]
  trained, constants = (flatten(tree) for tree in split_constants(of.program, params))
  loss_of = lambda trained, base: mean_loss(
    plain(plan, effective(base, trained | constants, plan.table)), batch_of(family)
  )
  with quickly():
    wanted = by_path(jax.jit(jax.grad(loss_of))(trained, base_of(of)))
  assert found.keys() == wanted.keys()
  largest = max(np.abs(g).max() for g in wanted.values())
  for path, g in wanted.items():
    bound = largest if path.endswith("key.bias") else np.abs(g).max()  # softmax does not see the key's bias
    assert np.abs(found[path] - g).max() <= 1e-5 * bound, path


# Five steps


def named(tree) -> dict[str, bytes]:
  """The bytes of every leaf, those of quantised kernels apart."""
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(("family", "case"), EACH)
def test_five_steps_lower_the_loss_and_keep_frozen_leaves(family, case):
  of = job(family, case)
  base, before = named(of.frozen), by_path(of.state.params)
  state, losses = steps(of, of.state, 5)
  assert np.isfinite(losses).all() and losses[-1] < losses[0]
  assert named(of.frozen) == base
  constants = {".".join(map(str, path)) for path in of.program.constants}
  for path, x in by_path(state.params).items():
    assert (x.tobytes() == before[path].tobytes()) == (path in constants), path
  batch, trials = batch_of(family), of.trials
  with quickly():
    rates = [trials._replace(dropout=trials.dropout + rate) for rate in (0, 0, 0.8)]
    seen = [of.evaluate(state.params, changed, of.frozen, batch) for changed in rates]
  assert len({float(sums["loss"][0]) for sums in seen}) == 1
  assert seen[0]["loss"][0] / batch["weights"].sum() < losses[0]


# Packs

TRIALS = (
  {"rank": 2, "targets": ["layers.0", "output"], "alpha": 3.0, "lr_ratio": 4.0, "budget": 1.2},
  {"rank": 4, "targets": "layers.*", "alpha": 12.0, "lr_ratio": 1.0, "budget": 2.5},
  {"rank": 8, "targets": ["layers.1", "output"], "alpha": 5.0, "lr_ratio": 2.0, "budget": 4.7},
)
RATES = (
  {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.5},
  {"lr": 3e-2, "weight_decay": 0.01, "clip": 1.0},
  {"lr": 2e-2, "weight_decay": 0.3, "clip": 0.1},
)
PACKED = [method.name for method in methods.every() if method.adapts_kernels and method.paddable]
PACKED += ["qlora", "bias_all", "train_modules"]
PACKS = [
  pytest.param(c, how, marks=[] if how == "map" and c in ("dora", "vera", "loha", "ia3") else pytest.mark.slow)
  for how in ("map", "vmap")
  for c in PACKED
]


def trial_config(case: str, n: int) -> Config:
  """Trial n of a pack: its own rank, alpha, targets, rates, dropout and seed."""
  plain = config(case, "mlp").lora
  trial = {k: v for k, v in TRIALS[n].items() if getattr(plain, k) is not None}
  if not methods.of(plain).has_lr_ratio:
    trial.pop("lr_ratio")
  if not methods.of(plain).uses_alpha:
    trial.pop("alpha", None)
  if case == "qlora":  # a pack has one base
    trial["targets"] = ["layers.*", "output"]
  if case == "train_modules":
    trial["targets"] = ("layers.0", "layers.*", "layers.1")[n]
  more = {f"lora__{k}": v for k, v in trial.items()} | {f"optim__{k}": v for k, v in RATES[n].items()}
  more |= {"lora__dropout": (0.1, 0.3, 0.2)[n]} if plain.dropout else {}
  return config(case, "mlp", train__seed=n, **more)


def trial_gradients(of, params) -> dict:
  """The gradient of every trial, dropout on, as one program."""

  def all_trials(params, trials, frozen, batch, key):
    one = lambda trial, params: gradient(of.program, params, trial, frozen, batch, key)[0]
    return over_trials(one, of.program.mapping, trials, params)

  with quickly():
    return jax.jit(all_trials)(params, of.trials, of.frozen, numbers(), jax.random.key(3))


def taken(tree, n: int, case: str, trial: int) -> dict[str, np.ndarray]:
  """Trial n's own part of a tree of trials, in which it is the one numbered `trial`."""
  plan = make_plan(trial_config(case, n))
  flat = flatten(tree)
  adapter = take_trial(tree, plan.table, [p for p in plan.full if p in flat], methods.of(plan.cfg.lora).name, trial)
  leaves = {f"{path}.{name}": np.asarray(x) for path, own in adapter.leaves.items() for name, x in own.items()}
  return leaves | {path: np.asarray(x) for path, x in adapter.full.items()}


def count_bits(leaves) -> int:
  """The number of values with any bit set; -0 has one."""
  return sum(int((np.asarray(x).view(np.uint32) != 0).sum()) for x in leaves)


@cache
def pack(case: str, mapping: str):
  """Three trials after 20 steps of AdamW with clipping, decay and dropout: the job, its state before, and after."""
  of = job_of(*(trial_config(case, n) for n in range(3)), mapping=mapping, steps=400)
  before = jax.tree.map(jnp.array, of.state)
  return of, before, steps(of, before, 20)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mapping"), PACKS)
def test_a_packed_trial_has_its_solo_init_and_gradient(case, mapping):
  of, before, _ = pack(case, mapping)
  for n in range(3):
    alone = job_of(trial_config(case, n), steps=400)
    start = taken(alone.state.params, n, case, 0)
    for path, x in taken(before.params, n, case, n).items():
      np.testing.assert_array_equal(x, start[path], err_msg=path)
    trained, constants = split_constants(alone.program, alone.state.params)
    # Where the trial stands after its training in the pack, put back on the trial alone.
    now = taken(pack(case, mapping)[2].params, n, case, n)
    put = lambda path, x, now=now: jnp.asarray(now[dotted(path)])[None]
    params = join_constants(jax.tree_util.tree_map_with_path(put, trained), constants)
    wanted = taken(trial_gradients(alone, params), n, case, 0)
    packed = trial_gradients(of, pack(case, mapping)[2].params)
    found = taken(packed, n, case, n)
    assert found.keys() == wanted.keys()
    for path, g in wanted.items():
      assert g.any(), f"trial {n}: {path} has no gradient to compare"
      assert np.abs(found[path] - g).max() <= 1e-5 * np.abs(g).max(), f"trial {n}: {path}"
    assert count_bits(x[n] for x in jax.tree.leaves(packed)) == count_bits(found.values()), f"trial {n}: the padding"


@pytest.mark.parametrize(("case", "mapping"), PACKS)
def test_padding_and_untargeted_modules_stay_zero(case, mapping):
  of, before, after = pack(case, mapping)
  trained = split_constants(of.program, after.params)[0]
  for n in range(3):
    own = taken(trained, n, case, n)
    assert count_bits(x[n] for x in jax.tree.leaves(trained)) == count_bits(own.values()), f"trial {n}"
    first = taken(split_constants(of.program, before.params)[0], n, case, n)
    assert all((x != first[path]).any() for path, x in own.items()), f"trial {n}: all of it trains"


@pytest.mark.parametrize(("case", "mapping"), PACKS)
def test_a_trial_that_breaks_changes_no_byte_of_the_others(case, mapping):
  of, before, _ = pack(case, mapping)
  broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), before.params)
  well, ill = (steps(of, before._replace(params=params), 3)[0] for params in (before.params, broken))
  assert any(np.isnan(x[1]).any() for x in jax.tree.leaves(ill.params))
  for n in (0, 2):
    assert named(only_trial(ill, n)) == named(only_trial(well, n))


def only_trial(state, n: int):
  return jax.tree.map(lambda x: x[n], (state.params, state.opt))


# The chunked loss under adapted heads


ADAPTERS = [method.name for method in methods.every() if method.adapts_kernels]
HEADS = [(case, False) for case in (*ADAPTERS, "qlora", "bias_all", "train_modules")]
HEADS += [(case, True) for case in (*ADAPTERS, "train_modules")]
SLOW_HEADS = [("lora", False), ("lora", True), ("olora", False), ("olora", True), ("adalora", False), ("adalora", True)]


@pytest.mark.parametrize(
  ("case", "tied"), [pytest.param(*h, marks=pytest.mark.slow if h in SLOW_HEADS else []) for h in HEADS]
)
def test_chunked_loss_with_an_adapted_head_equals_full_loss(case, tied, monkeypatch):
  monkeypatch.setattr(loss, "CHUNK_LOGITS", 3 * 2 * 40)
  chosen, rngs = config(case).lora, nnx.Rngs(0)
  head = nnx.Embed(40, 8, rngs=rngs) if tied else nnx.Linear(8, 40, rngs=rngs)
  model = nnx.Dict(head=head, other=nnx.Linear(8, 8, rngs=rngs))
  full = {"train_modules": "head"} if case == "train_modules" else {"bias": chosen.bias}
  targets = "other" if case == "train_modules" else "head"
  table = lora.inject(model, targets, method=chosen.method, init=chosen.init, rank=3, alpha=5.0, **full)
  if case == "qlora":
    model.head.kernel.set_value(lora.quantise(model.head.kernel[...], "int8"))
  graph, part, rest = nnx.split(model, nnx.LoRAParam, ...)
  wave = lambda x: x + 0.1 * jnp.sin(1 + 3.0 * jnp.arange(x.size)).reshape(x.shape)
  trained = nnx.to_pure_dict(jax.tree.map(wave, part))
  constants = flatten(nnx.to_pure_dict(nnx.state(model, lora.Constant)))
  x_BTD = jax.random.normal(jax.random.key(1), (2, 7, 8))
  targets_BT = jax.random.randint(jax.random.key(2), (2, 7), 0, 40)
  weights_BT = jnp.ones((2, 7)).at[0, 2].set(0)
  base = {"head.bias": None if tied else head.bias[...]}
  path = "head.embedding" if tied else "head.kernel"
  frozen = getattr(model.head, lora.FROZEN_PREFIX + path.partition(".")[2], None)
  base[path] = dense((frozen or lora.layers.kernels.of(model.head)).get_value())

  def chunked(trained, x_BTD):
    nnx.replace_by_pure_dict(part, trained)
    whole = nnx.merge(graph, part, rest)
    return loss.head_loss(whole.head, x_BTD, targets_BT, weights_BT, softcap=4.0).loss

  def whole(trained, x_BTD):
    rows = [row for row in table if row.path == "head"]
    values = effective(base, flatten(trained) | constants, rows)
    kernel = values[path].T if tied else values[path]
    logits = x_BTD @ kernel + (0 if tied else values["head.bias"])
    nats = optax.softmax_cross_entropy_with_integer_labels(4.0 * jnp.tanh(logits / 4.0), targets_BT)
    return (nats * weights_BT).sum()

  with quickly():
    (found, grads), (wanted, expected) = (
      jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(trained, x_BTD) for f in (chunked, whole)
    )
  assert float(found) == pytest.approx(float(wanted), rel=1e-5)
  pairs = [("x", grads[1], expected[1])]
  pairs += [(p, g, flatten(expected[0])[p]) for p, g in flatten(grads[0]).items() if p.startswith("head")]
  for name, g, other in pairs:
    assert np.asarray(other).any() and np.abs(g - other).max() <= 1e-5 * np.abs(other).max(), name


# AdaLoRA


@cache
def allocation():
  """AdaLoRA over 20 steps that keeps 2.2 of 4 ranks a module, twice: straight, and through a checkpoint at 12."""
  of = job("mlp", "adalora")
  return of, steps(of, of.state, 20)[0]


def test_adalora_ends_with_the_ranks_of_its_budget_and_no_more():
  of, after = allocation()
  left = rank_allocation.kept_ranks(only(after.params))
  assert len(left) == 3 and sum(left.values()) == round(2.2 * 3) < 3 * 4


def test_adalora_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
  of, after = allocation()
  half, _ = steps(of, of.state, 12)
  checkpoint.save(tmp_path, 12, half, {})
  _, restored, _ = checkpoint.restore(tmp_path, of.state)
  resumed, _ = steps(of, restored, 8)
  assert named(resumed) == named(after)
  assert named(half) != named(after)


@pytest.mark.parametrize(
  "case", [pytest.param(case, marks=[] if case in ("loha", "ia3") else pytest.mark.slow) for case in METHODS]
)
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, case):
  of = job("mlp", case)
  half, _ = steps(of, of.state, 2)
  checkpoint.save(tmp_path, 2, half, {})
  _, restored, _ = checkpoint.restore(tmp_path, of.state)
  assert named(steps(of, restored, 2)[0]) == named(steps(of, half, 2)[0])


# Quantised bases


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("case", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_quantised_gradients_equal_those_on_the_dequantised_base(case, kind):
  of = job_of(config(case, "mlp", lora__quant=kind))
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  kernels = sum(x.nbytes for path, x in base_of(of).items() if path.endswith("kernel"))
  saved = size(job("mlp", case).frozen) - size(of.frozen)
  assert saved > kernels / 2
  base = jax.tree.map(lambda x: dense(x), of.frozen, is_leaf=is_quantised)
  with quickly():
    grads = jax.jit(lambda p, frozen: gradient(of.program, p, only(of.trials), frozen, numbers(), of.keys[0])[0])
    params = only(bent(of.state.params))
    found, wanted = by_path(grads(params, of.frozen)), by_path(grads(params, base))
  for path, g in wanted.items():
    assert g.any() and np.abs(found[path] - g).max() <= 1e-5 * np.abs(g).max(), path


@pytest.mark.parametrize("case", ["dora", pytest.param("pissa", marks=pytest.mark.slow)])
def test_kernel_statistics_use_the_quantised_kernel(case):
  """DoRA's norm is that of the weights that answer, and PiSSA's directions are theirs."""
  of = job_of(config(case, "mlp", lora__quant="nf4"))
  params, base = flatten(only(of.state.params)), base_of(of)
  for path in of.program.modules:
    w = base[f"{path}.kernel"]
    if case == "dora":
      np.testing.assert_allclose(params[f"{path}.magnitude"], jnp.sqrt((w * w).sum(0)), rtol=1e-6)
    else:
      u = jnp.linalg.svd(w, full_matrices=False)[0][:, :4]
      a = params[f"{path}.lora_a"]
      np.testing.assert_allclose(u @ (u.T @ a), a, atol=1e-5)


def test_trials_that_quantise_other_kernels_are_no_pack():
  with pytest.raises(ValueError, match="must agree"):
    job_of(*(config("qlora", "mlp", lora__targets=t) for t in ("all_linear", "head")))


# Meshes, and bfloat16


MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
LOSSES = """
import json, sys
from test_methods import losses_on
print(json.dumps([losses_on(*args) for args in json.loads(sys.argv[1])]))
"""
ON_A_MESH = [(family, case) for family in ("mlp", "minigpt") for case in CASES]


def losses_on(family: str, case: str, mesh: dict[str, int] = MESH) -> list[float]:
  """The losses of five steps on a mesh."""
  of = job_of(config(case, family, train__batch_size=4, optim__lr=1e-3, **mesh))
  return steps(of, of.state, 5)[1][:, 0].tolist()


@pytest.mark.slow
def test_a_mesh_of_three_axes_has_the_losses_of_one_device():
  many = json.loads(script_output(LOSSES, json.dumps(ON_A_MESH)))
  for (family, case), found in zip(ON_A_MESH, many, strict=True):
    assert found == pytest.approx(losses_on(family, case, mesh={}), rel=1e-5), (family, case)


LOW = [pytest.param(f, c, marks=[] if (f, c) == ("mlp", "dora") else pytest.mark.slow) for f in TARGETS for c in CASES
       if f in ("mlp", "minigpt")]  # fmt: skip


@pytest.mark.parametrize(("family", "case"), LOW)
def test_on_a_bfloat16_base_every_method_stays_finite_and_learns(family, case):
  of = job_of(config(case, family, model__dtype="bfloat16", model__param_dtype="bfloat16"))
  state, losses = steps(of, of.state, 5)
  assert np.isfinite(losses).all() and losses[-1] < losses[0]
  for path, x in flatten(state.params).items():
    assert x.dtype == jnp.float32 and np.isfinite(x).all(), path
