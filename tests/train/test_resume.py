"""A resumed run equals an uninterrupted one bit for bit, and incompatible settings are rejected."""

import os
import shutil
import signal
import subprocess
import time
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from runs import TINY, command, curve, environment, on_stories, resume, stories, story, summary, train

from lora_exp.runtime.saved_config import load_config
from lora_exp.train import job as training_job
from lora_exp.train import pack as packs
from lora_exp.train import pack_training as training
from lora_exp.train.records import checkpoint

# Everything that remembers or draws: dropout in the base and on A, the order of rows, decay, clipping, the schedule.
FULL = [*TINY, "lora.dropout=0.1", "model.dropout=0.1", "data.shuffle=true", "optim.weight_decay=0.1", "optim.clip=0.5",
        "optim.schedule=cosine", "train.steps=40", "train.eval_every=8", "train.save_every=16", "train.eval_tokens=500"]
LONG = [*FULL, "train.steps=200", "train.eval_every=50", "train.save_every=20"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return [*FULL, *on_stories(tmp_path_factory.mktemp("stories"))]


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
  return train(tmp_path_factory.mktemp("unbroken") / "run", *settings)


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory):
  """The same run, stopped after step 10."""
  return train(tmp_path_factory.mktemp("stopped") / "run", *settings, "train.stop_at=10", code=75)


@pytest.fixture
def copy(stopped, tmp_path):
  """A copy of the stopped run for one test."""
  return shutil.copytree(stopped, tmp_path / "run")


def test_a_stopped_run_prints_how_to_resume_it(stopped):
  assert summary(stopped)["status"] == "stopped"
  assert [row["step"] for row in curve(stopped) if row["split"] == "train"] == list(range(1, 11))
  assert checkpoint.steps(stopped)[-1] == 10 and not (stopped / "adapter").exists()


def test_a_resumed_run_is_bit_equal_to_the_unbroken_one(unbroken, copy):
  resume(copy, "train.stop_at=25", code=75)
  resume(copy)
  assert curve(copy) == curve(unbroken)
  assert len([row for row in curve(copy) if row["split"] == "train" and row["step"] > 10]) == 30
  for part in ("losses", "tokens", "steps", "status", "parameters", "fingerprints", "held_out_tokens"):
    assert summary(copy)[part] == summary(unbroken)[part], part
  adapter = "adapter/adapter_model.safetensors"
  assert (copy / adapter).read_bytes() == (unbroken / adapter).read_bytes()


# ---- the comparison above has teeth: each of these broken restores must show in it


def no_optimizer(monkeypatch):
  whole = checkpoint.restore

  def restore(*args):
    step, state, meta = whole(*args)
    return step, {n: jnp.zeros_like(x) if n.startswith("opt.") else x for n, x in state.items()}, meta

  monkeypatch.setattr(checkpoint, "restore", restore)


def rounded_params(monkeypatch):
  whole = checkpoint.restore

  def restore(*args):
    step, state, meta = whole(*args)
    rounded = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)
    return step, {n: rounded(x) if n.startswith("params.") else x for n, x in state.items()}, meta

  monkeypatch.setattr(checkpoint, "restore", restore)


def other_dropout(monkeypatch):
  whole = training_job.stream_key
  monkeypatch.setattr(training_job, "stream_key", lambda seed, stream: whole(seed + 1, stream))


def same_dropout_in_each_step(monkeypatch):
  whole = jax.random.fold_in
  monkeypatch.setattr(jax.random, "fold_in", lambda key, data: whole(key, 0 if isinstance(data, jax.Array) else data))


def other_batches(monkeypatch, late: int = 0, from_the_start: bool = False, seed: int = 0):
  whole = training.train_batches

  def train_batches(rows, cfg, size, start, seeds, *rest):
    return whole(rows, cfg, size, (0 if from_the_start else start) + late, [own + seed for own in seeds], *rest)

  monkeypatch.setattr(training, "train_batches", train_batches)


def initial_adapter(monkeypatch):
  whole = packs.restore_trial

  def restore_trial(trial, method, table, state, step):
    step, arrays, meta = whole(trial, method, table, state, step)
    initial = checkpoint.named_leaves(state)
    return step, {n: initial[n] if n.startswith("params.") else x for n, x in arrays.items()}, meta

  monkeypatch.setattr(packs, "restore_trial", restore_trial)


BROKEN = {
  "no optimizer": no_optimizer,
  "no adapter": initial_adapter,
  "adapter through bf16": rounded_params,
  "another dropout key": other_dropout,
  "the same dropout in each step": same_dropout_in_each_step,
  "one batch late": partial(other_batches, late=1),
  "no position in the data": partial(other_batches, from_the_start=True),
  "another data seed": partial(other_batches, seed=1),
}


def assert_seen(run_dir, unbroken) -> None:
  """A run that was resumed at step 10 and stopped at 13 differs from the unbroken one, but not before step 10."""
  reached = [row for row in curve(unbroken) if row["step"] <= 13]
  assert len(curve(run_dir)) == len(reached)
  assert curve(run_dir) != reached and curve(run_dir)[:12] == reached[:12]


@pytest.mark.parametrize("broken", list(BROKEN))
def test_a_broken_restore_would_be_seen(broken, unbroken, copy, monkeypatch):
  BROKEN[broken](monkeypatch)
  resume(copy, "train.stop_at=13", code=75)
  assert_seen(copy, unbroken)


