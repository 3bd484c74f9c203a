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


@pytest.mark.parametrize(("method", "tensor"), [
  ("GPTQ or AWQ", "qweight"), ("compressed-tensors or NVFP4, packed", "weight_packed"),
])  # fmt: skip
def test_a_quantised_file_is_one_problem(tmp_path, method, tensor):
  tensors = {f"{LAYER}.{tensor}": np.ones((3, 4), np.int32), f"{LAYER}.weight_scale": np.ones(1, np.float32)}
  save_file(published_arrays(random_arrays()) | tensors, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match=rf"quantised by {method}, which is not supported; use the model") as raised:
    load_arrays(tmp_path)
  assert len(raised.value.problems) == 1


@pytest.mark.parametrize(("tensors", "said"), [
  ({".weight.absmax": np.ones(3, np.float32)}, "weight.quant_state.bitsandbytes__nf4 is missing"),
  ({".SCB": np.ones(3, np.float32)}, r"SCB is \(3,\), which is no shape for scales of .*weight, F32"),
  ({".weight_scale_inv": np.ones((2, 3), np.float32)}, r"weight_scale_inv is \(2, 3\), which is no shape for scales"),
  ({".extra.weight_scale": np.ones(1, np.float32)}, "extra.weight is missing; download"),
])  # fmt: skip
def test_an_incomplete_quantised_tensor_is_one_problem(tmp_path, tensors, said):
  named = {f"{LAYER}{name}": x for name, x in tensors.items()}
  save_file(published_arrays(random_arrays()) | named, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match=said) as raised:
    load_arrays(tmp_path)
  assert len(raised.value.problems) == 1


def test_float8_without_its_scale_is_refused(tmp_path):
  arrays = published_arrays(random_arrays())
  entries = [(name, x.shape, lambda x=x: x) for name, x in arrays.items()]
  write_safetensors(tmp_path / "model.safetensors", entries, "F8_E4M3")
  (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
  with pytest.raises(InputError, match="is float8, and its scale") as raised:
    load_arrays(tmp_path)
  assert len(raised.value.problems) == len(arrays)


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


@pytest.mark.parametrize("config", [{"quant_method": "gptq"}, {"quant_method": "mxfp4"}])
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
def test_narrow_floats_are_read(tmp_path, capfd, code):
  arrays = {path: x.astype(DTYPES[code]) for path, x in random_arrays().items()}
  entries = [(name, x.shape, lambda x=x: x) for name, x in published_arrays(arrays).items()]
  write_safetensors(tmp_path / "model.safetensors", entries, code)
  assert_same(load_arrays(tmp_path), arrays)
  assert ("tensors are float8 without a scale, such as" in capfd.readouterr().err) == code.startswith("F8")


@pytest.mark.parametrize(("architecture", "model_type"), [
  ("LlamaForCausalLM", "qwen2"), ("Qwen3ForCausalLM", "llama"), ("MixtralForCausalLM", "mistral"),
])  # fmt: skip
def test_two_names_of_different_models_are_refused(tmp_path, architecture, model_type):
  write_checkpoint(tmp_path, architectures=[architecture], model_type=model_type)
  with pytest.raises(InputError, match=f"model_type={model_type} and architectures={architecture} name different"):
    resolve_architecture(str(tmp_path))


@pytest.mark.parametrize(("names", "said"), [
  ({"architectures": None, "model_type": "bloom"}, "model_type=bloom: not supported; choose gemma, gemma2"),
  ({"architectures": [], "model_type": None}, "neither architectures nor model_type names the kind of model"),
  ({"architectures": ["LlamaModel"], "model_type": "llama"}, "of model_type=llama, only LlamaForCausalLM is read"),
])  # fmt: skip
def test_a_model_that_is_not_supported_is_said(tmp_path, names, said):
  write_checkpoint(tmp_path, **names)
  with pytest.raises(InputError, match=said):
    resolve_architecture(str(tmp_path))


def test_a_missing_head_comes_with_advice(tmp_path):
  arrays = published_arrays(random_arrays())
  save_file({name: x for name, x in arrays.items() if "lm_head" not in name}, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match="lm_head.weight is missing; if the head is the embedding table, set") as raised:
    load_arrays(tmp_path)
  assert len(raised.value.problems) == 1
  tied = replace(LLAMA, arch=replace(LLAMA.arch, tied=True))
  assert "lm_head.kernel" not in load_arrays(tmp_path, tied)


def test_the_text_model_of_a_wrapper_must_be_its_own(tmp_path):
  text = {"model_type": "qwen3"}
  write_checkpoint(tmp_path, architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=text)
  with pytest.raises(InputError, match="model_type=qwen3 and architectures=Gemma3ForCausalLM name different models"):
    resolve_architecture(str(tmp_path))


@pytest.mark.parametrize(("value", "param_dtype"), [(np.nan, "float32"), (-np.inf, "bfloat16"), (7e4, "float16")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, param_dtype):
  arrays = published_arrays(random_arrays())
  arrays["model.layers.1.mlp.up_proj.weight"][3, 5] = value
  save_file(arrays, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match="1 tensor has NaN or infinite values, such as model.layers.1.mlp.up") as raised:
    load_arrays(tmp_path, replace(LLAMA, param_dtype=param_dtype))
  assert ("float16 ends at 65,504" in str(raised.value)) == (param_dtype == "float16")
