"""A run whose files moved is resumed with the new path if the content is equal, and refused otherwise."""

import shutil

import pytest
from runs import TINY, curve, resume, rows, stories, train

from lora_exp.cli import main as entry

SHORT = [*TINY, "train.steps=6", "train.eval_every=3", "train.save_every=3", "train.eval_tokens=300"]
RETAIN = ["data@retain=text"]


@pytest.fixture
def stopped(tmp_path):
  """A run that is stopped after step 3, its files, and the curve of the unbroken run."""
  files = {name: stories(tmp_path / f"{name}.txt", count) for name, count in (("data", 60), ("retain", 40))}
  argv = [*SHORT, *RETAIN, "data=text", f"data.path={files['data']}", f"retain.path={files['retain']}",
          "retain.seq_len=16"]
  unbroken = train(tmp_path / "unbroken", *argv)
  run_dir = train(tmp_path / "run", *argv, "train.stop_at=3", code=75)
  return run_dir, files, curve(unbroken)


def test_moved_data_goes_on_with_the_new_path(stopped, tmp_path, capfd):
  run_dir, files, unbroken = stopped
  (tmp_path / "elsewhere").mkdir()
  moved = {name: shutil.move(file, tmp_path / "elsewhere" / f"my {name}.txt") for name, file in files.items()}
  resume(run_dir, code=2)
  assert "no such file; if it moved, add data.path=PATH" in capfd.readouterr().err
  typed = [f"data.path='{moved['data']}'", f"retain.path='{moved['retain']}'"]
  other = stories(tmp_path / "other.txt", 59)
  for name, words in (("data", "the data has changed"), ("retain", "the data of data@retain has changed")):
    resume(run_dir, *typed, f"{name}.path={other}", code=2)
    assert words in capfd.readouterr().err and len(rows(run_dir, "train")) == 3
  resume(run_dir, *typed, "lora.rank=2", code=2)
  assert "data.path" not in capfd.readouterr().err
  resume(run_dir, *typed)
  assert curve(run_dir) == unbroken


@pytest.mark.slow
def test_moved_weights_go_on_and_other_weights_are_refused(tmp_path, capfd):
  data = ["data=text", f"data.path={stories(tmp_path / 'data.txt')}"]
  bases = [train(tmp_path / f"base{n}", *SHORT, *data, "lora=full", "train.steps=1", f"train.seed={n}",
                 f"model.seed={n}", "model.base=random") for n in range(2)]
  weights, other = (base / "model.safetensors" for base in bases)
  run_dir = train(tmp_path / "run", *SHORT, *data, f"model.weights={weights}", "train.stop_at=3", code=75)
  moved = shutil.move(weights, tmp_path / "moved.safetensors")
  resume(run_dir, code=2)
  assert "if it moved, add model.weights=PATH" in capfd.readouterr().err
  resume(run_dir, f"model.weights={other}", code=2)
  assert "the weights in model.weights have changed" in capfd.readouterr().err
  resume(run_dir, f"model.weights={moved}")
  shutil.move(other, moved)  # in place of the weights that the run has now
  (run_dir / "summary.json").unlink()
  resume(run_dir, code=2)
  assert "the weights in model.weights have changed" in capfd.readouterr().err


def test_a_sweep_goes_on_with_moved_data_of_equal_content(tmp_path, capfd):
  sweep, data = tmp_path / "sweep", stories(tmp_path / "data.txt")
  argv = ["-m", *SHORT, "train.steps=1", "train.save_every=1", "data=text", "hydra/launcher=basic",
          f"hydra.sweep.dir={sweep}", "lora.rank=1,2"]
  assert entry.run([*argv, f"data.path={data}"]) == 0
  moved, other = shutil.move(data, tmp_path / "moved.txt"), stories(tmp_path / "other.txt", 59)
  capfd.readouterr()
  assert entry.run([*argv, f"data.path={other}"]) == 2
  assert "run 0 of" in (said := capfd.readouterr().err) and "the data has changed since the run started" in said
  assert entry.run([*argv, f"data.path={moved}"]) == 0
  assert capfd.readouterr().out.count("ended before") == 2