def test_a_grown_data_set_is_refused_and_would_be_seen(unbroken, copy, tmp_path, monkeypatch, capfd):
  grown = f"data.path={stories(tmp_path / 'grown.txt', 80)}"
  assert "the data has changed since the run started" in refused(copy, grown, capfd=capfd)
  monkeypatch.setattr(packs, "changed_sources", lambda *_: [])
  resume(copy, grown, "train.stop_at=13", code=75)
  assert_seen(copy, unbroken)


# ---- real signals


def start(settings, run_dir, enough) -> subprocess.Popen:
  """A run in a process of its own that has come so far that `enough()`."""
  argv = command(*settings, f"hydra.run.dir={run_dir}")
  started = subprocess.Popen(argv, env=environment(), cwd=run_dir.parent, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  deadline = time.monotonic() + 240
  while not enough():
    assert started.poll() is None and time.monotonic() < deadline, started.stdout.read()
    time.sleep(0.002)
  return started


@pytest.fixture(scope="module")
def long_settings(tmp_path_factory):
  return [*LONG, *on_stories(tmp_path_factory.mktemp("stories"))]


@pytest.fixture(scope="module")
def long_unbroken(long_settings, tmp_path_factory):
  return train(tmp_path_factory.mktemp("long") / "run", *long_settings)


@pytest.mark.slow
def test_sigterm_ends_with_75_and_the_run_goes_on_bit_for_bit(long_settings, long_unbroken, tmp_path):
  run_dir = tmp_path / "run"
  metrics = run_dir / "metrics.jsonl"
  started = start(long_settings, run_dir, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 8)
  started.terminate()
  said, _ = started.communicate(timeout=120)
  assert started.returncode == 75, said
  assert "Traceback" not in said and f"train.resume={os.path.relpath(run_dir, tmp_path)}" in said
  last = curve(run_dir)[-1]["step"]
  assert checkpoint.steps(run_dir)[-1] == last < 200
  resume(run_dir)
  assert curve(run_dir) == curve(long_unbroken)


def test_a_killed_run_resumes_bit_equal_from_its_checkpoint(long_settings, long_unbroken, tmp_path):
  run_dir = tmp_path / "run"
  started = start(long_settings, run_dir, lambda: bool(checkpoint.steps(run_dir)))
  started.send_signal(signal.SIGKILL)
  started.communicate(timeout=120)
  assert started.returncode == -signal.SIGKILL and not (run_dir / "summary.json").exists()
  assert checkpoint.steps(run_dir)[-1] < 200
  resume(run_dir)
  assert curve(run_dir) == curve(long_unbroken)
  assert summary(run_dir)["losses"] == summary(long_unbroken)["losses"]


# ---- what is refused, and what changes nothing


def test_a_run_killed_before_its_first_checkpoint_starts_again(unbroken, settings, tmp_path, capfd):
  run_dir = shutil.copytree(unbroken, tmp_path / "run")
  shutil.rmtree(run_dir / "checkpoints")
  resume(run_dir, code=4)  # it is finished, so it had checkpoints, and nothing of it is trained again
  assert "has no checkpoint" in capfd.readouterr().err
  (run_dir / "summary.json").unlink()
  (run_dir / "checkpoints" / "tmp.8").mkdir(parents=True)
  resume(run_dir)
  assert "starts again at step 0" in capfd.readouterr().out
  assert curve(run_dir) == curve(unbroken) and summary(run_dir)["losses"] == summary(unbroken)["losses"]


def test_a_finished_run_has_nothing_left_to_do_and_loses_nothing(unbroken, tmp_path, capfd):
  run_dir = shutil.copytree(unbroken, tmp_path / "run")
  before, curves = summary(run_dir), curve(run_dir)
  resume(run_dir)
  assert "is already finished" in capfd.readouterr().out
  assert curve(run_dir) == curves
  assert summary(run_dir) == before


def refused(run_dir, *argv, capfd, code=2) -> str:
  """The message of a resume that is rejected; checks that it changes no file."""
  content = lambda path: load_config(str(run_dir)) if path.name == "config.yaml" else path.read_bytes()
  before = {path: content(path) for path in run_dir.rglob("*") if path.is_file() and path.suffix != ".log"}
  capfd.readouterr()
  resume(run_dir, *argv, code=code)
  assert {path: content(path) for path in before} == before
  said = capfd.readouterr()
  assert "Traceback" not in said.err + said.out and said.err.startswith("error: ")
  return said.err


def test_another_rank_is_another_run(copy, capfd):
  said = refused(copy, "lora.rank=4", capfd=capfd)
  assert "lora.rank=4" in said and "has 8" in said


def test_a_changed_data_file_is_refused(settings, tmp_path, capfd):
  file = stories(tmp_path / "stories.txt")
  run_dir = train(tmp_path / "run", *settings, f"data.path={file}", "train.stop_at=3", code=75)
  file.write_text(file.read_text().replace(story(7), story(77)))
  said = refused(run_dir, capfd=capfd)
  assert "changed" in said and str(run_dir) in said
  file.unlink()
  assert "no such file" in refused(run_dir, capfd=capfd)


def test_damaged_checkpoints_are_skipped_or_exit_with_4(copy, capfd):
  newest = checkpoint.steps(copy)[-1]
  (copy / "checkpoints" / str(newest) / "meta.json").write_text("{}")
  if len(checkpoint.steps(copy)) > 1:
    resume(copy, "train.stop_at=12", code=75)
    assert "damaged" in capfd.readouterr().err
  for step in checkpoint.steps(copy):
    (copy / "checkpoints" / str(step) / "meta.json").write_text("{}")
  assert "damaged" in refused_with_warnings(copy, capfd)


def refused_with_warnings(run_dir, capfd) -> str:
  capfd.readouterr()
  resume(run_dir, code=4)
  return capfd.readouterr().err
