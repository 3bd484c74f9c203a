"""GGUF files and Gemma's orbax checkpoints give the same bits as safetensors, or an error that names the file."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import LLAMA, assert_same, load_arrays, published_arrays, random_arrays

from lora_exp.config import ArchConfig, InputError, ModelConfig


def gguf_file(at: Path, arrays: dict[str, np.ndarray]) -> Path:
  """The arrays as llama.cpp stores them: its names, and rotated pairs of q and k side by side."""
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(at, "llama")
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
  for name, x in published_arrays(arrays).items():
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads:  # halves (i, i + h/2) become neighbours
      x = np.stack(np.split(x.reshape(heads, -1, x.shape[-1]), 2, axis=1), axis=2).reshape(x.shape)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(x))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return at


NO_BIAS = replace(LLAMA, arch=ArchConfig(kv_heads=2, head_dim=12, tied=False))


def test_a_gguf_file_is_dequantised_once_into_the_cache(tmp_path):
  arrays = random_arrays(NO_BIAS)
  file = gguf_file(tmp_path / "tiny.gguf", arrays)
  assert_same(load_arrays(file, NO_BIAS, cache=tmp_path / "cache"), arrays)
  [made] = (tmp_path / "cache").rglob("model.safetensors")
  before = made.stat().st_mtime_ns
  assert_same(load_arrays(tmp_path, NO_BIAS, cache=tmp_path / "cache"), arrays)
  assert made.stat().st_mtime_ns == before


def test_a_truncated_gguf_file_is_reported(tmp_path):
  file = gguf_file(tmp_path / "tiny.gguf", random_arrays(NO_BIAS))
  file.write_bytes(file.read_bytes()[:-5000])
  with pytest.raises(InputError, match=r"tiny.gguf is not a complete GGUF file"):
    load_arrays(file, NO_BIAS, cache=tmp_path / "cache")
  assert not list((tmp_path / "cache").rglob("*.safetensors"))


def gemma(version: int) -> ModelConfig:
  more = {"post_norms": True, "qk_norm": True} if version == 3 else {}
  arch = ArchConfig(kv_heads=4 if version == 7 else 1, head_dim=10, norm_offset=True, embed_scale=True, **more)
  return ModelConfig(family="llama", layers=2, width=24, heads=4, ff=36, vocab_size=50, arch=arch)


def kaggle(arrays: dict[str, np.ndarray], cfg: ModelConfig, transposed: bool) -> dict:
  """The arrays in the layout of Gemma's Flax checkpoints."""
  D, F, H, h, K = cfg.width, cfg.ff, cfg.heads, 10, cfg.arch.kv_heads
  spare = np.full((6, D), 9.0, np.float32)  # rows without a token
  tree = {"transformer/embedder": {"input_embedding": np.concatenate([arrays["embed_tokens.embedding"], spare])},
          "transformer/final_norm": {"scale": arrays["norm.scale"]}}
  for i in range(cfg.layers):
    ours = {path.removeprefix(f"layers.{i}."): x for path, x in arrays.items() if path.startswith(f"layers.{i}.")}
    heads = lambda name, n, ours=ours: ours[f"self_attn.{name}.kernel"].reshape(D, n, h).swapaxes(0, 1)
    at = f"transformer/layer_{i}/"
    if K == H:
      stack = np.stack([heads("q_proj", H), heads("k_proj", H), heads("v_proj", H)])
      tree[at + "attn/qkv_einsum"] = {"w": stack}
    else:
      tree[at + "attn/q_einsum"] = {"w": heads("q_proj", H)}
      tree[at + "attn/kv_einsum"] = {"w": np.stack([heads("k_proj", K), heads("v_proj", K)])}
    tree[at + "attn/attn_vec_einsum"] = {"w": ours["self_attn.o_proj.kernel"].reshape(H, h, D)}
    gate = np.stack([ours["mlp.gate_proj.kernel"], ours["mlp.up_proj.kernel"]])
    assert gate.shape == (2, D, F)
    tree[at + "mlp/gating_einsum"] = {"w": gate.swapaxes(1, 2) if transposed else gate}
    tree[at + "mlp/linear"] = {"w": ours["mlp.down_proj.kernel"]}
    names = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if cfg.arch.post_norms:
      names |= {"post_attention_norm": "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm", "attn/_query_norm": "self_attn.q_norm",
                "attn/_key_norm": "self_attn.k_norm"}
    tree |= {at + theirs: {"scale": ours[f"{name}.scale"]} for theirs, name in names.items()}
  return tree


@pytest.mark.parametrize(("version", "transposed"), [(2, False), (7, False), (3, True)])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_gemma_flax_checkpoints_are_loaded_bit_for_bit(tmp_path, version, transposed, ocdbt):
  """2B, 7B and Gemma 3, in orbax's newer and older files; the archive holds the directory and a tokenizer."""
  import orbax.checkpoint as ocp

  cfg = gemma(version)
  arrays = random_arrays(cfg)
  tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), kaggle(arrays, cfg, transposed))
  with ocp.PyTreeCheckpointer(use_ocdbt=ocdbt) as saver:
    saver.save(tmp_path / "archive" / "2b", tree)
  (tmp_path / "archive" / "tokenizer.model").write_bytes(b"")
  expected = {path: x.astype(ml_dtypes.bfloat16) for path, x in arrays.items()}
  assert_same(load_arrays(tmp_path / "archive", cfg), expected)
  with pytest.raises(InputError) as caught:
    load_arrays(tmp_path / "archive" / "2b", gemma(3 if version == 2 else 2))
  assert len(caught.value.problems) >= 4


def test_a_missing_or_truncated_orbax_file_is_reported(tmp_path):
  """Without its own rule, tensorstore reads zeros where a file is gone."""
  import orbax.checkpoint as ocp

  cfg = gemma(2)
  with ocp.PyTreeCheckpointer(use_ocdbt=False) as saver:
    saver.save(tmp_path / "2b", jax.tree.map(jnp.asarray, kaggle(random_arrays(cfg), cfg, False)))
  piece = tmp_path / "2b" / "transformer" / "layer_1" / "mlp" / "linear.w" / "0.0"
  whole = piece.read_bytes()
  piece.write_bytes(whole[:-20])
  with pytest.raises(InputError, match="2b: transformer/layer_1/mlp/linear/w cannot be read"):
    load_arrays(tmp_path / "2b", cfg)
  piece.unlink()
  with pytest.raises(InputError, match="2b: transformer/layer_1/mlp/linear/w cannot be read"):
    load_arrays(tmp_path / "2b", cfg)
