"""A step with NaN changes no weight, wherever it comes from; train.on_nan says what follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked import start_command
from runs import TINY, curve, on_stories, rows, summary, train
from safetensors.numpy import load_file

from lora_exp.cli import main as entry
from lora_exp.data import pipeline
from lora_exp.train import compiled_step, pack_training
from lora_exp.train.compute import step as step_module
from lora_exp.train.records import checkpoint

STEPS = 8
SHORT = [*TINY, f"train.steps={STEPS}", "optim.warmup=3", "train.eval_every=0", "train.save_every=2",
         "train.eval_tokens=200", "train.batch_size=4"]  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return [*SHORT, *on_stories(tmp_path_factory.mktemp("stories"))]


def in_loss(monkeypatch, bad):
  """NaN as the weight of a target, so that loss and gradient are NaN."""
  return lambda state, trials, batch: (trials, {**batch, "weights": jnp.where(bad(state), jnp.nan, batch["weights"])})


def in_one_leaf(monkeypatch, bad):
  """NaN in one element of one gradient."""
  whole = step_module.gradient

  def inject(state, trials, batch):
    def gradient(*args):
      grads, sums, tokens = whole(*args)
      leaves, structure = jax.tree.flatten(grads)
      leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(jnp.where(bad(state), jnp.nan, 0))
      return jax.tree.unflatten(structure, leaves), sums, tokens

    monkeypatch.setattr(step_module, "gradient", gradient)
    return trials, batch

  return inject


def in_rate(monkeypatch, bad):
  return lambda state, trials, batch: (trials._replace(lr=jnp.where(bad(state), jnp.inf, trials.lr)), batch)


def in_one_trial(monkeypatch, bad):
  """An infinite rate of the second trial of a pack."""
  return lambda state, trials, batch: (
    trials._replace(lr=jnp.where(bad(state) & (jnp.arange(len(trials.lr)) == 1), jnp.inf, trials.lr)), batch)


def inject(monkeypatch, place, *bad_steps) -> None:
  """Injects NaN into the steps `bad_steps`, counted from 1."""
  whole = step_module.train_step
  change = place(monkeypatch, lambda state: jnp.isin(state.step, jnp.array(bad_steps) - 1))

  def train_step(program, state, trials, frozen, batch, keys):
    trials, batch = change(state, trials, batch)
    return whole(program, state, trials, frozen, batch, keys)

  monkeypatch.setattr(compiled_step, "train_step", train_step)


def assert_finite(run_dir) -> None:
  """No value of the adapter is NaN or infinite."""
  adapter = run_dir / "adapter" / "adapter_model.safetensors"
  assert all(np.isfinite(x).all() for x in load_file(adapter).values())


@pytest.mark.parametrize(("place", "step"), [
  (in_one_leaf, 2), *(pytest.param(*case, marks=pytest.mark.faults_full)
                      for case in [(in_rate, 5), (in_loss, 1), (in_loss, STEPS)]),
  pytest.param(in_one_leaf, 5, marks=pytest.mark.faults_full), pytest.param(in_rate, 1, marks=pytest.mark.faults_full),
])  # fmt: skip
def test_a_skipped_step_changes_nothing_and_is_counted(place, step, settings, tmp_path, monkeypatch, capfd):
  inject(monkeypatch, place, step)
  run_dir = train(tmp_path / "run", *settings, "train.on_nan=skip")
  assert f"step {step} is skipped: " in capfd.readouterr().err
  assert summary(run_dir)["status"] == "done" and summary(run_dir)["skipped_steps"] == 1
  assert [row["step"] for row in rows(run_dir, "train")] == list(range(1, STEPS + 1))
  assert_finite(run_dir)


def test_a_step_that_is_not_finite_stops_the_run_unharmed(settings, tmp_path, monkeypatch, capfd):
  inject(monkeypatch, in_one_leaf, 5)
  run_dir = train(tmp_path / "run", *settings, code=5)
  said = capfd.readouterr().err
  assert "the norm of the gradient is nan at step 5" in said and "is finite when it is evaluated again" in said
  assert checkpoint.steps(run_dir)[-1] == 4 and summary(run_dir)["status"] == "diverged"


@pytest.mark.parametrize("step", [
  5, *(pytest.param(step, marks=pytest.mark.faults_full) for step in (1, 2, STEPS))
])  # fmt: skip
def test_rewind_goes_back_and_on_with_the_next_batch(step, settings, tmp_path, monkeypatch, capfd):
  nan_rows(monkeypatch, step)
  run_dir = train(tmp_path / "run", *settings, "train.on_nan=rewind")
  said = capfd.readouterr().err
  assert "because of the training rows " in said and "going back to the last checkpoint" in said
  assert summary(run_dir)["status"] == "done" and summary(run_dir)["skipped_steps"] >= 1
  assert [row["step"] for row in rows(run_dir, "train")] == list(range(1, STEPS + 1))
  assert all(row["loss"] is not None for row in rows(run_dir, "train"))
  assert_finite(run_dir)


@pytest.mark.faults_full
@pytest.mark.parametrize("step", [1, 2, 5, STEPS])  # the first, in the warm-up, after it, the last
def test_a_batch_with_nan_is_skipped_and_its_row_is_named(step, settings, tmp_path, monkeypatch, capfd):
  nan_rows(monkeypatch, step)
  run_dir = train(tmp_path / "run", *settings, "train.on_nan=skip")
  said = capfd.readouterr().err
  assert f"step {step} is skipped: " in said and "because of the training rows " in said
  assert summary(run_dir)["skipped_steps"] >= 1
  assert_finite(run_dir)


def poison_step_5() -> None:
  """Injects NaN into one gradient of step 5 of this process."""
  inject(pytest.MonkeyPatch(), in_one_leaf, 5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [
  "mesh.data=2", *(pytest.param(mesh, marks=pytest.mark.faults_full) for mesh in ("mesh.tensor=2", "mesh.fsdp=2"))
])  # fmt: skip
def test_on_a_mesh_a_step_with_nan_changes_nothing(mesh, settings, tmp_path):
  argv = [*settings, mesh, "train.on_nan=skip", f"hydra.run.dir={tmp_path / 'run'}"]
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  process = start_command(argv, tmp_path / "log", poison_step_5, flags)
  process.join()
  said = (tmp_path / "log").read_text()
  assert process.exitcode == 0 and "step 5 is skipped: " in said, said[-3000:]
  assert summary(tmp_path / "run")["skipped_steps"] == 1
  assert_finite(tmp_path / "run")


def nan_rows(monkeypatch, step) -> None:
  """Gives one row of the batch of `step` a NaN when it is read, wherever it is read."""
  decode, whole, wanted = pipeline.decode, pack_training.train_batches, []

  def train_batches(rows_, cfg, size, start, seeds, *rest):
    wanted[:] = pipeline.reader(rows_, "train").read([pipeline.batch_rows(rows_, cfg, size, step - 1, seeds[0])[2]])
    return whole(rows_, cfg, size, start, seeds, *rest)

  def poisoned(records, *args, **kwargs):
    batch = decode(records, *args, **kwargs)
    for place, record in enumerate(records):
      if record in wanted:
        batch["weights"][place] = np.nan
    return batch

  monkeypatch.setattr(pipeline, "decode", poisoned)
  monkeypatch.setattr(pack_training, "train_batches", train_batches)


@pytest.mark.slow
def test_one_trial_of_a_pack_fails_and_the_other_does_not_notice(settings, tmp_path, monkeypatch):
  argv = ["-m", "hydra/launcher=packed", *settings, "optim.lr=1e-3,2e-3"]
  assert entry.run([*argv, f"hydra.sweep.dir={tmp_path / 'good'}"]) == 0
  inject(monkeypatch, in_one_trial, 3)
  assert entry.run([*argv, f"hydra.sweep.dir={tmp_path / 'bad'}"]) == 1
  assert curve(tmp_path / "bad" / "0") == curve(tmp_path / "good" / "0")
  assert summary(tmp_path / "bad" / "1")["status"] == "diverged"


@pytest.mark.faults_full
def test_many_skipped_steps_in_a_row_end_the_run(settings, tmp_path, monkeypatch):
  inject(monkeypatch, in_loss, *range(2, 30))
  run_dir = train(tmp_path / "run", *settings, "train.on_nan=skip", "train.steps=20", code=5)
  assert len(rows(run_dir, "train")) == 12


def test_the_rows_of_a_batch_are_those_that_are_trained_on(settings, tmp_path):
  from lora_exp.cli.command_line import check_command_line
  from lora_exp.data.rows import make_rows
  from lora_exp.data.tokenization import get_tokenizer

  cfg = check_command_line(settings).jobs[0]
  made = make_rows(cfg.data, get_tokenizer("bytes"), tmp_path)
  batches = pipeline.train_batches(made, cfg.data, 4)
  for number in range(made.train_rows // 2):
    expected = pipeline.train_rows(made, pipeline.batch_rows(made, cfg.data, 4, number, cfg.data.seed))
    np.testing.assert_array_equal(next(batches)["tokens"], expected["tokens"])
  batches.close()
