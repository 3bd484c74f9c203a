"""The instructions for adding a family work: their example, one new file, is built, loaded, exported and checked."""

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lora_exp.config import ArchConfig, InputError, MeshConfig, ModelConfig
from lora_exp.models import families, hf_config, hf_export, registry
from lora_exp.models.config_table import Number
from lora_exp.models.factory import abstract_model, build_model
from lora_exp.models.hf_config import from_hf, resolve_architecture
from lora_exp.models.hf_export import to_hf
from lora_exp.models.registry import all_families, get_family, model_problems
from lora_exp.models.weights import store
from lora_exp.models.weights.hf_writer import save_hf
from lora_exp.runtime.mesh import Layout, flatten, make_mesh

CONFIG = {
  "model_type": "acme", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
  "intermediate_size": 48, "vocab_size": 97, "logit_cap": 9.0, "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.fixture
def acme(tmp_path, monkeypatch):
  """The example of the page as a file of the folder."""
  assert families.__doc__ is not None
  code = families.__doc__.split("another name for a norm:\n")[1].split("\n2. ")[0]
  (tmp_path / "families").mkdir()
  (tmp_path / "families" / "acme.py").write_text(textwrap.dedent(code))
  monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
  all_families.cache_clear()
  yield
  all_families.cache_clear()
  sys.modules.pop("lora_exp.models.families.acme", None)


def acme_model() -> ModelConfig:
  fields = from_hf(CONFIG)
  return ModelConfig(dropout=0.0, **(fields | {"arch": ArchConfig(**fields["arch"])}))


def loaded(source: Path, cfg: ModelConfig) -> dict[str, np.ndarray]:
  """The arrays of the checkpoint `source`, by our paths."""
  family = get_family(cfg.family)
  abstract = nnx.to_pure_dict(nnx.state(abstract_model(cfg, 0), nnx.Param))
  layout = Layout(make_mesh(MeshConfig()), family.axes, family.units(cfg))
  arrays = flatten(store.load(source, abstract, layout.shardings(abstract), family.stored_names(cfg)))
  return {path: np.asarray(x) for path, x in arrays.items()}


def test_the_example_reads_its_config_and_builds(acme, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  save_file({}, tmp_path / "model.safetensors")
  cfg = acme_model()
  assert resolve_architecture(str(tmp_path)) == {
    "family": "acme", "layers": 2, "width": 32, "heads": 4, "ff": 48, "max_len": 4096, "vocab_size": 97,
    "arch": asdict(ArchConfig(kv_heads=2, head_dim=8, norm_eps=1e-6, tied=False, logit_softcap=9.0)),
  }  # fmt: skip
  model = build_model(cfg, 0)
  logits = model(np.arange(6, dtype=np.int32)[None])
  assert logits.shape == (1, 6, 97) and np.abs(logits).max() < 9
  config = to_hf(cfg, 97)
  assert config is not None and config["logit_cap"] == 9.0 and config["model_type"] == "acme"


def test_the_example_stores_three_kernels_as_one(acme, tmp_path):
  cfg = acme_model()
  arrays = flatten(nnx.to_pure_dict(nnx.state(build_model(cfg, 0), nnx.Param)))
  rng = np.random.default_rng(0)
  arrays = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in arrays.items()}
  save_hf(tmp_path, arrays, "float32", get_family("acme").stored_names(cfg))
  stored = load_file(tmp_path / "model.safetensors")
  fused = stored["model.layers.1.self_attn.W_pack.weight"]
  kernels = [arrays[f"layers.1.self_attn.{name}_proj.kernel"] for name in "qkv"]
  np.testing.assert_array_equal(fused, np.concatenate(kernels, axis=1).T)
  norm = stored["model.layers.0.attention_norm.weight"]
  np.testing.assert_array_equal(norm, arrays["layers.0.input_layernorm.scale"])
  assert not any("q_proj" in name or "input_layernorm" in name for name in stored)
  found = loaded(tmp_path, cfg)
  assert found.keys() == arrays.keys()
  for path, x in found.items():
    np.testing.assert_array_equal(x, arrays[path], err_msg=path)


def test_a_setting_of_one_family_alone_is_an_option(acme, monkeypatch):
  """`model.arch.options` holds it, in both directions."""
  family = get_family("acme")
  assert family.config is not None
  row = Number("arch.options.residual_scale", "residual_multiplier")
  changed = replace(family, config=replace(family.config, fields=(*family.config.fields, row)))
  monkeypatch.setattr(registry, "all_families", lambda: {"acme": changed})
  monkeypatch.setattr(hf_config, "all_families", lambda: {"acme": changed})
  monkeypatch.setattr(hf_export, "all_families", lambda: {"acme": changed})
  fields = from_hf(CONFIG | {"residual_multiplier": 0.5})
  assert fields["arch"]["options"] == {"residual_scale": 0.5}
  config = to_hf(ModelConfig(**(fields | {"arch": ArchConfig(**fields["arch"])})), 97)
  assert config is not None and config["residual_multiplier"] == 0.5


def test_a_wrong_fused_tensor_is_reported_once(acme, tmp_path):
  cfg = acme_model()
  arrays = flatten(nnx.to_pure_dict(nnx.state(build_model(cfg, 0), nnx.Param)))
  save_hf(tmp_path, arrays, "float32", get_family("acme").stored_names(cfg))
  stored = load_file(tmp_path / "model.safetensors")
  stored["model.layers.1.self_attn.W_pack.weight"] = np.zeros((63, 32), np.float32)
  save_file(stored, tmp_path / "model.safetensors")
  with pytest.raises(InputError) as error:
    loaded(tmp_path, cfg)
  name = "model.layers.1.self_attn.W_pack.weight"
  assert error.value.problems == [f"{tmp_path}: {name} is (63, 32), the model's is (64, 32)"]


def test_the_families_are_the_files_of_the_folder():
  files = {path.stem for path in Path(families.__path__[0]).glob("*.py")} - {"__init__"}
  assert all_families().keys() == files
  for family in all_families().values():
    assert issubclass(family.module_class(), nnx.Module)


def test_an_unknown_family_is_refused_with_its_neighbour():
  [problem] = model_problems(ModelConfig(family="mistrall"))
  assert problem.startswith("model.family=mistrall: choose gemma, ") and problem.endswith("did you mean mistral?")


@pytest.mark.parametrize(("family", "settings", "problem"), [
  ("gpt2", {"heads": 3}, "model.heads=3: must divide model.width=256"),
  ("llama", {"heads": 3}, "model.arch.kv_heads=2: must divide model.heads=3"),
  ("qwen3", {"activation": "gleu"}, "model.arch.activation=gleu: choose gelu, gelu_tanh, relu, silu"),
  ("phi3", {"partial_rotary_factor": 0.35}, "model.arch.partial_rotary_factor=0.35: must rotate an even number"),
  ("gemma", {"rope_scaling": {"rope_type": "axial"}}, "model.arch.rope_scaling.rope_type=axial: choose default, "),
  ("llama", {"rope_scaling": {"rope_type": "linear"}}, "model.arch.rope_scaling.factor=null: rope_type=linear needs"),
])  # fmt: skip
def test_settings_that_the_module_cannot_compute(family, settings, problem):
  sizes = {"heads": settings.pop("heads", 8)}
  model = ModelConfig(family=family, **sizes, arch=ArchConfig(**{"kv_heads": 2, **settings}))
  [found] = model_problems(model)
  assert found.startswith(problem)


def test_reading_config_json_imports_no_jax():
  script = ("import sys, lora_exp.models.weights.locate, lora_exp.models.hf_config, lora_exp.models.hf_export as h; "
            "h.all_families(); print([m for m in ('jax', 'flax', 'optax', 'orbax') if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done.stdout + done.stderr
