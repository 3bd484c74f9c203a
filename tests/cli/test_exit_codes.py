"""Every way in which a run can end has its exit code and its message."""

import errno
import os
import sys
from pathlib import Path

import pytest

from lora_exp.cli import main as entry
from lora_exp.config import DiskError, DivergedError, InputError, InUseError, NoCheckpointError, StoppedError


def run_directories(root: Path) -> list[Path]:
  """The run directories under `root`."""
  return sorted(path.parent for path in root.glob("outputs/**/.lock"))



@pytest.mark.parametrize(("error", "code"), [
  (InputError("x=1: no"), 2), (InUseError("in use"), 3), (NoCheckpointError("none"), 4), (DivergedError("nan"), 5),
  (DiskError("full"), 6), (StoppedError("stopped at step 3"), 75),
  (OSError(errno.ENOSPC, "No space left on device", "/disk/x"), 6), (OSError(errno.EDQUOT, "Quota", "/disk/x"), 6),
  (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2),
])
def test_each_error_has_its_exit_code_and_no_traceback(error, code, trained, capfd):
  def end(cfg, run_dir):
    raise error

  trained(end)
  assert entry.run([]) == code
  output = capfd.readouterr()
  assert output.err.startswith("warning: " if code == 75 else "error: ") and "Traceback" not in output.err + output.out


def test_a_bug_ends_with_1_and_a_logged_traceback(trained, in_tmp_path, capfd):
  trained(lambda cfg, run_dir: 1 / 0)
  assert entry.run([]) == 1
  assert "ZeroDivisionError" in capfd.readouterr().err
  run_dir, = run_directories(in_tmp_path)
  assert "ZeroDivisionError" in (run_dir / "lora_exp.log").read_text()


def test_an_early_interrupt_ends_with_130_and_leaves_nothing(trained, in_tmp_path):
  def interrupt(cfg, run_dir):
    raise KeyboardInterrupt

  trained(interrupt)
  assert entry.run([]) == 130
  assert list(in_tmp_path.iterdir()) == []


def test_the_process_environment_is_restored(trained, monkeypatch):
  argv = list(sys.argv)
  monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
  assert entry.run([]) == 0
  assert "HYDRA_FULL_ERROR" not in os.environ and sys.argv == argv
