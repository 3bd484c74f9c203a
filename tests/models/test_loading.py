"""Checkpoints of every format give the same bits in the same arrays."""

from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import LLAMA, assert_same, load_arrays, published_arrays, random_arrays, write_checkpoint, write_shards
from safetensors.numpy import load_file, save_file

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.weights import store
from lora_exp.models.weights.safetensors_checkpoint import open_safetensors, write_safetensors
from lora_exp.runtime import safetensors_reader
from lora_exp.runtime.mesh import flatten
from lora_exp.train.base import make_base
from lora_exp.train.plan import make_plan


def test_a_published_file_is_loaded_bit_for_bit(tmp_path):
  assert_same(load_arrays(write_checkpoint(tmp_path)), random_arrays())
  assert_same(load_arrays(tmp_path / "model.safetensors"), random_arrays())


def test_shards_and_their_index_are_one_checkpoint(tmp_path):
  assert_same(load_arrays(write_shards(tmp_path, published_arrays(random_arrays()))), random_arrays())


@pytest.mark.parametrize("block", [100, 1000])
def test_tensors_are_read_in_blocks_of_rows(tmp_path, monkeypatch, block):
  """The result does not depend on the block size."""
  monkeypatch.setattr(safetensors_reader, "BLOCK", block)
  assert_same(load_arrays(write_checkpoint(tmp_path)), random_arrays())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_tensor_is_cast_once(tmp_path, dtype, param_dtype):
  code = {"bfloat16": "BF16", "float16": "F16", "float64": "F64"}[np.dtype(dtype).name]
  arrays = {path: x.astype(dtype) for path, x in random_arrays().items()}
  entries = [(name, x.shape, lambda x=x: x) for name, x in published_arrays(arrays).items()]
  write_safetensors(tmp_path / "model.safetensors", entries, code)
  found = load_arrays(tmp_path, replace(LLAMA, param_dtype=param_dtype))
  assert {x.dtype for x in found.values()} == {jnp.dtype(param_dtype)}
  assert_same(found, arrays)


def test_written_files_are_safetensors(tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  write_safetensors(tmp_path / "a.safetensors", [("x", (2, 3), lambda: x), ("y", (6,), lambda: x.ravel())], "F32")
  found = load_file(tmp_path / "a.safetensors")
  assert found.keys() == {"x", "y"} and (found["x"] == x).all() and (found["y"] == x.ravel()).all()


def test_gpt2_is_read_with_and_without_its_prefix(tmp_path):
  """Its Conv1D stores (in, out); the released files have no prefix and hold masks that are no weights."""
  cfg = ModelConfig(family="gpt2", layers=2, width=24, heads=3, ff=50, max_len=20, vocab_size=31, arch=ArchConfig())
  arrays = random_arrays(cfg)
  mask, score = np.tril(np.ones((1, 1, 20, 20))), np.array(-1e4, np.float32)
  masks = {"h.0.attn.bias": mask.astype(np.float32), "h.1.attn.bias": mask.astype(bool), "h.0.attn.masked_bias": score}
  save_file(published_arrays(arrays, "", transposed=False) | masks, tmp_path / "model.safetensors")
  assert_same(load_arrays(tmp_path, cfg), arrays)
  save_file(published_arrays(arrays, "transformer.", transposed=False), tmp_path / "model.safetensors")
  assert_same(load_arrays(tmp_path, cfg), arrays)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_vision_model_is_read(tmp_path, prefix):
  arrays = random_arrays()
  seen = {"vision_tower.embed.weight": np.ones(3, np.float32), "multi_modal_projector.w": np.ones(3, np.float32)}
  save_file(published_arrays(arrays, prefix) | seen, tmp_path / "model.safetensors")
  assert_same(load_arrays(tmp_path), arrays)


def test_a_tied_head_may_be_in_the_file(tmp_path):
  cfg = replace(LLAMA, arch=replace(LLAMA.arch, tied=True))
  arrays = random_arrays(cfg)
  head = {"lm_head.weight": arrays["embed_tokens.embedding"]}
  save_file(published_arrays(arrays) | head, tmp_path / "model.safetensors")
  assert_same(load_arrays(tmp_path, cfg), arrays)


def test_saved_arrays_are_loaded(tmp_path):
  """Under its own names, with which families that nobody publishes are loaded too."""
  arrays = random_arrays()
  tree: dict = {}
  for path, x in arrays.items():
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = x
  store.save(tmp_path, tree)
  assert_same(load_arrays(tmp_path), arrays)


def test_only_the_rows_of_a_shard_are_read(tmp_path, monkeypatch):
  x = np.arange(4000, dtype=np.float32).reshape(100, 40)
  save_file({"x": x}, tmp_path / "model.safetensors")
  read = []
  fill = safetensors_reader._fill
  monkeypatch.setattr(safetensors_reader, "_fill", lambda view, *rest: (read.append(len(view)), fill(view, *rest)))
  monkeypatch.setattr(safetensors_reader, "BLOCK", 160 * 10)
  out = np.zeros((30, 5), np.float32)
  open_safetensors(tmp_path).read("x", [((slice(50, 80), slice(10, 15)), out)])
  assert (out == x[50:80, 10:15]).all() and sum(read) == 30 * 160


def test_model_hf_follows_config_json_and_what_is_typed(tmp_path):
  source = write_checkpoint(tmp_path / "weights")
  typed = ["model.tokenizer=bytes", "model.param_dtype=bfloat16", "model.arch.rope_theta=500", "mesh.data=1"]
  [cfg] = check_command_line(["model=hf", f"model.weights={source}", *typed]).jobs
  names = ("family", "layers", "width", "heads", "ff", "max_len", "vocab_size")
  sizes = {name: vars(cfg.model)[name] for name in names}
  assert sizes == {name: vars(LLAMA)[name] for name in sizes}
  assert cfg.model.arch == replace(LLAMA.arch, rope_theta=500.0)
  assert (cfg.model.param_dtype, cfg.model.base, cfg.data.seq_len) == ("bfloat16", "weights", 64)
  base, facts = make_base(make_plan(cfg))
  assert_same(flatten(base), {path: x.astype(ml_dtypes.bfloat16) for path, x in random_arrays().items()})
  assert (facts["kind"], facts["source"], len(facts["digest"])) == ("weights", str(source), 64)
