"""The files of conf/model have the published numbers of parameters, and LoRA adapts the usual modules."""

from dataclasses import replace
from functools import cache

import pytest
from flax import nnx

from lora_exp.cli.compose import composer, conf_directory
from lora_exp.cli.job_config import job_config
from lora_exp.config import Config
from lora_exp.config.override_grammar import parse
from lora_exp.lora import resolve
from lora_exp.models.factory import abstract_model
from lora_exp.models.registry import get_family
from lora_exp.runtime.mesh import flatten

PARAMETERS = {
  "gpt2": 124_439_808,
  "gpt2_medium": 354_823_168,
  "gpt2_large": 774_030_080,
  "gpt2_xl": 1_557_611_200,
  "smollm2_135m": 134_515_008,
  "llama2_7b": 6_738_415_616,
  "llama3_8b": 8_030_261_248,
  "llama3_2_1b": 1_235_814_400,
  "mistral_7b": 7_241_732_096,
  "mixtral_8x7b": 46_702_792_704,
  "qwen3_0_6b": 596_049_920,
  "qwen3_30b_a3b": 30_532_122_624,
  "olmo2_1b": 1_484_916_736,
  "phi3_mini": 3_821_079_552,
  "gemma_2b": 2_506_172_416,
  "gemma_7b": 8_537_680_896,
  "gemma2_2b": 2_614_341_888,
  "gemma3_270m": 268_098_176,
  "gemma3_1b": 999_885_952,
}


@cache
def config(name: str) -> Config:
  with composer(conf_directory()) as composing:
    return job_config(composing.compose([f"model={name}"]), parse([f"model={name}"], None)[0])


def parameters(name: str, layers: int) -> int:
  cfg = config(name).model
  model = abstract_model(replace(cfg, layers=layers), cfg.vocab_size or 257)
  return sum(x.size for x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_model_has_its_number_of_parameters(name):
  one, two = parameters(name, 1), parameters(name, 2)
  assert one + (config(name).model.layers - 1) * (two - one) == PARAMETERS[name]


def test_every_model_file_builds():
  files = {path.stem for path in (conf_directory() / "model").glob("[!_]*.yaml")} - {"hf"}
  assert PARAMETERS.keys() <= files
  for name in files - PARAMETERS.keys():
    assert parameters(name, 2) >= parameters(name, 1) > 0


@pytest.mark.parametrize(("targets", "trainable"), [
  ("attn.c_attn", 294_912), (["attn.c_attn", "attn.c_proj"], 442_368), (["c_attn", "c_proj"], 811_008),
  ("qv", 294_912), ("attention", 442_368), ("all_linear", 1_179_648),
])
def test_rank_8_on_gpt2_trains_as_many_as_the_tutorials(targets, trainable):
  cfg = config("gpt2").model
  table = resolve(abstract_model(cfg, cfg.vocab_size), targets, rank=8, presets=get_family("gpt2").presets)
  assert sum(row.parameters for row in table) == trainable
  assert len(table) % 12 == 0 and {row.path.split(".")[1] for row in table} == {str(i) for i in range(12)}
