"""Checkpoints of a tiny Llama in published formats, and the arrays loaded from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lora_exp.config import ArchConfig, MeshConfig, ModelConfig
from lora_exp.models.factory import abstract_model
from lora_exp.models.registry import get_family
from lora_exp.models.weights import store
from lora_exp.runtime.mesh import Layout, flatten, make_mesh

LLAMA = ModelConfig(
  family="llama", layers=2, width=32, heads=4, ff=48, max_len=64, vocab_size=263, dropout=0.0, base="weights",
  arch=ArchConfig(kv_heads=2, head_dim=12, rope_theta=1e4, norm_eps=1e-6, qkv_bias=True, out_bias=True, tied=False),
)
CONFIG = {
  "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 48, "vocab_size": 263, "rms_norm_eps": 1e-6,
  "max_position_embeddings": 64, "attention_bias": True, "tie_word_embeddings": False,
}

# A Llama of 143 MB in float32.
BIG = ModelConfig(family="llama", layers=8, width=512, heads=8, ff=1536, vocab_size=8192, max_len=64,
                  arch=ArchConfig(kv_heads=8, head_dim=64, tied=False))


def random_arrays(cfg: ModelConfig = LLAMA) -> dict[str, np.ndarray]:
  """Normal random arrays for every parameter of the model, by our paths."""
  shapes = flatten(nnx.to_pure_dict(nnx.state(abstract_model(cfg, 0), nnx.Param)))
  rng = np.random.default_rng(0)
  return {path: rng.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}


def published_arrays(
  arrays: dict[str, np.ndarray], prefix: str = "model.", transposed: bool = True
) -> dict[str, np.ndarray]:
  """The arrays under transformers' names and in its orientation."""
  stored = {}
  for path, x in arrays.items():
    module, leaf = path.rsplit(".", 1)
    name = f"{'' if module == 'lm_head' else prefix}{module}.{'bias' if leaf == 'bias' else 'weight'}"
    stored[name] = np.ascontiguousarray(x.T) if leaf == "kernel" and (transposed or module == "lm_head") else x
  return stored


def write_checkpoint(at: Path, arrays: dict[str, np.ndarray] | None = None, **config) -> Path:
  """Writes a checkpoint in the published format: config.json and one file."""
  at.mkdir(exist_ok=True)
  (at / "config.json").write_text(json.dumps({**CONFIG, **config}))
  save_file(published_arrays(random_arrays()) if arrays is None else arrays, at / "model.safetensors", {"format": "pt"})
  return at


def write_shards(at: Path, arrays: dict[str, np.ndarray]) -> Path:
  """Writes a checkpoint in three files with an index."""
  at.mkdir(exist_ok=True)
  names, index = sorted(arrays), {}
  for i in range(3):
    file = f"model-0000{i + 1}-of-00003.safetensors"
    save_file({name: arrays[name] for name in names[i::3]}, at / file)
    index |= dict.fromkeys(names[i::3], file)
  (at / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
  (at / "config.json").write_text(json.dumps(CONFIG))
  return at


def load_arrays(
  source: Path, cfg: ModelConfig = LLAMA, mesh: MeshConfig | None = None, cache: Path | str = "~"
) -> dict[str, Any]:
  """Loads the arrays of the checkpoint `source` for the model of `cfg`, by our paths."""
  family = get_family(cfg.family)
  abstract = nnx.to_pure_dict(nnx.state(abstract_model(cfg, 0), nnx.Param))
  layout = Layout(make_mesh(mesh or MeshConfig()), family.axes, family.units(cfg))
  return flatten(store.load(source, abstract, layout.shardings(abstract), family.stored_names(cfg), cache))


def assert_same(loaded: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
  """Asserts that the arrays are equal bit for bit after a cast to the loaded dtype, and that there are no others."""
  assert loaded.keys() == expected.keys()
  for path, x in loaded.items():
    np.testing.assert_array_equal(np.asarray(x), expected[path].astype(x.dtype), err_msg=path)
