"""The shapes of parameters that are computed from settings are those of the modules, for every family."""

from dataclasses import replace

import pytest

from lora_exp.config.schema import ArchConfig, MlpConfig, ModelConfig
from lora_exp.models.factory import built_shapes
from lora_exp.models.registry import all_families

SMALL = ModelConfig(layers=2, width=24, heads=4, ff=40, max_len=16, vocab_size=50, base="random")
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True, "dense_layers": [1], "dense_ff": 12}
ARCH = ArchConfig(kv_heads=2, head_dim=8, options=EXPERTS)
CASES = {
  "plain": ARCH,
  "biases": replace(ARCH, qkv_bias=True, out_bias=True, mlp_bias=True, tied=False),
  "norms": replace(ARCH, post_norms=True, qk_norm=True, qk_norm_per_head=False),
  "post norms": replace(ARCH, pre_norms=False, post_norms=True, qk_norm=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", all_families())
def test_computed_shapes_are_those_of_the_module(name, case):
  family = all_families()[name]
  model = replace(SMALL, family=name, arch=CASES[case], mlp=MlpConfig(3, [5, 7], 2))
  assert family.shapes is not None
  assert family.parameter_shapes(model, 50) == built_shapes(model, 50)


def test_a_family_without_computed_shapes_is_built():
  family = replace(all_families()["llama"], shapes=None)
  model = replace(SMALL, family="llama", arch=ARCH)
  assert family.parameter_shapes(model, 50) == built_shapes(model, 50)
