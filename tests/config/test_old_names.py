"""Renamed settings of version 0.1.0 are still accepted, with a warning if they are typed."""

from dataclasses import replace

import pytest
import yaml
from older_configs import save_as_older

from lora_exp.cli.command_line import check_command_line
from lora_exp.config.conversion import to_config
from lora_exp.config.errors import InputError
from lora_exp.config.old_names import old_name_warning, rename_override
from lora_exp.config.schema import Config, ModelConfig
from lora_exp.runtime.saved_config import (
  changed_settings,
  load_config,
  save_config,
  with_old_defaults,
)


@pytest.mark.parametrize(("old", "new"), [
  ("mesh.arm=2", "mesh.trial=2"), ("+promises.exact=0", "+expectations.exact=0"), ("otherwise=[]", "fallback=[]"),
  ("promises={total: 3}", "expectations={total: 3}"), ("mesh.army=2", "mesh.army=2"), ("prompt=promises=1",) * 2,
])  # fmt: skip
def test_an_override_gets_the_current_name(old, new):
  assert rename_override(old) == new


def test_a_config_of_old_names_is_read():
  cfg = to_config({"mesh": {"arm": 2, "data": 1}, "promises": {"total": 7}, "expectations": None,
                   "otherwise": ["model=gpt2"]})
  assert (cfg.mesh.trial, cfg.mesh.data) == (2, 1)
  assert cfg.expectations == {"total": 7} and cfg.fallback == ["model=gpt2"]


def test_a_saved_config_of_old_names_is_read(tmp_path):
  (tmp_path / "config.yaml").write_text(yaml.safe_dump({"mesh": {"arm": 4}, "promises": {"exact": 1}}))
  cfg = load_config(str(tmp_path))
  assert cfg.mesh.trial == 4 and cfg.expectations == {"exact": 1}


def test_typed_old_names_are_renamed_with_one_warning():
  line = check_command_line(["promises={total: 3}", "mesh.arm=1"])
  assert line.jobs[0].expectations == {"total": 3} and line.jobs[0].mesh.trial == 1
  assert line.overrides == ["expectations={total: 3}", "mesh.trial=1"]
  assert line.warnings == ["renamed settings: promises is now expectations, mesh.arm is now mesh.trial; "
                           "the old names still work"]


def test_current_names_show_no_warning():
  assert old_name_warning(["mesh.trial=1", "prompt=promises"]) is None
  assert check_command_line(["mesh.trial=1"]).warnings == []


def test_a_config_file_of_old_names_is_read(tmp_path):
  (tmp_path / "experiment").mkdir()
  (tmp_path / "experiment" / "mine.yaml").write_text(
    "# @package _global_\npromises: {total: 5}\notherwise: [model.weights=null, mesh.arm=1]\n"
    "model: {weights: /no/such}\nmesh: {arm: 1}\n"
  )
  line = check_command_line(["--config-dir", str(tmp_path), "experiment=mine"])
  assert line.jobs[0].expectations == {"total": 5}
  assert line.overrides[:2] == ["model.weights=null", "mesh.trial=1"] and "Using the fallback" in line.warnings[0]


def test_a_sweep_file_of_old_names_is_read(tmp_path):
  (tmp_path / "sweep").mkdir()
  (tmp_path / "sweep" / "mine.yaml").write_text(
    "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n"
    "    params: {promises: '{total:3},{total:4}', mesh.arm: 1}\n"
  )
  line = check_command_line(["--config-dir", str(tmp_path), "sweep=mine"])
  assert [job.expectations for job in line.jobs] == [{"total": 3}, {"total": 4}]


def test_a_run_of_a_llama_module_may_have_its_family_renamed():
  """Version 0.1.0 called Mistral, Qwen and Gemma llama; another module is another model."""
  before = Config(model=ModelConfig(family="llama"))
  assert changed_settings(before, Config(model=ModelConfig(family="gemma3"))) == []
  assert changed_settings(before, Config(model=ModelConfig(family="gpt2"))) == [("model.family", "llama", "gpt2")]


