"""Killing a process while it saves never loses the last committed checkpoint."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from forked import forkserver
from saver import save_forever, state_of

from lora_exp.train.records import checkpoint


def last_acknowledged(run_dir: Path, die_at: int | None, kill_after: float = 0.0) -> int:
  """Runs a process that saves until it is killed; returns the last step that it reported as saved."""
  context = forkserver()
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=save_forever, args=(run_dir, sender, die_at))
  process.start()
  sender.close()
  acknowledged = 0
  deadline: float | None = None
  try:
    while deadline is None or time.monotonic() < deadline:
      if receiver.poll(0.005):
        acknowledged = receiver.recv()
      if acknowledged == 2 and die_at is None and deadline is None:
        deadline = time.monotonic() + kill_after
    process.kill()
    while receiver.poll(1):
      acknowledged = receiver.recv()
  except EOFError:
    pass
  process.join()
  assert process.exitcode == -9
  return acknowledged


def check_survival(run_dir: Path, acknowledged: int) -> None:
  assert acknowledged >= 2
  step, state, meta = checkpoint.restore(run_dir, state_of(0))
  assert step in (acknowledged, acknowledged + 1)  # killed after the commit, before it could say so
  assert meta == {"step": step}
  for name, layer in state_of(step).items():
    for leaf, values in layer.items():
      np.testing.assert_array_equal(state[name][leaf], values)
  assert 1 in checkpoint.steps(run_dir), "the best step must survive too"
  checkpoint.save(run_dir, step + 1, state_of(step + 1), {}, keep=1)
  left = [path.name for path in (run_dir / "checkpoints").iterdir()]
  assert left == [str(step + 1)], "the next save clears away what the killed one left"


def kill_at_random(tmp_path: Path, times: int) -> None:
  moments = random.Random(0)
  for i in range(times):
    run_dir = tmp_path / str(i)
    check_survival(run_dir, last_acknowledged(run_dir, None, kill_after=moments.uniform(0, 0.3)))


def test_a_save_killed_at_a_random_moment_loses_nothing(tmp_path):
  kill_at_random(tmp_path, 4)


@pytest.mark.slow
def test_many_saves_killed_at_random_moments_lose_nothing(tmp_path):
  kill_at_random(tmp_path, 16)


@pytest.mark.parametrize("die_at", [1, 4, 40])
def test_a_save_killed_at_a_file_operation_loses_nothing(tmp_path, die_at):
  check_survival(tmp_path, last_acknowledged(tmp_path, die_at))


@pytest.mark.slow
def test_saves_killed_at_many_file_operations_lose_nothing(tmp_path):
  for die_at in range(2, 120, 5):
    check_survival(tmp_path / str(die_at), last_acknowledged(tmp_path / str(die_at), die_at))
