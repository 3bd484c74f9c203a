"""Adapters of single experts, whose kernels are one array for all experts of a layer."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from packs import Training, job_of, quickly, small

from lora_exp import lora
from lora_exp.config import ArchConfig, InputError
from lora_exp.lora.kernels import shape as kernel_shape
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.plan import make_plan

OPTIONS = {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True, "dense_layers": [], "dense_ff": 20}


def experts(*targets: str, **more):
  """The config of a small Qwen3-MoE with adapters on `targets`."""
  arch = ArchConfig(kv_heads=1, head_dim=8, qk_norm=True, options=OPTIONS)
  model = {"model__family": "qwen3_moe", "model__arch": arch, "model__width": 24, "model__heads": 2, "model__ff": 20}
  return small(lora__targets=list(targets), lora__rank=2, model__dropout=0.0, **model, **more)


@pytest.mark.parametrize(("targets", "exclude", "labels"), [
  (["layers.1.mlp.experts.2.*"], None, ["layers.1.mlp.experts[2].down_proj", "layers.1.mlp.experts[2].gate_up_proj"]),
  (["experts.down_proj"], ["layers.0.*", "experts.0.*"], ["layers.1.mlp.experts[1,2].down_proj"]),
  ([r"re:layers\.0\..*(experts\.[01]\.down|q)_proj"], None,
   ["layers.0.mlp.experts[0,1].down_proj", "layers.0.self_attn.q_proj"]),
  (["experts.0.down_proj", "experts.1.down_proj", "experts.2.down_proj"], "layers.0.*",
   ["layers.1.mlp.experts.down_proj"]),
])  # fmt: skip
def test_patterns_select_single_experts(targets, exclude, labels):
  plan = make_plan(experts(*targets, lora__exclude=exclude))
  assert [row.label for row in plan.table] == labels
  counts, trained = plan.parameters(), flatten(job_of(plan.cfg).state.params)
  used = sum(int((np.asarray(x) != 0).sum()) for path, x in trained.items() if path.endswith("lora_a"))
  assert counts["lora_a"] == used and counts["trainable"] == counts["lora_a"] + counts["lora_b"]


@pytest.mark.parametrize("method", ["lora", "pissa", "adalora"])
def test_other_experts_stay_unchanged_in_training(method):
  more = {"lora__budget": 1.0} if method == "adalora" else {}
  cfgs = [experts(f"experts.{i}.down_proj", lora__layers=[1], **more) for i in (0, 2)]
  settings = {"init": "pissa"} if method == "pissa" else {"method": method}
  cfgs = [replace(cfg, lora=replace(cfg.lora, **settings)) for cfg in cfgs]
  with quickly():
    training = Training(job_of(*cfgs))
    before = jax.tree.map(np.array, training.state.params)
    training.run(2)
  for trial, expert in enumerate((0, 2)):
    for path, x in flatten(training.state.params).items():
      if ".start_" not in path:
        changed = (np.asarray(x)[trial] != flatten(before)[path][trial]).reshape(3, -1).any(1)
        assert changed[expert] and changed.sum() == 1, path


def test_a_saved_adapter_keeps_its_experts(tmp_path):
  plan = make_plan(experts("layers.1.mlp.experts.1.*", "q_proj"))
  with quickly():
    training = Training(job_of(plan.cfg))
    training.run(1)
  adapter = take_trial(training.state.params, plan.table, plan.full, "lora", 0)
  shapes = {path: kernel_shape(module) for path, module in lora.modules(plan.model()).items()}
  full = {path: x.shape for path, x in plan.shapes.items()}
  for naming in (plan.naming(), None):
    lora.save_adapter(tmp_path, adapter, naming, {})
    assert set(lora.load_adapter(tmp_path, naming, shapes, full).rows) == set(adapter.rows)


def test_methods_without_factors_adapt_all_experts():
  with pytest.raises(InputError, match="selects some of the kernels of .*experts.down_proj, which only methods with"):
    make_plan(experts("experts.1.down_proj", lora__method="ia3"))
