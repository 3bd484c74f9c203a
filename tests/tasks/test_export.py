"""`task=merge` and `task=export`: a merge is checked, and nothing is written if it fails."""

import errno
import json
from dataclasses import asdict
from pathlib import Path

import jax
import pytest
import yaml
from checkpoints import published_arrays, random_arrays, write_checkpoint
from packs import quickly
from runs import QUIET, TINY, everything, on_stories, train
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import Config, InputError
from lora_exp.lora.methods.lora import LoRA
from lora_exp.train.merging import model_directory

FEW = ["train.steps=3", "optim.lr=0.05", "optim.warmup=0", "train.eval_every=0", "train.save_every=0",
       "train.export=last", "train.batch_size=4", "data.seq_len=32"]


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
  """A run on a published Llama with a tied table, which is adapted with every kernel."""
  at = tmp_path_factory.mktemp("llama")
  arrays = {name: x * 0.2 for name, x in published_arrays(random_arrays()).items() if name != "lm_head.weight"}
  base = write_checkpoint(at / "base", arrays, tie_word_embeddings=True)
  (base / "tokenizer_config.json").write_text("{}")
  (base / "generation_config.json").write_text('{"eos_token_id": 256}')
  model = ["model=hf", "model.tokenizer=bytes", f"model.weights={base}", *QUIET, *on_stories(at)]
  with quickly():
    return train(at / "run", *model, *FEW, "lora.targets=[all_linear,embeddings]", "lora.bias=lora_only")


@pytest.fixture(scope="module")
def minigpt(tmp_path_factory) -> Path:
  """A run on a model that is of no family that others publish."""
  at = tmp_path_factory.mktemp("minigpt")
  with quickly():
    return train(at / "run", *TINY, *on_stories(at), *FEW)


def scores(capfd, *argv: str) -> list[str]:
  """The columns that task=evaluate prints: of the base, and of the run if there is one, each with its name first."""
  capfd.readouterr()
  assert entry.run(["task=evaluate", *argv]) == 0
  lines = capfd.readouterr().out.partition("Trained against base")[0].splitlines()
  models = next(line.split()[2:] for line in lines if line.startswith("data "))
  rows = [line.split()[-len(models) :] for line in lines if line.startswith("held-out")]
  return [[model, *(row[n] for row in rows)] for n, model in enumerate(models)]


# ---- a merged model


def test_merged_model_predicts_what_the_run_does(llama, tmp_path, capfd):
  out = tmp_path / "merged"
  assert entry.run(["task=merge", f"run={llama}", f"out={out}"]) == 0
  said = capfd.readouterr().out
  assert "largest difference of a logit" in said and "100.00%" in said
  source = load_file(llama.parent / "base/model.safetensors")
  found = load_file(out / "model.safetensors")
  assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (x.shape, x.dtype) for n, x in source.items()}
  changed = {name for name in found if (found[name] != source[name]).any()}
  assert changed == {name for name in found if "norm" not in name}
  [_, run] = scores(capfd, f"run={llama}")
  data = on_stories(llama.parent)
  settings = ["model=hf", "model.tokenizer=bytes", f"model.weights={out}", *QUIET, *data, "data.seq_len=32"]
  [alone] = scores(capfd, *settings)
  assert run[1:] == alone[1:] and run[0] == "lora"
  facts = json.loads((out / "lora_exp.json").read_text())  # what the check found stays with the model
  assert (facts["run"], facts["method"], facts["check"]["dtype"]) == (str(llama), "lora", "float32")
  assert facts["check"]["logit"] < 1e-4 and facts["check"]["changed"] == 0 and facts["check"]["count"] > 500
  card = (out / "README.md").read_text()  # and what a server should answer
  assert "base_model" not in card and "held-out loss, adapted (all documents)" in card
  assert json.loads((out / "answers.json").read_text())["prompts"]


