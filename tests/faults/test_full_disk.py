"""A disk that is full, slow or read-only ends a run with one sentence and exit code 6, and it can be resumed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY, curve, environment, on_stories, resume, summary, train

from lora_exp.runtime import checksums
from lora_exp.train.records import checkpoint

RUN = [*TINY, "lora.rank=16", "train.steps=8", "train.eval_every=4", "train.eval_tokens=128", "train.batch_size=4"]
LIMITED = """
import resource, signal, sys
from lora_exp.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the nearest thing to a full disk without being root
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
  return on_stories(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory) -> Path:
  return train(tmp_path_factory.mktemp("unbroken") / "run", *RUN, *text, "train.save_every=4")


def assert_ended_with_6(done: subprocess.CompletedProcess[str], reason: str) -> None:
  """The command ended with code 6 and one sentence."""
  assert done.returncode == 6, done.stderr[-3000:]
  assert reason in done.stderr and "resume" in done.stderr
  assert not any(word in done.stderr for word in ("Traceback", "Event loop", "Exception ignored"))
  assert [line for line in done.stderr.splitlines() if line.strip()][-1].startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize(("save_every", "saved"), [("0", []), pytest.param("4", [], marks=pytest.mark.faults_full)])
def test_a_save_that_fails_ends_with_6_and_without_noise(save_every, saved, text, unbroken, tmp_path):
  run_dir, options = tmp_path / "run", [f"train.save_every={save_every}", f"hydra.run.dir={tmp_path / 'run'}"]
  if save_every == "0":  # the last save is the only one
    options.append("train.export=last")
  done = subprocess.run([sys.executable, "-c", LIMITED, *RUN, *text, *options], env=environment(), cwd=tmp_path,
                        capture_output=True, text=True, timeout=600)  # fmt: skip
  assert_ended_with_6(done, "the checkpoint could not be written (File too large)")
  assert checkpoint.steps(run_dir) == saved and summary(run_dir)["status"] == "failed"
  resume(run_dir)
  assert curve(run_dir) == curve(unbroken)


def test_a_slow_disk_changes_nothing(text, unbroken, tmp_path, monkeypatch):
  sync = checksums.sync_path

  def slow_sync(path: Path) -> None:
    time.sleep(0.02)
    sync(path)

  monkeypatch.setattr(checksums, "sync_path", slow_sync)
  run_dir = train(tmp_path / "run", *RUN, *text, "train.save_every=4")
  assert curve(run_dir) == curve(unbroken)


# ---- real file systems, which only root can make


@pytest.fixture
def small_disk(tmp_path):
  """A directory on a disk of 220 kB."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220k", "tmpfs", disk], capture_output=True)
  if mounted.returncode != 0:
    pytest.skip("needs root")
  yield disk
  subprocess.run(["umount", disk], check=True)


def command(*argv: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run([sys.executable, "-m", "lora_exp", *argv], env=environment(), capture_output=True, text=True,
                        timeout=600)  # fmt: skip


@pytest.mark.faults_full
def test_a_full_disk_keeps_the_checkpoint_before(text, unbroken, small_disk):
  run_dir = small_disk / "run"
  done = command(*RUN, *text, "train.save_every=4", f"hydra.run.dir={run_dir}")
  assert_ended_with_6(done, "No space left on device")
  assert len(checkpoint.steps(run_dir)) <= 1
  subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
  resume(run_dir)
  assert curve(run_dir) == curve(unbroken)


@pytest.mark.faults_full
def test_a_full_disk_of_the_cache_ends_with_6(text, small_disk):
  filler = small_disk / "filler"
  filler.write_bytes(bytes(215_000))
  done = command(*RUN, *text, f"cache={small_disk / 'cache'}", f"hydra.run.dir={small_disk.parent / 'run'}")
  assert done.returncode == 6 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
  assert not (small_disk.parent / "run").exists()


@pytest.mark.faults_full
def test_a_read_only_disk_is_one_sentence(text, small_disk):
  subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
  done = command(*RUN, *text, f"hydra.run.dir={small_disk / 'run'}")
  assert done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
