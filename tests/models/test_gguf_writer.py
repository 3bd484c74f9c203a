"""GGUF files of every architecture that is written: read again, they hold the same settings and tensors."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_arrays
from safetensors.numpy import load_file

from lora_exp.config import ArchConfig, InputError, ModelConfig
from lora_exp.models.hf_export import same_model, to_hf
from lora_exp.models.registry import get_family
from lora_exp.models.weights.gguf_checkpoint import dequantised
from lora_exp.models.weights.gguf_config import read_gguf_config
from lora_exp.models.weights.gguf_names import gguf_names
from lora_exp.models.weights.gguf_writer import write_gguf_model
from lora_exp.models.weights.hf_writer import stored_tensors

GEMMA = {"kv_heads": 2, "head_dim": 16, "norm_offset": True, "activation": "gelu_tanh", "embed_scale": True,
         "norm_eps": 2.0**-20}
EXPERTS = {"options": {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}}
ARCHITECTURES = {  # family: settings that differ from Llama's
  "llama": {"tied": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
  "mistral": {"tied": False},
  "qwen2": {"qkv_bias": True, "tied": True},
  "qwen3": {"qk_norm": True, "tied": True},
  "gemma": GEMMA,
  "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_per_head": False, "tied": False},
  "phi3": {"tied": False},
  "mixtral": {"tied": False, **EXPERTS},
}  # fmt: skip


def model_of(family: str) -> ModelConfig:
  arch = {"kv_heads": 2, "head_dim": 16, "norm_eps": 2.0**-17, **ARCHITECTURES[family]}
  return ModelConfig(family=family, layers=2, width=64, heads=4, ff=96, max_len=64, vocab_size=70, dropout=0.0,
                     base="weights", arch=ArchConfig(**arch))


def write(file: Path, model: ModelConfig, kind: str = "F32") -> dict[str, np.ndarray]:
  """Writes a random model; returns the tensors by Hugging Face's names."""
  config = to_hf(model, model.vocab_size or 0)
  assert config is not None
  stored = get_family(model.family).stored_names(model)
  tensors = list(stored_tensors(random_arrays(model), stored))
  write_gguf_model(file, gguf_names(config), config, {}, tensors, kind, list)
  return {tensor.name: tensor.make() for tensor in tensors}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_written_model_is_read_again(family, tmp_path):
  model, file = model_of(family), tmp_path / "model.gguf"
  expected = write(file, model)
  assert same_model(read_gguf_config(file), model, 70)
  found = load_file(dequantised(file, tmp_path / "cache") / "model.safetensors")
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("kind", "step"), [("F16", 2e-3), ("Q8_0", 2e-2)])
def test_rounding_is_that_of_the_type(kind, step, tmp_path):
  expected = write(tmp_path / "model.gguf", model_of("llama"), kind)
  found = load_file(dequantised(tmp_path / "model.gguf", tmp_path / "cache") / "model.safetensors")
  errors = {name: np.abs(found[name] - x).max() for name, x in expected.items()}
  assert 0 < max(errors.values()) < step
  assert not any(error for name, error in errors.items() if "norm" in name)


def test_model_without_gguf_files_is_refused():
  with pytest.raises(InputError, match="GGUF files are written for llama"):
    gguf_names({"model_type": "gpt2"})
  with pytest.raises(InputError, match="GGUF files are written for llama"):
    gguf_names(None)
