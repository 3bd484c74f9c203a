"""The table of tensor names in both directions: one to one, one stored for several of ours, several for one."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lora_exp.config import ArchConfig, InputError, MeshConfig, ModelConfig
from lora_exp.models.factory import abstract_model
from lora_exp.models.registry import get_family
from lora_exp.models.tensor_names import NameRow, StoredNames
from lora_exp.models.weights import store
from lora_exp.models.weights.hf_writer import save_hf
from lora_exp.runtime.mesh import Layout, flatten, make_mesh

ARCH = ArchConfig(kv_heads=2, head_dim=6, tied=False, qkv_bias=True)
SIZES = {"layers": 2, "width": 20, "heads": 4, "ff": 28, "max_len": 16, "vocab_size": 31, "arch": ARCH}
CFG = ModelConfig(family="phi3", **SIZES)


def qkv_sizes(model: ModelConfig) -> tuple[int, int, int]:
  """Outputs of queries, keys and values."""
  arch = model.arch or ArchConfig()
  return model.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim


def gate_up_sizes(model: ModelConfig) -> tuple[int, int]:
  """Outputs of gates and features."""
  return model.ff, model.ff


SPLIT = (  # Phi-3 as some tools store it: with Llama's names
  NameRow(("self_attn.qkv_proj",), tuple(f"self_attn.{name}_proj" for name in "qkv"), qkv_sizes),
  NameRow(("mlp.gate_up_proj",), ("mlp.gate_proj", "mlp.up_proj"), gate_up_sizes),
)
FUSED = (  # Llama as Phi-3 stores it
  NameRow(tuple(f"self_attn.{name}_proj" for name in "qkv"), ("self_attn.qkv_proj",)),
  NameRow(("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
)


def random_arrays(cfg: ModelConfig) -> dict[str, np.ndarray]:
  shapes = flatten(nnx.to_pure_dict(nnx.state(abstract_model(cfg, 0), nnx.Param)))
  rng = np.random.default_rng(0)
  return {path: rng.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}


def names_of(cfg: ModelConfig, rows: tuple[NameRow, ...]) -> StoredNames:
  names = get_family(cfg.family).stored_names(cfg)
  assert names.names is not None
  return replace(names, names=replace(names.names, rows=rows))


def load(source, cfg: ModelConfig, names: StoredNames, mesh: MeshConfig | None = None) -> dict[str, np.ndarray]:
  abstract = nnx.to_pure_dict(nnx.state(abstract_model(cfg, 0), nnx.Param))
  family = get_family(cfg.family)
  layout = Layout(make_mesh(mesh or MeshConfig()), family.axes, family.units(cfg))
  arrays = flatten(store.load(source, abstract, layout.shardings(abstract), names))
  return {path: np.asarray(x) for path, x in arrays.items()}


@pytest.mark.parametrize(("family", "rows"), [("phi3", ()), ("phi3", SPLIT), ("llama", ()), ("llama", FUSED)])
def test_what_a_table_writes_it_reads_bit_for_bit(tmp_path, family, rows):
  cfg = replace(CFG, family=family)
  arrays = random_arrays(cfg)
  save_hf(tmp_path, arrays, "float32", names_of(cfg, rows), largest=4000)  # in several files
  assert len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())) > 2
  found = load(tmp_path, cfg, names_of(cfg, rows))
  assert found.keys() == arrays.keys()
  for path, x in found.items():
    np.testing.assert_array_equal(x, arrays[path], err_msg=path)


def test_fused_and_split_tables_are_inverse(tmp_path):
  """Phi-3 written split is a Llama, and Llama written fused is a Phi-3: the same files."""
  phi3, llama = CFG, replace(CFG, family="llama")
  (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
  save_hf(tmp_path / "a", random_arrays(phi3), "float32", names_of(phi3, SPLIT))
  split = load(tmp_path / "a", llama, names_of(llama, ()))
  save_hf(tmp_path / "b", split, "float32", names_of(llama, FUSED))
  fused = load(tmp_path / "b", phi3, names_of(phi3, ()))
  for path, x in random_arrays(phi3).items():
    np.testing.assert_array_equal(fused[path], x, err_msg=path)
  stored = load_file(tmp_path / "b" / "model.safetensors")
  assert stored["model.layers.0.self_attn.qkv_proj.weight"].shape == (48, 20)
  assert stored["model.layers.0.self_attn.qkv_proj.bias"].shape == (48,)


def test_a_part_of_the_wrong_size_is_reported(tmp_path):
  """Sizes come from the settings and not from the file: parts that only add up are refused."""
  other = replace(CFG, heads=2, arch=replace(ARCH, kv_heads=3))  # 12 + 18 + 18 outputs instead of 24 + 12 + 12
  save_hf(tmp_path, random_arrays(CFG), "float32", names_of(other, SPLIT))
  with pytest.raises(InputError) as error:
    load(tmp_path, CFG, names_of(CFG, SPLIT))
  name = "model.layers.0.self_attn.q_proj.weight"
  assert f"{tmp_path}: {name} is (12, 20), the model's is (24, 20)" in error.value.problems


def test_a_row_names_one_module_on_one_side():
  with pytest.raises(ValueError, match="one side names one module"):
    NameRow(("a", "b"), ("c", "d"), gate_up_sizes)
  with pytest.raises(ValueError, match="need their sizes"):
    NameRow(("a",), ("c", "d"))
