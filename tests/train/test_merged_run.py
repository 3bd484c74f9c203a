"""Merging against the run, for every method and family; its rounding and its check."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_same, load_arrays
from packs import bent, job_of, quickly, rows, small

from lora_exp import lora
from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.lora import methods
from lora_exp.models.registry import get_family
from lora_exp.models.weights.hf_writer import save_hf
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.loaded_run import LoadedRun
from lora_exp.train.merging.merge_check import ModelOutputs, compare_outputs, model_outputs
from lora_exp.train.merging.merged_run import merge
from lora_exp.train.plan import make_plan

MAX_LEN = 64
WINDOW = {"kv_heads": 2, "head_dim": 6, "window": 5, "full_layers": [1], "logit_softcap": 9.0}
FAMILIES = {
  "minigpt": {"lora__targets": ["mlp", "head"], "model__layers": 1},
  "gpt2": {"model__family": "gpt2", "model__arch": ArchConfig(), "lora__targets": ["c_attn"]},
  "llama": {"model__family": "llama", "model__arch": ArchConfig(**WINDOW), "lora__targets": ["qv", "mlp"]},
}


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


LLAMA = {"model__family": "llama", "model__layers": 1, "model__dropout": 0.0,
         "model__arch": ArchConfig(kv_heads=2, qkv_bias=True)}  # fmt: skip
ALL = {"lora__targets": ["all_linear", "embeddings"]}
METHODS = {
  "lora": ALL,
  "rslora": {"lora__targets": ["mlp"], "lora__scaling": "rslora"},
  "dora": {**ALL, "lora__method": "dora"},
  "vera": {**ALL, "lora__method": "vera"},
  "adalora": {"lora__targets": ["all_linear"], "lora__method": "adalora"},
  "pissa": {**ALL, "lora__init": "pissa"},
  "olora": {"lora__targets": ["mlp"], "lora__init": "olora"},
  "bitfit": {"lora__method": "bitfit", "lora__bias": "all"},
  "whole modules": {"lora__targets": ["mlp"], "lora__train_modules": ["embed_tokens", "norm"]},
  "nf4": {"lora__targets": ["mlp"], "lora__quant": "nf4"},
}  # fmt: skip


def moved(params):
  """`params` as if they had been trained."""
  constants = {name for kind in methods.every() for name, leaf in kind.leaves.items() if not leaf.trained}
  constant = lambda path: path[-1].key in constants
  return jax.tree_util.tree_map_with_path(lambda p, x, new: x if constant(p) else new, params, bent(params))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_merged_and_read_back(method, tmp_path):
  if method == "nf4":
    pytest.importorskip("qwix")
  cfg = small(**LLAMA, **METHODS[method])
  plan, job = make_plan(cfg), job_of(cfg)
  batch = [rows()]
  run = LoadedRun(plan, job, moved(job.state.params), job.frozen)
  base = model_outputs(LoadedRun(plan, job, *run.base()[::2]), batch, "float32")
  before = model_outputs(run, batch, "float32")
  plain, rounding = merge(run, None)
  assert plain.params == {} and not plain.plan.table
  found = compare_outputs(before, model_outputs(plain, batch, "float32"))
  assert found.logit < 1e-4 and found.changed == 0
  assert compare_outputs(base, before).logit > 1e-3, "the update does nothing"
  assert rounding.shares()["update_kept"] == pytest.approx(1, abs=1e-3)
  save_hf(tmp_path, flatten(plain.frozen), "float32", get_family("llama").stored_names(ModelConfig()))
  expected = {path: np.asarray(x) for path, x in flatten(plain.frozen).items()}
  assert_same(load_arrays(tmp_path, replace(cfg.model, vocab_size=257)), expected)


@pytest.mark.slow
def test_vera_whose_first_module_is_not_the_largest_is_read(tmp_path):
  cfg = small(**LLAMA, lora__method="vera", lora__targets=["all_linear"])
  plan, job = make_plan(cfg), job_of(cfg)
  run = LoadedRun(plan, job, moved(job.state.params), job.frozen)
  adapter = take_trial(run.params, plan.table, [], "vera", 0)
  lora.save_adapter(tmp_path, adapter, make_plan(cfg).naming(), {})
  cfg = replace(cfg, lora=replace(cfg.lora, init_from=str(tmp_path)))
  again = job_of(cfg)
  found = LoadedRun(make_plan(cfg), again, again.state.params, again.frozen)
  assert compare_outputs(*(model_outputs(r, [rows()], "float32") for r in (run, found))).logit < 1e-5


def test_rounding_shows_small_updates_lost_in_bfloat16():
  cfg = small(**LLAMA, lora__targets=["mlp"], model__param_dtype="bfloat16")
  job = job_of(cfg)
  params = jax.tree.map(lambda x: 0.03 * x, bent(job.state.params))
  _, rounding = merge(LoadedRun(make_plan(cfg), job, params, job.frozen), None)
  assert 0 <= rounding.shares()["update_kept"] < 0.5
  job = job_of(cfg)
  _, rounding = merge(LoadedRun(make_plan(cfg), job, params, job.frozen), "float32")
  assert rounding.shares()["update_kept"] == pytest.approx(1, abs=1e-3)


def test_compare_outputs_against_two_distributions():
  targets = np.array([0, 1])
  p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
  found = compare_outputs(*(ModelOutputs(np.log(x).astype(np.float32), targets) for x in (p, q)))
  kl = 0.5 * np.log(2) + 0.25 * np.log(0.5)
  assert (found.count, found.changed) == (2, 1)
  assert [found.logit, found.kl_mean, found.kl_most] == pytest.approx([np.log(2), kl / 2, kl], abs=1e-6)
  assert found.loss == pytest.approx(((-np.log(0.5) - np.log(0.8)) / 2, (-np.log(0.25) - np.log(0.8)) / 2), abs=1e-6)
  logits = (np.ones((1, 2)), np.full((1, 2), 1.5))
  numbers = compare_outputs(*(ModelOutputs(x, np.zeros((1, 2), np.float32)) for x in logits))
  assert (numbers.loss, numbers.kl_mean, numbers.changed, numbers.logit) == ((1, 2.25), None, None, 0.5)


@pytest.mark.parametrize(("family", "targets"), [("llama", ["embeddings", "mlp"]), ("minigpt", ["embeddings", "head"])])
def test_merging_changes_no_logit(family, targets):
  settings = {"model__max_len": MAX_LEN, "model__dropout": 0.0, **FAMILIES[family], "lora__targets": targets}
  cfg = small(**settings)
  with quickly():
    job = job_of(cfg)
    before = LoadedRun(make_plan(cfg), job, bent(job.state.params), job.frozen)
    after, _ = merge(before)
    found = []
    for run in (before, after):
      (params, trial), frozen = run.single(), run.frozen
      assert bool(jax.tree.leaves(params)) is (run is before)
      model = jax.jit(lambda p, a, f, run=run: assemble(run.job.program, p, a, f, None)(jnp.arange(40)[None]))
      found.append(np.asarray(model(params, trial, frozen)))
    plain = np.asarray(model({}, trial, job.frozen))
  np.testing.assert_allclose(found[1], found[0], atol=1e-4)
  assert np.abs(plain - found[0]).max() > 1e-2
