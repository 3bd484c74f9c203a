"""run=DIR and train.resume=DIR use the saved config with the overrides applied."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from older_configs import save_as_older

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import Config, InputError, to_config
from lora_exp.runtime.saved_config import save_config


def config(*overrides: str) -> Config:
  """The checked config of one command line."""
  return check_command_line(overrides).jobs[0]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
  cfg = config("model=minigpt_tiny", "lora.rank=3", "train.steps=40", "train.stop_at=5", "data@retain=none",
               "optim.schedule=constant", "sample.top_k=9")
  directory = tmp_path / "run"
  directory.mkdir()
  save_config(cfg, directory)
  return directory


def test_a_saved_config_is_read_back_equal(run_dir):
  values = yaml.safe_load((run_dir / "config.yaml").read_text())
  assert asdict(to_config(values)) == values


def test_run_uses_saved_settings_and_what_is_typed(run_dir):
  cfg = config("task=evaluate", f"run={run_dir}", "train.batch_size=2", "mesh=tutorial", "data@retain=stdlib_docs")
  assert (cfg.task, cfg.run) == ("evaluate", str(run_dir))
  assert (cfg.lora.rank, cfg.model.width, cfg.sample.top_k) == (3, 64, 9), "saved, not the defaults"
  assert cfg.train.batch_size == 2 and cfg.mesh.tensor == 2
  assert cfg.retain is not None and cfg.retain.view == "docs"
  assert cfg.train.stop_at is None


def test_resuming_uses_the_saved_config_without_stop_at(run_dir):
  line = check_command_line([f"train.resume={run_dir}"])
  assert line.jobs[0].lora.rank == 3 and line.jobs[0].train.stop_at is None
  assert line.directory is None and line.claim() is None
  argv = line.hydra_argv(None)
  assert f'hydra.run.dir="{run_dir}"' in argv and "hydra.output_subdir=null" in argv


@pytest.mark.parametrize("override", ["train.stop_at=20", "train.steps=60", "train.save_every=7", "logger=none",
                                      "sample.every=3", "mesh.data=2", "lora.rank=3", "cache=/c"])
def test_resuming_accepts_what_does_not_change_the_run(override, run_dir):
  assert config(f"train.resume={run_dir}", override).train.resume == str(run_dir)


@pytest.mark.parametrize(("override", "named"), [
  ("lora.rank=4", "lora.rank=4: the run"), ("optim.lr=1", "optim.lr=1.0"), ("lora=full", "lora.method=full"),
  ("data=stdlib_code", "data.view=code"), ("train.steps=30", "must be at least the run's 40"),
  ("train.batch_size=16", "train.batch_size=16"), ("data@retain=stdlib_code", "retain"), ("name=other", "name=other"),
  ("experiment=jax_tutorial", "cannot be applied to a saved run"), ("hydra.run.dir=x", "stays in its directory"),
  ("task=evaluate", "task=evaluate"),
])
def test_resuming_refuses_what_changes_the_run_and_names_it(override, named, run_dir):
  with pytest.raises(InputError) as caught:
    check_command_line([f"train.resume={run_dir}", override])
  assert named in str(caught.value)


def test_a_planned_schedule_cannot_be_made_longer(run_dir):
  file = run_dir / "config.yaml"
  file.write_text(file.read_text().replace("schedule: constant", "schedule: cosine"))
  with pytest.raises(InputError, match=r"cosine schedule was planned for 40 steps; only .*optim\.schedule=constant"):
    check_command_line([f"train.resume={run_dir}", "train.steps=60"])


@pytest.mark.parametrize(("text", "words"), [
  ("lora: {rnk: 3}", "config.yaml: lora.rnk: no such setting; did you mean lora.rank"),
  ("lora: [1", "cannot be read"), ("- 1", "contains no settings"), ("", "contains no settings"),
  ("lora: !!python/object/apply:os.getcwd []", "cannot be read"),
])
def test_a_damaged_saved_config_is_reported_with_its_path(text, words, run_dir):
  (run_dir / "config.yaml").write_text(text)
  with pytest.raises(InputError) as caught:
    check_command_line(["task=evaluate", f"run={run_dir}"])
  assert words in str(caught.value) and str(run_dir) in str(caught.value)


@pytest.fixture
def old_sweep(tmp_path) -> Path:
  """A sweep over ranks whose first run was begun when lora.alpha was null by default."""
  directory = tmp_path / "sweep" / "0"
  directory.mkdir(parents=True)
  save_as_older(config("model=minigpt_tiny", "lora.rank=1", "lora.alpha=null"), directory)
  return directory.parent


@pytest.mark.parametrize(("typed", "alphas"), [
  (["lora.rank=1,2"], [None, None]),
  (["lora.rank=1,2", "lora.alpha=null,16"], [None, 16.0, None, 16.0]),
  (["lora.rank=1,2", "lora=lora,vera"], [None] * 4),
])  # fmt: skip
def test_an_old_sweep_goes_on_with_its_default_alpha(typed, alphas, old_sweep):
  line = check_command_line(["-m", "model=minigpt_tiny", *typed, f"hydra.sweep.dir={old_sweep}"])
  assert [cfg.lora.alpha for cfg in line.jobs] == alphas
  new = check_command_line(["-m", "model=minigpt_tiny", "lora.rank=1,2", f"hydra.sweep.dir={old_sweep}-new"])
  assert [cfg.lora.alpha for cfg in new.jobs] == [16.0, 16.0]
