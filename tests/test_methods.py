"""What every method promises: it starts as the base, its gradients are those of its formula, and the base stays."""

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

from lora_exp import lora
from lora_exp.build import check_built, random_base
from lora_exp.config import ArchConfig, Config
from lora_exp.config.lora_checks import lora_problems
from lora_exp.lora.quant import dense, is_quantised
from lora_exp.mesh import dotted, flatten
from lora_exp.step import assemble, gradient, outputs, separate

CONF = Path(__file__).resolve().parents[1] / "conf" / "lora"
METHODS = sorted({file.stem for file in CONF.glob("*.yaml")} - {"full", "frozen"})
VARIANTS = {  # beside the files of conf/lora: what goes with any method
  "bias_all": {"bias": "all"},
  "bias_lora_only": {"bias": "lora_only", "exclude": "mha.key"},
  "train_modules": {"train_modules": ["layer_norm1", "output_layer"], "targets": "all_linear"},
}
CASES = [*METHODS, *VARIANTS]
SAME = {"rslora": "lora", "loraplus": "lora", "olora": "pissa", "bias_lora_only": "bias_all"}  # nearly: not run twice
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
  "minigpt": {},
  "llama": {"model__family": "llama", "model__arch": ArchConfig(kv_heads=1, head_dim=8)},
  "untied": {"model__family": "llama", "model__arch": ArchConfig(kv_heads=2, head_dim=8, tied=False, qkv_bias=True)},
  "gemma": {"model__family": "llama", "model__arch": ArchConfig(**GEMMA)},
}


def but(cases, *slow):
  """The cases as parameters, those in `slow` (and those in the same program as another) behind the marker."""
  return [pytest.param(c, marks=pytest.mark.slow) if c in (*slow, *SAME) else c for c in cases]


def config(case: str, **more) -> Config:
  """A file of conf/lora (or a variant) on a small model, with `more` on top; alpha is nowhere the rank."""
  found = yaml.safe_load((CONF / f"{'lora' if case in VARIANTS else case}.yaml").read_text())
  found |= {"rank": 4, "targets": EVERY, "dropout": 0.1} | VARIANTS.get(case, {})
  found |= {} if found["method"] == "vera" else {"alpha": 6.0}
  found |= {} if found["budget"] is None else {"budget": 2.2}
  cfg = small(**SMALL | {f"lora__{k}": v for k, v in found.items()} | more)
  assert not list(lora_problems(cfg))
  return cfg


@cache
def job(case: str):
  """The job of a case; its state is not trained in place, so that tests may share it."""
  return job_of(config(case))


def only(tree):
  """The one arm of a tree of arms."""
  return jax.tree.map(lambda x: x[0], tree)


def by_path(tree) -> dict[str, np.ndarray]:
  return {path: np.asarray(x) for path, x in flatten(tree).items()}


