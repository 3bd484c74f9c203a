"""A signal at any moment ends a run with 75, and it goes on bit for bit; SIGHUP stays ignored under nohup."""

import os
import signal
import subprocess
import sys

import pytest
from runs import TINY, curve, on_stories, resume, train

from lora_exp.config import StoppedError
from lora_exp.train import pack_data, pack_evaluation, pack_training, trial_writer
from lora_exp.train.stop_signals import stop_signals

SHORT = [*TINY, "lora.dropout=0.1", "train.steps=8", "train.eval_every=4", "train.save_every=4",
         "train.eval_tokens=500"]
QUICK = ("evaluating the last step", "saving")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return [*SHORT, *on_stories(tmp_path_factory.mktemp("stories"))]


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
  return train(tmp_path_factory.mktemp("unbroken") / "run", *settings)


@pytest.fixture(autouse=True)
def default_hangup():
  """Processes that nohup started ignore SIGHUP."""
  previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, previous)


def after(calls: int, number: int, function):
  """`function`, with the signal `number` sent to this process after its call number `calls`."""
  seen = []

  def called(*args, **kwargs):
    seen.append(None)
    result = function(*args, **kwargs)
    if len(seen) == calls:
      os.kill(os.getpid(), number)
    return result

  return called


MOMENTS = {
  "compiling": (pack_training, "compile_step", 1),
  "evaluating the base": (pack_evaluation, "held_out", 1),
  "evaluating": (pack_evaluation, "held_out", 2),
  "evaluating the last step": (pack_evaluation, "held_out", 3),
  "saving": (trial_writer.checkpoint, "save", 1),
  "saving the last step": (trial_writer.checkpoint, "save", 2),
}


@pytest.mark.parametrize("moment", [
  pytest.param(moment, marks=[] if moment in QUICK else [pytest.mark.faults_full]) for moment in MOMENTS
])  # fmt: skip
def test_a_signal_ends_with_75_and_loses_no_step(moment, settings, unbroken, tmp_path, monkeypatch):
  module, name, calls = MOMENTS[moment]
  with monkeypatch.context() as patch:
    patch.setattr(module, name, after(calls, signal.SIGHUP, getattr(module, name)))
    run_dir = train(tmp_path / "run", *settings, code=75)
  resume(run_dir)
  assert curve(run_dir) == curve(unbroken)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_training_leaves_nothing(number, settings, tmp_path, monkeypatch, capfd):
  with monkeypatch.context() as patch:
    patch.setattr(pack_data, "make_rows", after(1, number, pack_data.make_rows))
    train(tmp_path / "run", *settings, code=75)
  said = capfd.readouterr().err
  assert "with nothing to save; start the command again" in said and "resume" not in said
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_after_a_run_of_a_sweep_starts_no_other(settings, tmp_path, monkeypatch):
  from lora_exp.cli import main as entry

  argv = ["-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *settings, "train.steps=2", "lora.rank=1,2"]
  with monkeypatch.context() as patch:
    export = trial_writer.TrialWriter.export
    patch.setattr(trial_writer.TrialWriter, "export", after(1, signal.SIGTERM, export))
    assert entry.run([*argv, "hydra/launcher=basic"]) == 75
  assert [path.parent.name for path in (tmp_path / "sweep").glob("*/metrics.jsonl")] == ["0"]


NOHUP = """
import os, signal
from lora_exp.train.stop_signals import stop_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stop_signals() as stop:
  os.kill(os.getpid(), signal.SIGHUP)
  print(stop.requested)
"""


def test_nohup_keeps_hangups_ignored():
  done = subprocess.run([sys.executable, "-c", NOHUP], capture_output=True, text=True)
  assert done.stdout == "False\n", done.stderr


def test_a_second_signal_stops_at_once():
  with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    stop.since -= 1
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_reaches_the_contexts_around_it():
  with stop_signals() as outer:
    with stop_signals():
      os.kill(os.getpid(), signal.SIGUSR1)
    assert outer.requested
    with pytest.raises(StoppedError, match="nothing to save"), stop_signals(at_once="nothing to save"):
      pass
