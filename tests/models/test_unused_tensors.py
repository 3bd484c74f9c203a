"""A stored tensor is ignored only if its value is the one that the model uses instead; and which file is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import LLAMA, assert_same, load_arrays, published_arrays, random_arrays, write_checkpoint, write_shards
from safetensors.numpy import save_file

from lora_exp.config import ArchConfig, InputError, ModelConfig
from lora_exp.models.hf_config import resolve_architecture
from lora_exp.models.weights import locate

TIED = replace(LLAMA, arch=replace(LLAMA.arch, tied=True))
GPT2 = ModelConfig(family="gpt2", layers=1, width=24, heads=3, ff=50, max_len=20, vocab_size=31, arch=ArchConfig())



@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
def test_a_differing_head_of_a_tied_config_is_used(tmp_path, prefix):
  arrays = random_arrays()  # untied
  stored = published_arrays(arrays, prefix)
  if prefix != "model.":
    stored["language_model.lm_head.weight"] = stored.pop("lm_head.weight")
  write_checkpoint(tmp_path, stored, tie_word_embeddings=True)
  assert resolve_architecture(str(tmp_path))["arch"]["tied"] is False
  assert_same(load_arrays(tmp_path), arrays)
  with pytest.raises(InputError, match=r"lm_head.weight differs from .*embed_tokens.weight, and model.arch.tied=true"):
    load_arrays(tmp_path, TIED)


def test_a_tied_table_may_have_the_name_of_the_head(tmp_path):
  arrays = random_arrays(TIED)
  stored = published_arrays(arrays)
  stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
  write_checkpoint(tmp_path, stored, tie_word_embeddings=True)
  assert_same(load_arrays(tmp_path, TIED), arrays)
  with pytest.raises(InputError, match="model.embed_tokens.weight is missing"):
    load_arrays(tmp_path)


def test_an_equal_head_of_a_tied_config_is_not_needed(tmp_path):
  arrays = random_arrays(TIED)
  head = {"lm_head.weight": arrays["embed_tokens.embedding"]}
  write_checkpoint(tmp_path, published_arrays(arrays) | head, tie_word_embeddings=True)
  assert resolve_architecture(str(tmp_path))["arch"]["tied"] is True
  assert_same(load_arrays(tmp_path, TIED), arrays)


def test_one_other_value_makes_another_head(tmp_path):
  arrays = random_arrays(TIED)
  head = arrays["embed_tokens.embedding"].copy()
  head[-1, -1] += 1e-3
  write_checkpoint(tmp_path, published_arrays(arrays) | {"lm_head.weight": head}, tie_word_embeddings=True)
  assert resolve_architecture(str(tmp_path))["arch"]["tied"] is False
  with pytest.raises(InputError, match="lm_head.weight differs"):
    load_arrays(tmp_path, TIED)


def test_only_other_parts_of_a_multimodal_model_are_ignored(tmp_path):
  arrays = random_arrays()
  vision = {"vision_tower.x": np.ones(3, np.float32), "multi_modal_projector.w": np.ones(3, np.float32)}
  stored = published_arrays(arrays, "language_model.model.") | vision
  write_checkpoint(tmp_path, stored)
  assert_same(load_arrays(tmp_path), arrays)
  write_checkpoint(tmp_path, stored | {"language_model.other.weight": np.ones(3, np.float32)})
  with pytest.raises(InputError, match=r"language_model\.other\.weight is not in the model"):
    load_arrays(tmp_path)


@pytest.mark.parametrize(("name", "value", "problem"), [
  ("attn.bias", np.ones((1, 1, 20, 20), np.float32), "is not the causal mask"),
  ("attn.bias", np.tril(np.ones((1, 1, 20, 20)), 1).astype(bool), "is not the causal mask"),
  ("attn.masked_bias", np.float32(-1), "is not a score of masked positions"),
  ("attn.rotary", np.zeros(3, np.float32), "is not in the model"),
])
def test_gpt2s_buffers_must_have_the_values_used(tmp_path, name, value, problem):
  arrays = published_arrays(random_arrays(GPT2), "", transposed=False)
  save_file(arrays | {f"h.0.{name}": np.asarray(value)}, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match=rf"h\.0\.{name} {problem}"):
    load_arrays(tmp_path, GPT2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stored_rotary_frequencies_are_compared(tmp_path, dtype):
  arrays, name = random_arrays(), "model.layers.0.self_attn.rotary_emb.inv_freq"
  frequencies = 1e4 ** -(np.arange(6) / 6)
  write_checkpoint(tmp_path, published_arrays(arrays) | {name: frequencies.astype(dtype)})
  assert_same(load_arrays(tmp_path), arrays)
  write_checkpoint(tmp_path, published_arrays(arrays) | {name: (5e5 ** -(np.arange(6) / 6)).astype(dtype)})
  with pytest.raises(InputError, match="inv_freq differs from the frequencies of model.arch.rope_theta"):
    load_arrays(tmp_path)


def test_model_safetensors_is_read_before_an_index(tmp_path):
  arrays = random_arrays()
  write_shards(tmp_path, published_arrays({path: x + 1 for path, x in arrays.items()}))
  index = json.loads((tmp_path / locate.INDEX).read_text())
  write_checkpoint(tmp_path)
  assert_same(load_arrays(tmp_path), arrays)
  assert not np.array_equal(load_arrays(tmp_path / locate.INDEX)["norm.scale"], arrays["norm.scale"])
  for file in set(index["weight_map"].values()):
    (tmp_path / file).unlink()
  assert_same(load_arrays(tmp_path), arrays)


def test_shards_without_their_index_are_refused(tmp_path):
  write_shards(tmp_path, published_arrays(random_arrays()))
  (tmp_path / locate.INDEX).unlink()
  with pytest.raises(InputError, match=f"{locate.INDEX} is missing, and model-00001-of-00003.safetensors is one of"):
    load_arrays(tmp_path)
