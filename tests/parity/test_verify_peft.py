"""`task=verify` with PEFT finds each of twelve planted faults, and none in files that are right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import quickly
from safetensors.numpy import load_file, save_file
from served_runs import chat_base, chat_run

from lora_exp.cli import main as entry

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
  """An exported adapter of every linear module, alpha 8 at rank 4."""
  at = tmp_path_factory.mktemp("served")
  with quickly():
    run = chat_run(at, "lora.alpha=8")
    assert entry.run(["task=export", f"run={run}", f"out={at / 'peft'}"]) == 0
  return at / "peft"


def verified(directory: Path, capfd, *settings: str) -> tuple[int, str]:
  """(exit code, text) of task=verify."""
  capfd.readouterr()
  code = entry.run(["task=verify", f"verify.adapter={directory}", *settings])
  said = capfd.readouterr()
  return code, " ".join((said.out + said.err).split())


def change_config(**changes: Any) -> Callable[[Path], None]:
  def change(directory: Path) -> None:
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(config))

  return change


def change_tensors(edit: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Path], None]:
  def change(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    edited = {name: np.ascontiguousarray(edit(name, x)) for name, x in load_file(file).items()}
    save_file(edited, file, {"format": "pt"})

  return change


def zero_b(name: str, x: np.ndarray) -> np.ndarray:
  return x * 0 if "lora_B" in name else x


def zero_layers(*layers: int) -> Callable[[str, np.ndarray], np.ndarray]:
  return lambda name, x: zero_b(name, x) if any(f"layers.{n}." in name for n in layers) else x


def zero_attention(name: str, x: np.ndarray) -> np.ndarray:
  return zero_b(name, x) if "self_attn" in name else x


def shuffled(name: str, x: np.ndarray) -> np.ndarray:
  return x[np.random.default_rng(0).permutation(len(x))] if "lora_B" in name else x


def other_template(directory: Path) -> None:
  for file in directory.glob("chat_template*"):
    file.unlink()
  file = directory / "tokenizer_config.json"
  template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


FAULTS = {  # what is planted: (how, the kind that is named, words of the sentence)
  "not applied": (change_tensors(zero_b), "not applied", "the adapter is not applied"),
  "alpha twice as large": (change_config(lora_alpha=16), "scale", "multiplied by about 2:"),
  "alpha half as large": (change_config(lora_alpha=4), "scale", "multiplied by about 0.5:"),
  "alpha a tenth smaller": (change_config(lora_alpha=7.2), "scale", "multiplied by about 0.9:"),
  "rslora": (change_config(use_rslora=True), "scale", "multiplied by about 2:"),
  "alpha three times as large": (change_config(lora_alpha=24), "scale", "multiplied by about 3:"),
  "sign": (change_config(lora_alpha=-8), "scale", "multiplied by about -1:"),
  "first half": (change_tensors(zero_layers(0, 1)), "missing", "the first half of the layers is missing"),
  "second half": (change_tensors(zero_layers(2, 3)), "missing", "the second half of the layers is missing"),
  "attention": (change_tensors(zero_attention), "missing", "the adapter of self_attn is missing"),
  "order of rows": (change_tensors(shuffled), "adapter", "the adapter's values differ"),
  "template": (other_template, "template", "another chat template"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_named(exported, tmp_path, capfd, name):
  plant, kind, words = FAULTS[name]
  shutil.copytree(exported, tmp_path / "copy")
  plant(tmp_path / "copy")
  code, said = verified(tmp_path / "copy", capfd)
  assert code == 1 and f"wrong ({kind})" in said and words in said, said


def test_another_base_is_named(exported, tmp_path, capfd):
  code, said = verified(exported, capfd, f"verify.model={chat_base(tmp_path / 'other', seed=1)}")
  assert code == 1 and "wrong (base)" in said and "without the adapter, its log-probabilities differ" in said, said


def test_right_adapter_has_no_fault(exported, capfd):
  code, said = verified(exported, capfd)
  assert code == 0 and "the server computes the adapted model" in said, said


def test_merged_model_has_no_fault(exported, capfd):
  run = exported.parent / "run"
  assert entry.run(["task=export", f"run={run}", "format=merged", f"out={exported.parent / 'merged'}"]) == 0
  code, said = verified(exported, capfd, "verify.backend=transformers", f"verify.model={exported.parent / 'merged'}")
  assert code == 0, said


@pytest.mark.slow
def test_converted_dora_is_plain_lora(tmp_path, capfd):
  run = chat_run(tmp_path, "lora=dora", "lora.targets=qv")
  assert entry.run(["task=export", f"run={run}", f"out={tmp_path / 'peft'}"]) == 0
  assert "export.rank=8 converts it" in " ".join(capfd.readouterr().err.split())
  assert entry.run(["task=export", f"run={run}", "export.rank=64", f"out={tmp_path / 'plain'}"]) == 0
  said = " ".join(capfd.readouterr().out.split())
  assert "Plain LoRA of rank 64, converted from dora" in said and "KL divergence from the original" in said
  config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
  assert config["r"] == 64 and not config.get("use_dora")
  cards = [json.loads((tmp_path / name / "answers.json").read_text())["logprobs"] for name in ("peft", "plain")]
  for mine, other in zip(cards[0]["adapted"], cards[1]["adapted"], strict=True):
    np.testing.assert_allclose(mine, other, atol=1e-3)  # at the full rank nothing is lost
  code, said = verified(tmp_path / "plain", capfd)
  assert code == 0, said
