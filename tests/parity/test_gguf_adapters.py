"""GGUF files that are written: adapter, base and merged model agree, and llama.cpp computes the run's answers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from packs import quickly
from safetensors.numpy import load_file
from served_runs import chat_run

from lora_exp.cli import main as entry

pytest.importorskip("xllamacpp")


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
  """A directory with an exported adapter of two ranks and scales, its base and the merged model in float32."""
  at = tmp_path_factory.mktemp("gguf")
  with quickly():
    run = chat_run(at, "lora.alpha=8", "lora.rank_pattern={q_proj: 2}", "lora.alpha_pattern={down_proj: 3}")
    for format in ("gguf", "gguf_base", "gguf_merged", "mlx"):
      words = [f"format={format}", "export.gguf_type=f32", f"out={at / format}", f"export.answers={format == 'gguf'}"]
      assert entry.run(["task=export", f"run={run}", *words]) == 0
    assert entry.run(["task=export", f"run={run}", "format=merged", f"out={at / 'merged'}"]) == 0
  return at


def tensors(file: Path) -> dict[str, np.ndarray]:
  return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def test_base_plus_adapter_is_the_merged_model(served):
  reader = gguf.GGUFReader(served / "gguf/adapter.gguf")
  alpha = float(reader.fields["adapter.lora.alpha"].contents())
  assert reader.fields["general.type"].contents() == "adapter" and reader.fields["adapter.type"].contents() == "lora"
  assert reader.fields["general.architecture"].contents() == "llama"
  adapter = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
  base, merged = tensors(served / "gguf_base/model.gguf"), tensors(served / "gguf_merged/model.gguf")
  adapted = {name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")}
  assert len(adapted) == 28 and base.keys() == merged.keys() and alpha == 4 * 2
  for name, kernel in base.items():
    if name in adapted:
      a_RI, b_OR = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
      assert len(a_RI) == (2 if "attn_q" in name else 4)
      kernel = kernel + alpha / len(a_RI) * b_OR @ a_RI
    np.testing.assert_allclose(merged[name], kernel, atol=2e-6, err_msg=name)


def test_mlx_layout_holds_the_same_update(served):
  config = json.loads((served / "mlx/adapter_config.json").read_text())
  parameters, arrays = config["lora_parameters"], load_file(served / "mlx/adapters.safetensors")
  assert (config["fine_tune_type"], config["num_layers"], parameters["rank"]) == ("lora", 4, 4)
  base, merged = (load_file(at / "model.safetensors") for at in (served / "base", served / "merged"))
  assert len(arrays) == 2 * 28 and {"self_attn.q_proj", "mlp.down_proj"} < set(parameters["keys"])
  for name in (name.removesuffix(".lora_a") for name in arrays if name.endswith(".lora_a")):
    update_IO = parameters["scale"] * arrays[f"{name}.lora_a"] @ arrays[f"{name}.lora_b"]
    np.testing.assert_allclose(base[f"{name}.weight"] + update_IO.T, merged[f"{name}.weight"], atol=2e-6, err_msg=name)


def verified(directory: Path, capfd, *settings: str) -> tuple[int, str]:
  """(exit code, text) of task=verify with llama.cpp."""
  capfd.readouterr()
  code = entry.run(["task=verify", f"verify.adapter={directory}", "verify.backend=llama_cpp", *settings])
  said = capfd.readouterr()
  return code, " ".join((said.out + said.err).split())


def test_llama_cpp_computes_the_run(served, capfd):
  code, said = verified(served / "gguf", capfd, f"verify.model={served / 'gguf_base/model.gguf'}")
  assert code == 0 and "the server computes the adapted model" in said, said
  (served / "gguf_merged/answers.json").write_bytes((served / "gguf/answers.json").read_bytes())
  code, said = verified(served / "gguf_merged", capfd)
  assert code == 0, said


def test_llama_cpp_without_the_adapter_is_named(served, tmp_path, capfd):
  (tmp_path / "answers.json").write_bytes((served / "gguf/answers.json").read_bytes())
  code, said = verified(tmp_path, capfd, f"verify.model={served / 'gguf_base/model.gguf'}")
  assert code == 1 and "the adapter is not applied" in said, said


def test_modelfile_holds_the_template(served):
  content = (served / "gguf/Modelfile").read_text()
  assert content.startswith("FROM ./model.gguf\nADAPTER ./adapter.gguf\n")
  assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n' in content
  assert 'PARAMETER stop "<|im_end|>"' in content


def test_files_can_be_read_by_all_that_the_umask_allows(served):
  card = (served / "gguf/README.md").read_text()
  assert card.startswith("---\nlibrary_name: llama.cpp\n") and "| rank | 2, 4 |" in card
  files = [*(served / "gguf").iterdir(), *(served / "run/adapter").iterdir()]
  assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
  assert json.loads((served / "gguf/answers.json").read_text())["chat"] is True