def test_bfloat16_merge_shows_the_share_of_the_update(llama, tmp_path, capfd):
  out = tmp_path / "merged"
  assert entry.run(["task=export", "format=merged", f"run={llama}", f"out={out}", "merge.dtype=bfloat16"]) == 0
  check = json.loads((out / "lora_exp.json").read_text())["check"]
  assert 0.9 < check["update_kept"] < 1.1 and 1e-3 < check["update_error"] < 0.5
  assert f"{check['update_kept']:.2%}" in capfd.readouterr().out
  assert {x.dtype.name for x in load_file(out / "model.safetensors").values()} == {"bfloat16"}
  assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_merge_beyond_the_bound_writes_nothing(llama, capfd):
  before = everything(llama)
  assert entry.run(["task=merge", f"run={llama}", "merge.bound=0"]) == 1
  said = capfd.readouterr()
  assert "largest difference of a logit" in said.out and "merging changes a logit by" in said.err
  assert everything(llama) == before


WRONG = {
  "scale": lambda self, w, leaves, scale: w + self.delta(w, leaves, 1.02 * scale),
  "nan": lambda self, w, leaves, scale: w * float("nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_merge_is_found(llama, monkeypatch, capfd, name):
  jax.clear_caches()
  monkeypatch.setattr(LoRA, "adapted", WRONG[name])
  before = everything(llama)
  assert entry.run(["task=merge", f"run={llama}"]) == 1
  said = capfd.readouterr().err.replace("\n", " ")
  assert "not finite" in said if name == "nan" else "merging changes a logit by" in said
  assert everything(llama) == before
  jax.clear_caches()


# ---- the base, the adapter


def test_exported_base_is_the_base_of_the_run(llama, tmp_path):
  assert entry.run(["task=export", "format=base", f"run={llama}", f"out={tmp_path / 'base'}"]) == 0
  source = llama.parent / "base"
  want, found = (load_file(place / "model.safetensors") for place in (source, tmp_path / "base"))
  assert want.keys() == found.keys() and all((want[name] == found[name]).all() for name in want)
  config = json.loads((tmp_path / "base/config.json").read_text())
  assert config == json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32"}
  assert json.loads((tmp_path / "base/generation_config.json").read_text()) == {"eos_token_id": 256}
  assert Tokenizer.from_file(str(tmp_path / "base/tokenizer.json")).encode("ab").ids == [97, 98]


def test_exported_adapter_names_its_base(llama, tmp_path, capfd):
  assert entry.run(["task=export", f"run={llama}", f"out={tmp_path / 'one'}"]) == 0
  source, found = (load_file(place / "adapter_model.safetensors") for place in (llama / "adapter", tmp_path / "one"))
  assert source.keys() == found.keys() and all((source[name] == found[name]).all() for name in source)
  config = lambda at: json.loads((at / "adapter_config.json").read_text())
  assert config(tmp_path / "one") == config(llama / "adapter")
  assert config(tmp_path / "one")["base_model_name_or_path"] == str(llama.parent / "base")


@pytest.mark.slow
def test_model_unknown_to_transformers_keeps_our_names(minigpt, tmp_path, capfd):
  merged, adapter = tmp_path / "merged", tmp_path / "adapter"
  assert entry.run(["task=merge", f"run={minigpt}", f"out={merged}"]) == 0
  assert "transformers has no such model (model.family=minigpt)" in capfd.readouterr().err.replace("\n", " ")
  assert not (merged / "config.json").exists()
  [_, run] = scores(capfd, f"run={minigpt}")
  data = on_stories(minigpt.parent)
  [alone] = scores(capfd, *TINY, *data, f"model.weights={merged}", "data.seq_len=32")
  assert run[1:] == alone[1:]
  assert entry.run(["task=export", f"run={minigpt}", f"out={adapter}"]) == 0
  assert "PEFT does not support this kind of model" in capfd.readouterr().err.replace("\n", " ")
  assert json.loads((adapter / "adapter_config.json").read_text())["peft"] is False


def test_run_on_numbers_is_merged(tmp_path, capfd):
  run = train(tmp_path / "run", "model=mlp", "data=xor", "data@retain=none", "logger=none", "train.steps=2",
              "optim.lr=0.1", "train.save_every=0", "train.eval_every=0", "train.batch_size=4")  # fmt: skip
  assert entry.run(["task=merge", f"run={run}"]) == 0
  said = capfd.readouterr().out
  assert "4 held-out examples" in said
  assert (run / "export/merged/model.safetensors").is_file()


@pytest.mark.slow
def test_full_fine_tuning_is_exported_as_a_model(tmp_path, capfd):
  run = train(tmp_path / "run", *TINY, *on_stories(tmp_path), *FEW, "lora=full")
  assert entry.run(["task=merge", f"run={run}"]) == 0
  want, found = load_file(run / "model.safetensors"), load_file(run / "export/merged/model.safetensors")
  assert want.keys() == found.keys() and all((want[name] == found[name]).all() for name in want)
  assert entry.run(["task=export", f"run={run}"]) == 2
  assert "lora=full trains the model itself and has no adapter; use format=merged" in capfd.readouterr().err


# ---- what speaks against it


def problems(*argv: str) -> list[str]:
  with pytest.raises(InputError) as caught:
    check_command_line(list(argv))
  return caught.value.problems


@pytest.fixture
def saved(tmp_path) -> Path:
  """A run directory with a config and nothing else."""
  run = tmp_path / "saved"
  (run / "export/peft").mkdir(parents=True)
  cfg = Config()
  cfg.model.base, cfg.data.view = "random", "docs"
  (run / "config.yaml").write_text(yaml.safe_dump(asdict(cfg)))
  return run


def test_bad_settings_are_found_before_anything_is_read(saved):
  export = ["task=export", f"run={saved}"]
  assert problems("task=export")[0].startswith("run=null: task=export needs a run")
  assert "did you mean merged?" in problems(*export, "format=mergd")[0]
  assert "choose null, float32, bfloat16, float16" in problems(*export, "merge.dtype=float64")[0]
  assert "merge.bound=-1.0: must be 0 or more" in problems(*export, "merge.bound=-1")[0]
  for place in ("adapter", "adapter/x", "checkpoints/1", "."):
    assert "is inside the run's own files" in problems(*export, f"out={saved}/{place}")[0]
  assert "task=export format=base" in problems("task=merge", f"run={saved}", "format=base")[0]
  assert "lora=frozen trained nothing" in problems(*export, "lora=frozen")[0]
  assert check_command_line(export).jobs[0].format == "peft"  # an empty directory is no problem
  (saved / "export/peft/x").touch()
  assert "is not empty, and nothing is overwritten" in problems(*export)[0]
  assert "is a file" in problems(*export, f"out={saved}/config.yaml")[0]


def test_run_that_did_not_end_is_an_input_error(saved, capfd):
  assert entry.run(["task=merge", f"run={saved}"]) == 2
  assert "has no adapter, because the run did not finish" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 6), (errno.EROFS, 2), (errno.EACCES, 2)])
def test_disk_error_leaves_nothing_behind(llama, monkeypatch, capfd, number, code):
  def refuse(*args, **kwargs):
    raise OSError(number, "no", "model.safetensors")

  monkeypatch.setattr(model_directory, "save_tokenizer", refuse)
  before = everything(llama)
  assert entry.run(["task=export", "format=base", f"run={llama}"]) == code
  assert everything(llama) == before
  assert str(llama / "export/base") in capfd.readouterr().err


def test_files_of_a_killed_export_are_removed(llama, tmp_path):
  (tmp_path / ".one.tmp").mkdir()
  (tmp_path / ".one.tmp/half").touch()
  assert entry.run(["task=export", f"run={llama}", f"out={tmp_path / 'one'}"]) == 0
  assert {path.name for path in tmp_path.iterdir()} == {"one"} and not (tmp_path / "one/half").exists()
