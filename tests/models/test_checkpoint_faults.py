"""All faults of a checkpoint are reported at once, and no code in it is run."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, load_arrays, published_arrays, random_arrays, write_checkpoint, write_shards
from runs import QUIET, on_stories
from safetensors.numpy import load_file, save_file

from lora_exp.cli import main as entry
from lora_exp.config import InputError
from lora_exp.models.weights import locate


def faulty_checkpoint(name: str, at: Path) -> Path:
  """A checkpoint with one fault."""
  arrays = published_arrays(random_arrays())
  if name in ("truncated", "header", "empty"):
    file = write_checkpoint(at) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-1], "header": whole[:50], "empty": b""}[name])
  elif name in ("missing shard", "truncated shard", "index"):
    file = write_shards(at, arrays) / "model-00002-of-00003.safetensors"
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
    write_checkpoint(at, arrays | {"model.extra.weight": np.ones(3, np.float32)})
  elif name == "sizes":
    write_checkpoint(at, hidden_size=40, intermediate_size=56)
  elif name == "layers":
    write_checkpoint(at, arrays | {"model.extra.weight": np.ones(3, np.float32)}, num_hidden_layers=1)
  elif name == "architecture":
    write_checkpoint(at, architectures=["PhiForCausalLM"])
  elif name == "fields":
    scaling = {"rope_type": "axial", "factor": 4.0}
    write_checkpoint(at, rope_scaling=scaling, hidden_act="quick_gelu", num_hidden_layers="2")
  elif name == "json":
    (write_checkpoint(at) / "config.json").write_text("{")
  elif name == "no config":
    (write_checkpoint(at) / "config.json").unlink()
  elif name == "pickle":
    at.mkdir(exist_ok=True)
    (at / "config.json").write_text(json.dumps(CONFIG))
    (at / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(at / "exploded"))))
  elif name == "adapter":
    (write_checkpoint(at) / "model.safetensors").rename(at / "adapter_model.safetensors")
    (at / "adapter_config.json").write_text("{}")
  elif name == "nothing":
    (write_checkpoint(at) / "model.safetensors").unlink()
  return at


class Bomb:
  """An object whose pickle creates a file when it is loaded."""

  def __init__(self, path: str):
    self.path = path

  def __reduce__(self):
    return open, (self.path, "w")


FAULTS = {
  "truncated": [r"is not a complete safetensors file: it has [\d,]+ of [\d,]+ bytes; download it again"],
  "header": ["model.safetensors is not a complete safetensors file: "
             r"its header claims [\d,]+ bytes, the file has 50; download it again"],
  "empty": ["model.safetensors is not a complete safetensors file"],
  "missing shard": ["model-00002-of-00003.safetensors is missing"],
  "truncated shard": ["model-00002-of-00003.safetensors is not a complete safetensors file"],
  "index": ["model-00002-of-00003.safetensors: model.norm.weight is missing, although .*index.json lists it"],
  "tensors": [r"up_proj.weight is \(48, 31\), the model's is \(48, 32\)", r"down_proj.weight has dtype I32",
              "model.norm.weight is missing", "model.extra.weight is not in the model"],
  "layers": ["it has 2 layers, but model.layers=1; correct num_hidden_layers in its config.json",
             "model.extra.weight is not in the model"],
  "architecture": ["config.json: architectures=PhiForCausalLM: not supported; choose Gemma.*Phi3ForCausalLM"],
  "fields": ["config.json: num_hidden_layers=\"2\": must be a whole number from 1 to 10,000",
             "config.json: hidden_act=quick_gelu: not supported; choose",
             "config.json: rope_scaling.rope_type=axial: not supported; choose default, linear, llama3, yarn"],
  "json": ["config.json: cannot be read as JSON"],
  "no config": ["there is no .*config.json, and model=hf reads the model from it"],
  "pickle": ["pytorch_model.bin is a pickle, .*save_pretrained"],
  "adapter": ["contains an adapter, not a base"],
  "nothing": ["there is no model.safetensors"],
}


@pytest.mark.parametrize("fault", [*FAULTS, "sizes"])
def test_all_faults_of_a_checkpoint_are_reported_at_once(tmp_path, capfd, fault):
  """Through the command line: exit code 2, a line for each problem, no traceback, no run directory left."""
  source = faulty_checkpoint(fault, tmp_path / "weights")
  argv = ["model=hf", f"model.weights={source}", "model.tokenizer=bytes", *QUIET, *on_stories(tmp_path),
          f"hydra.run.dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "train.steps=1"]
  assert entry.run(argv) == 2
  errors_shown = capfd.readouterr().err
  errors = [line for line in errors_shown.splitlines() if line.startswith("error: ")]
  assert "Traceback" not in errors_shown and not (tmp_path / "run").exists()
  if fault == "sizes":
    assert len(errors) > 15 and "embed_tokens.weight is (263, 32), the model's is (263, 40)" in errors_shown
    return
  assert len(errors) == len(FAULTS[fault])
  for pattern, line in zip(FAULTS[fault], errors, strict=True):
    assert re.search(pattern, line), errors_shown
  assert not (source / "exploded").exists()


def test_a_pickle_is_not_opened(tmp_path):
  for name in ("weights.ckpt", "model.pt", "without_a_suffix"):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    assert "pickle" in str(locate.weights_problem(str(tmp_path / name)))
    with pytest.raises(InputError, match="pickle"):
      load_arrays(tmp_path / name)
  assert not (tmp_path / "exploded").exists()


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path):
  for padding in range(256):  # the length's first byte takes every multiple of 8
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "m.safetensors", metadata={"note": "n" * padding})
    if (tmp_path / "m.safetensors").read_bytes()[0] == 0x80:
      break
  assert (tmp_path / "m.safetensors").read_bytes()[0] == 0x80
  assert locate.checkpoint_format(tmp_path / "m.safetensors") == "safetensors"
  (tmp_path / "m.safetensors").write_bytes(pickle.dumps([1, 2, 3], protocol=4))
  with pytest.raises(InputError, match="pickle"):
    locate.checkpoint_format(tmp_path / "m.safetensors")


def test_weights_that_are_not_finite_are_named(tmp_path, capfd):
  arrays = {name: np.full_like(x, np.nan) for name, x in published_arrays(random_arrays()).items()}
  source = write_checkpoint(tmp_path / "weights", arrays)
  argv = ["model=hf", f"model.weights={source}", "model.tokenizer=bytes", *QUIET, *on_stories(tmp_path),
          f"hydra.run.dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "train.steps=1"]
  assert entry.run(argv) == 2 and entry.run(["task=evaluate", "lora=frozen", *argv]) == 2
  assert capfd.readouterr().err.count("29 tensors have NaN or infinite values, such as model.embed_tokens") == 2
