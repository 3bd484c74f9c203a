"""The program from Python does what the command line does, and raises what the command line reports."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs

import lora_exp
from lora_exp import lora
from lora_exp.cli import python_api
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError, InUseError
from lora_exp.runtime.mesh import flatten

ROOT = Path(__file__).resolve().parents[2]
SHORT = [*runs.TINY, "train=quick", "train.steps=2", "train.eval_every=0", "train.save_every=0", "model.base=random"]


def test_importing_the_package_imports_no_jax():
  code = "import sys, lora_exp; lora_exp.compose; print('jax' in sys.modules, sorted(lora_exp.__all__))"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
  assert done.stdout.strip() == "False ['Result', '__version__', 'compose', 'load', 'run']", done.stderr


def test_compose_gives_the_config_of_the_command_line():
  overrides = ["model=minigpt_tiny", "lora.rank=3"]
  assert lora_exp.compose(overrides) == check_command_line(overrides).jobs[0]


@pytest.mark.parametrize(("overrides", "words"), [
  (["lora.rnk=1"], "did you mean lora.rank?"), (["-m", "lora.rank=1,2"], "several runs"), (["--help"], "flags"),
])  # fmt: skip
def test_compose_raises_what_the_command_line_reports(overrides, words):
  with pytest.raises(InputError, match=words):
    lora_exp.compose(overrides)


def test_run_trains_and_load_gives_the_trained_adapter(in_tmp_path):
  cfg = lora_exp.compose([*SHORT, *runs.on_stories(in_tmp_path)])
  result = lora_exp.run(cfg, "mine")
  assert result.directory == in_tmp_path / "mine"
  assert result.summary == runs.summary(in_tmp_path / "mine") and result.summary["steps"] == 2
  typed = runs.train(in_tmp_path / "typed", *SHORT, *runs.on_stories(in_tmp_path))
  assert runs.curve(typed) == runs.curve(result.directory)
  assert result.metrics == runs.rows(result.directory)
  assert result.paths.keys() == {"config", "metrics", "held_out", "summary", "adapter", "checkpoints"}
  arrays = flatten(lora_exp.load(result.directory).params)
  lora_b = [x for path, x in arrays.items() if path.endswith("lora_b")]
  assert lora_b and all(np.any(np.asarray(x)) for x in lora_b), "B is zero before training"
  check_model(result)
  with pytest.raises(InUseError, match="already contains a run"):
    lora_exp.run(cfg, "mine")


def test_run_trains_in_the_directory_of_the_overrides(in_tmp_path, monkeypatch):
  def write(cfg, run_dir):
    (run_dir / "summary.json").write_text("{}")

  monkeypatch.setattr(python_api, "run_task", write)
  assert lora_exp.run([*SHORT, "hydra.run.dir=mine"]).directory == in_tmp_path / "mine"
  assert [path.name for path in in_tmp_path.iterdir()] == ["mine"]
  with pytest.raises(InputError, match="hydra.run.dir=other: directory=more is given as well; remove one of them"):
    lora_exp.run([*SHORT, "hydra.run.dir=other"], "more")
  assert [path.name for path in in_tmp_path.iterdir()] == ["mine"]


def check_model(result):
  """The model has the trained adapter, which can be taken off and put on again."""
  model, tokens_BT = result.model, np.arange(6)[None]
  adapted = model(tokens_BT)
  assert np.isfinite(adapted).all() and adapted.shape == (1, 6, 257)
  lora.eject(model)
  assert not np.array_equal(model(tokens_BT), adapted)
  lora.attach(model, result.adapter)
  assert np.array_equal(model(tokens_BT), adapted)
  [text] = result.loaded.generate(["The"])
  assert isinstance(text, str)


def test_run_checks_a_config_and_leaves_nothing(in_tmp_path):
  cfg = lora_exp.compose(SHORT)
  with pytest.raises(InputError, match="lora.rank=0: must be at least 1"):
    lora_exp.run(replace(cfg, lora=replace(cfg.lora, rank=0)))
  with pytest.raises(InputError, match="no_such_module"):
    lora_exp.run(replace(cfg, lora=replace(cfg.lora, targets="no_such_module")))
  assert not any(path.is_file() for path in in_tmp_path.rglob("*"))
