"""Bases that are not read are refused in one sentence, and no advice names a thing of another kind."""

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import LLAMA, assert_same, load_arrays, published_arrays, random_arrays, write_checkpoint
from safetensors.numpy import save_file

from lora_exp.config import InputError
from lora_exp.models.hf_config import resolve_architecture
from lora_exp.models.registry import get_family
from lora_exp.models.weights import locate
from lora_exp.models.weights.safetensors_checkpoint import write_safetensors
from lora_exp.runtime.safetensors_reader import DTYPES

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("method", "tensors"), [
  ("bitsandbytes", {f"{LAYER}.weight.absmax": np.ones(3, np.float32)}),
  ("bitsandbytes", {f"{LAYER}.weight.quant_state.bitsandbytes__nf4": np.ones(3, np.uint8)}),
  ("bitsandbytes", {f"{LAYER}.SCB": np.ones(3, np.float32)}),
  ("GPTQ or AWQ", {f"{LAYER}.qweight": np.ones((3, 4), np.int32)}),
  ("fp8 or compressed-tensors", {f"{LAYER}.weight_scale_inv": np.ones((1, 1), np.float32)}),
])
def test_a_quantised_file_is_one_problem(tmp_path, method, tensors):
  save_file(published_arrays(random_arrays()) | tensors, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match=rf"quantised by {method}, which is not supported; use the model") as raised:
    load_arrays(tmp_path)
  assert len(raised.value.problems) == 1


def test_an_adapter_that_is_not_merged_is_one_problem(tmp_path):
  lora = {f"base_model.model.{LAYER}.lora_A.default.weight": np.ones((2, 3), np.float32)}
  save_file(published_arrays(random_arrays()) | lora, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match="belongs to an adapter that is not merged") as raised:
    load_arrays(tmp_path)
  assert len(raised.value.problems) == 1


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "model."])
def test_the_wrapper_of_a_tool_is_removed_from_names(tmp_path, wrapper):
  arrays = random_arrays()
  stored = {f"{wrapper}{name}": x for name, x in published_arrays(arrays).items()}
  write_checkpoint(tmp_path, stored)
  assert_same(load_arrays(tmp_path), arrays)
  write_checkpoint(tmp_path, stored, tie_word_embeddings=True)
  assert resolve_architecture(str(tmp_path))["arch"]["tied"] is False
  with pytest.raises(InputError, match=f"{wrapper}lm_head.weight differs"):
    load_arrays(tmp_path, replace(LLAMA, arch=replace(LLAMA.arch, tied=True)))


@pytest.mark.parametrize("config", [{"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_a_quantisation_config_names_its_method(tmp_path, config):
  write_checkpoint(tmp_path, quantization_config=config)
  with pytest.raises(InputError, match=f"quantization_config: the weights are quantised by {config['quant_method']}"):
    resolve_architecture(str(tmp_path))


def test_advice_names_nothing_of_another_kind(tmp_path):
  write_checkpoint(tmp_path / "w", architectures=["Qwen2VLForConditionalGeneration"])
  (tmp_path / "model.py").write_text("")
  for ask in (lambda: resolve_architecture(str(tmp_path / "w")), lambda: get_family("bloom"),
              lambda: locate.find_weights(str(tmp_path / "model"))):  # fmt: skip
    with pytest.raises(InputError) as raised:
      ask()
    assert "did you mean" not in str(raised.value)
  with pytest.raises(InputError, match="did you mean qwen3"):
    get_family("qwem3")


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F16", "BF16"])
def test_narrow_floats_are_read(tmp_path, code):
  arrays = {path: x.astype(DTYPES[code]) for path, x in random_arrays().items()}
  entries = [(name, x.shape, lambda x=x: x) for name, x in published_arrays(arrays).items()]
  write_safetensors(tmp_path / "model.safetensors", entries, code)
  assert_same(load_arrays(tmp_path), arrays)