def numbers(seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of examples for a multi-layer perceptron."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, 5, 12)
  return {"x": rng.normal(size=(12, 6)).astype(np.float32) + y[:, None], "y": y, "weights": np.ones(12, np.float32)}


def steps(job, state, count: int, batches=lambda i: rows()):
  """`count` optimizer steps from `state`, which stays; the state after them, and the losses (steps, arms)."""
  put = job.program.layout.put_batch
  state, losses = jax.tree.map(jnp.array, state), []
  if not hasattr(job, "compiled"):
    with quickly():
      job.compile(put(batches(0)))
  for i in range(count):
    state, metrics = job.step(state, put(batches(i)))
    losses.append(np.asarray(metrics["loss"]))
  return state, np.array(losses)


# The formulas, written out with jnp alone


def base_of(job) -> dict[str, jax.Array]:
  """The base that a job runs on, by dotted path; quantised kernels are made whole."""
  leaves = jax.tree_util.tree_leaves_with_path(job.frozen, is_leaf=is_quantised)
  return {dotted(path).replace(lora.KEPT, ""): dense(x) for path, x in leaves}


def plain(plan, values: dict):
  """The model of `plan` without adapters, with these values for its parameters."""
  model = plan.model()
  state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  nnx.update(model, jax.tree_util.tree_map_with_path(lambda path, _: values[dotted(path)], state))
  return model


def by_hand(w_IO, own: dict, scale: float):
  """The kernel of an adapted module by the papers' formulas."""
  w = w_IO.astype(jnp.float32)
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
  pair = {path.rpartition(".")[2]: x for path, x in flat.items() if path.endswith(("vera_a", "vera_b"))}
  values = {**base, **{path: x for path, x in flat.items() if path in base}}  # trained in full
  for row in table:
    own = pair | {name: flat[f"{row.path}.{name}"] for name in lora.LEAVES if f"{row.path}.{name}" in flat}
    path = next(p for p in (f"{row.path}.kernel", f"{row.path}.embedding") if p in base)
    values[path] = by_hand(base[path], own, row.scale)
  return values


def mean_loss(model, batch: dict):
  """The mean loss of a token, from the logits of all."""
  nats = optax.softmax_cross_entropy_with_integer_labels(outputs(model, batch), batch["targets"])
  return (nats * batch["weights"]).sum() / batch["weights"].sum()


# The start


def logits_of(plan, values: dict) -> np.ndarray:
  """What the plain model says, by a compiled program of its own."""
  with quickly():
    return np.asarray(jax.jit(lambda values: outputs(plain(plan, values), rows()))(values))


@cache
def base_logits(family: str) -> np.ndarray:
  plan = check_built(config("lora", lora__targets="all_linear", **FAMILIES[family]))
  with quickly():
    base = random_base(plan)
  return logits_of(plan, flatten(base))


def start_logits(of) -> np.ndarray:
  """What the adapted model says before the first step."""
  say = lambda params, arm, frozen: outputs(assemble(of.program, params, arm, frozen, None), rows())
  return np.asarray(jax.jit(say)(*only((of.state.params, of.arms)), of.frozen))


STARTS = [("minigpt", case, None) for case in CASES]
STARTS += [("minigpt", "lora", init) for init in ("gaussian", "normal", "orthogonal", "he_uniform", "xavier_uniform")]
STARTS += [(family, case, None) for family in FAMILIES if family != "minigpt" for case in METHODS if case != "bitfit"]
FAST = {("llama", "vera"), ("untied", "pissa"), ("gemma", "dora"), ("gemma", "olora"), ("gemma", "lora")}


@pytest.mark.parametrize(
  ("family", "case", "init"),
  [pytest.param(*s, marks=[] if s[0] == "minigpt" or s[:2] in FAST else pytest.mark.slow) for s in STARTS],
)
def test_the_model_answers_as_its_base_to_the_last_bit_before_the_first_step(family, case, init):
  """Head and embeddings are adapted too, tied or not. Compiled without LLVM's optimisations: see the next test."""
  targets = {} if family == "minigpt" else {"lora__targets": EVERY if family == "untied" else EVERY[:2]}
  cfg = config(case, **targets, **({"lora__init": init} if init else {}), **FAMILIES[family])
  of = job_of(cfg)
  with quickly():
    found = start_logits(of)
  expected = logits_of(check_built(cfg), base_of(of)) if cfg.lora.quant else base_logits(family)
  np.testing.assert_array_equal(found, expected)
  assert len(np.unique(expected)) > 1000  # not one number everywhere


@pytest.mark.parametrize("family", [pytest.param("minigpt", marks=pytest.mark.slow), "gemma"])
def test_optimised_it_answers_as_its_base_but_for_the_order_of_a_sum(family):
  """XLA fuses the addition of an update into the norm that follows, and LLVM then adds a sum in another order."""
  plan = check_built(config("lora", lora__targets=EVERY[:2], **FAMILIES[family]))
  with quickly():
    values = flatten(random_base(plan))
  expected = jax.jit(lambda values: outputs(plain(plan, values), rows()))(values)
  found = start_logits(job_of(plan.cfg))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# Gradients


@cache
def gradients(case: str):
  """(params, gradient) of a case before the first step and where all leaves have moved a little, nothing dropped."""
  of = job(case)
  trained, constants = separate(of.program, of.state.params)
  arms = of.arms._replace(dropout=0 * of.arms.dropout)

  @jax.jit
  def found(trained, arms, frozen, batch, key):
    params = jax.tree.map(lambda x: x, join(trained, constants))
    return gradient(of.program, only(params), only(arms), frozen, batch, key)[0]

  points = {"start": trained, "moved": bent(trained)}
  with quickly():
    return {
      name: (join(p, constants), by_path(found(p, arms, of.frozen, rows(), of.key))) for name, p in points.items()
    }


def join(trained, constants):
  from lora_exp.step import together

  return together(trained, constants)


WAITS = {"lora": ("lora_a",), "dora": ("lora_a",), "adalora": ("lora_a", "lora_b"), "vera": ("lambda_d",)}


@pytest.mark.parametrize("case", but(CASES))
def test_at_the_first_step_only_what_stands_beside_a_zero_has_no_gradient(case):
  """B has a gradient at once and A from the second step on; of VeRA b and d, of AdaLoRA e, and A and B."""
  cfg = config(case).lora
  waits = () if cfg.init in lora.FROM_KERNEL else WAITS.get(cfg.method, ())
  assert gradients(case)["start"][1].keys() == by_path(separate(job(case).program, job(case).state.params)[0]).keys()
  for path, g in gradients(case)["start"][1].items():
    if not path.endswith("key.bias"):  # softmax does not see it
      assert g.any() == (not path.endswith(waits) if waits else True), path
  for path, g in gradients(case)["moved"][1].items():
    assert np.isfinite(g).all() and g.any(), path


@pytest.mark.parametrize("case", but(CASES))
def test_every_gradient_leaf_is_that_of_the_formula_written_out(case):
  of, plan = job(case), check_built(config(case))
  params, found = gradients(case)["moved"]
  trained, constants = (flatten(only(tree)) for tree in separate(of.program, params))
  reference = lambda trained, base: mean_loss(plain(plan, effective(base, trained | constants, plan.table)), rows())
  with quickly():
    wanted = by_path(jax.jit(jax.grad(reference))(trained, base_of(of)))
  assert found.keys() == wanted.keys()
  largest = max(np.abs(g).max() for g in wanted.values())
  for path, g in wanted.items():
    bound = largest if path.endswith("key.bias") else np.abs(g).max()
    assert np.abs(found[path] - g).max() <= 1e-5 * bound, path


# Five steps


@pytest.mark.parametrize("case", but(CASES))
def test_five_steps_lower_the_loss_and_leave_the_base_and_the_constants(case):
  of = job(case)
  base = {path: x.tobytes() for path, x in named(of.frozen).items()}
  before = by_path(of.state.params)
  state, losses = steps(of, of.state, 5)
  assert np.isfinite(losses).all() and losses[-1] < losses[0]
  assert {path: x.tobytes() for path, x in named(of.frozen).items()} == base
  after = by_path(state.params)
  constants = {".".join(map(str, path)) for path in of.program.constants}
  for path, x in before.items():
    still = after[path].tobytes() == x.tobytes()
    assert still == (path in constants or path.endswith("key.bias") and case == "none"), path
  with quickly():
    once = job_evaluate(of, state.params, 0.1)
    assert once == job_evaluate(of, state.params, 0.1) == job_evaluate(of, state.params, 0.9)
  assert once < losses[0]


def named(tree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def job_evaluate(of, params, rate: float) -> float:
  sums = of.evaluate(params, of.arms._replace(dropout=0 * of.arms.dropout + rate), of.frozen, rows())
  return float(sums.loss[0]) / rows()["weights"].sum()