@pytest.mark.parametrize(("data", "packing"), [
  ({"source": "jsonl", "packing": "pack"}, "stream"), ({"source": "chatterbot", "packing": "pack"}, "stream"),
  ({"source": "jsonl", "packing": "pack", "loss": "assistant"}, "pack"), ({"source": "jsonl"}, "pack"),
  ({"source": "jsonl", "packing": "pad"}, "pad"), ({"source": "text", "packing": "pack"}, "pack"),
])  # fmt: skip
def test_old_runs_keep_rows_that_split_answers(data, packing):
  cfg = to_config({"data": data, "retain": data})
  assert cfg.data.packing == cfg.retain.packing == packing


@pytest.mark.parametrize("swept", [
  "data.packing=stream,pack", "lora.alpha=null,16", "model.width=64,128", "data.packing=pack,stream",
])  # fmt: skip
def test_later_jobs_of_a_sweep_keep_their_own_settings(swept, tmp_path):
  """The first run of a sweep that this version started gives the others no defaults."""
  argv = ["-m", swept, f"hydra.sweep.dir={tmp_path}"]
  jobs = check_command_line(argv).jobs
  (tmp_path / "0").mkdir()
  save_config(jobs[0], tmp_path / "0")
  assert check_command_line(argv).jobs == jobs


@pytest.mark.parametrize("text", ["{", "- a", "lora: 3", ""])
def test_a_damaged_first_config_of_a_sweep_is_named(text, tmp_path):
  (tmp_path / "0").mkdir()
  (tmp_path / "0" / "config.yaml").write_text(text)
  with pytest.raises(InputError, match="0/config.yaml: "):
    with_old_defaults(Config(), tmp_path, typed=[])


@pytest.mark.parametrize(("packing", "typed"), [("stream", []), ("pack", ["data.packing"])])
def test_a_typed_packing_is_kept_in_an_old_sweep(packing, typed, tmp_path):
  (tmp_path / "0").mkdir()
  save_as_older(to_config({"data": {"source": "jsonl", "packing": "stream", "loss": "assistant"}}), tmp_path / "0")
  today = to_config({"data": {"source": "jsonl", "packing": "pack", "loss": "assistant"}})
  assert with_old_defaults(today, tmp_path, typed).data.packing == packing


def test_an_old_sweep_of_prompts_is_continued(tmp_path):
  pairs = {"source": "jsonl", "packing": "pack", "loss": "assistant"}
  begun = to_config({"data": {"source": "jsonl", "packing": "pack"}, "retain": pairs})
  (tmp_path / "0").mkdir()
  (tmp_path / "1").mkdir()
  for number in ("0", "1"):
    save_as_older(begun, tmp_path / number)
  today = to_config({"data": pairs, "retain": pairs})
  continued = with_old_defaults(today, tmp_path, typed=[])
  assert (continued.data.packing, continued.retain.packing) == ("stream", "pack")
  assert changed_settings(begun, continued) == []
  assert with_old_defaults(today, tmp_path / "0", typed=[]) == today


def test_an_old_sweep_of_the_default_base_is_continued(tmp_path):
  """The default base became narrower; what is typed stays, and another base of the sweep keeps its sizes."""
  old = {"width": 256, "heads": 8, "ff": 256, "pretrain": {"steps": 800, "lr": 1.5e-3, "warmup": 40}}
  begun = to_config({"model": old})
  (tmp_path / "0").mkdir()
  save_as_older(begun, tmp_path / "0")
  today = check_command_line([]).jobs[0]
  assert today.model.width != 256 and today.model.pretrain.optimizer == "muon"
  assert with_old_defaults(today, tmp_path, typed=[]).model == begun.model
  typed = replace(today, model=replace(today.model, width=512))
  continued = with_old_defaults(typed, tmp_path, typed=["model.width"])
  assert (continued.model.width, continued.model.heads, continued.model.pretrain) == (512, 8, begun.model.pretrain)
  [tiny] = check_command_line(["model=minigpt_tiny"]).jobs
  assert with_old_defaults(tiny, tmp_path, typed=["model"]) == tiny
