"""A cache entry is written once, by one process, and is either complete or missing."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora_exp.config.errors import DiskError, InputError
from lora_exp.runtime.cache import fingerprint, get_or_make

KEY = fingerprint(a=1)
ENTRY = [KEY[:32], *(f"{KEY[:32]}/{name}" for name in ("KEY", "SHA256SUMS", "file"))]


def write(directory: Path) -> None:
  (directory / "file").write_text("content")


def python(code: str, *arguments: object) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def files(root: Path) -> list[str]:
  """Everything below `root` but the lock files."""
  return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix != ".lock")


def test_fingerprint_depends_on_content_and_not_on_order():
  assert fingerprint(a=1, b=[1, {"x": None}]) == fingerprint(b=[1, {"x": None}], a=1)
  assert len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1"), fingerprint(a=1, b=1)}) == 5
  assert fingerprint(a=1) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"  # of {"a":1}


def test_made_once_then_found(tmp_path):
  made = [get_or_make(tmp_path, "rows", KEY, write) for _ in range(2)]
  assert made[0] == made[1] == tmp_path / "rows" / KEY[:32]
  assert (made[0] / "file").read_text() == "content"
  assert files(tmp_path / "rows") == ENTRY
  get_or_make(tmp_path, "rows", KEY, lambda directory: pytest.fail("rebuilt"))


def test_root_may_start_with_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert get_or_make("~/cache", "rows", KEY, write).is_relative_to(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_make_leaves_nothing_and_can_be_repeated(tmp_path, error):
  def fail(directory: Path) -> None:
    write(directory)
    raise error("no")

  with pytest.raises(error, match="no"):
    get_or_make(tmp_path, "rows", KEY, fail)
  assert files(tmp_path) == ["rows"]
  assert (get_or_make(tmp_path, "rows", KEY, write) / "file").exists()


MAKE_SLOWLY = """
import sys, time, os
from lora_exp.runtime.cache import get_or_make
def make(directory):
  print("making", flush=True)
  (directory / "file").write_text("content")
  time.sleep(float(sys.argv[3]))
path = get_or_make(sys.argv[1], "rows", sys.argv[2], make)
assert (path / "file").read_text() == "content"
"""


def test_two_processes_make_it_once(tmp_path):
  both = [python(MAKE_SLOWLY, tmp_path, KEY, 0.3) for _ in range(2)]
  output = [process.communicate()[0] for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert sorted(output) == ["", "making\n"]


def test_two_threads_make_it_once(tmp_path):
  made, both_started = [], threading.Barrier(2)

  def one() -> None:
    both_started.wait()
    get_or_make(tmp_path, "rows", KEY, lambda directory: (made.append(1), write(directory)))

  threads = [threading.Thread(target=one) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert made == [1]


def test_a_killed_maker_is_replaced_and_its_temporary_removed(tmp_path):
  dead = python(MAKE_SLOWLY, tmp_path, KEY, 60)
  assert dead.stdout is not None
  assert dead.stdout.readline() == "making\n"
  waiting = python(MAKE_SLOWLY, tmp_path, KEY, 0)
  dead.kill()
  assert waiting.communicate()[0] == "making\n"
  assert waiting.returncode == 0
  assert files(tmp_path / "rows") == ENTRY
  dead.communicate()


def test_only_abandoned_temporary_directories_are_removed(tmp_path):
  dead, living = (python(MAKE_SLOWLY, tmp_path, fingerprint(n=n), 60) for n in range(2))
  for process in (dead, living):
    assert process.stdout is not None
    process.stdout.readline()
  dead.kill()
  dead.communicate()
  get_or_make(tmp_path, "rows", KEY, write)
  temporaries = [name for name in files(tmp_path / "rows") if name.endswith(".tmp")]
  living.kill()
  living.communicate()
  assert temporaries == [f".{fingerprint(n=1)[:32]}.tmp"]


def test_a_full_disk_is_a_disk_error(tmp_path):
  def full(directory: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with pytest.raises(DiskError, match="No space left on device; free some space"):
    get_or_make(tmp_path, "rows", KEY, full)
  assert files(tmp_path) == ["rows"]


def test_a_root_that_is_a_file_is_an_input_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="file/rows cannot be written to: Not a directory; set cache="):
    get_or_make(tmp_path / "file", "rows", KEY, write)


# ---- damage


def flip(file: Path) -> None:
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 4
  file.write_bytes(content)


def renamed(entry: Path) -> None:
  """Puts the entry of another key in the place of `entry`."""
  other = get_or_make(entry.parents[1], "rows", fingerprint(a=2), write)
  shutil.rmtree(entry)
  other.rename(entry)


DAMAGES = {
  "flip": (lambda entry: flip(entry / "file"), "changed: file"),
  "flip in the sums": (lambda entry: flip(entry / "SHA256SUMS"), ""),
  "flip in the key": (lambda entry: flip(entry / "KEY"), "changed: KEY"),
  "truncated": (lambda entry: (entry / "file").write_text("cont"), "changed: file"),
  "deleted": (lambda entry: (entry / "file").unlink(), "missing: file"),
  "added": (lambda entry: (entry / "more").write_text("x"), "not in SHA256SUMS: more"),
  "renamed": (renamed, "it was renamed"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_entry_is_set_aside_and_made_again(damage, tmp_path, capfd):
  entry = get_or_make(tmp_path, "rows", KEY, write)
  break_entry, reason = DAMAGES[damage]
  break_entry(entry)
  assert (get_or_make(tmp_path, "rows", KEY, write) / "file").read_text() == "content"
  said = capfd.readouterr().err
  assert f"is damaged ({reason}" in said and f"is renamed to {entry.name}.damaged and created again" in said
  assert entry.with_name(f"{entry.name}.damaged").is_dir()
  get_or_make(tmp_path, "rows", KEY, lambda directory: pytest.fail("rebuilt"))


def test_an_entry_without_sums_gets_them_when_it_is_opened(tmp_path, capfd):
  entry = get_or_make(tmp_path, "rows", KEY, write)
  for name in ("SHA256SUMS", "KEY"):  # an older version wrote neither
    (entry / name).unlink()
  get_or_make(tmp_path, "rows", KEY, lambda directory: pytest.fail("rebuilt"))
  flip(entry / "file")
  get_or_make(tmp_path, "rows", KEY, write)
  assert "changed: file" in capfd.readouterr().err


COMPILE = """
import sys
import jax
from lora_exp.runtime.program_cache import keep_programs
keep_programs(sys.argv[1])
print(jax.jit(lambda x: x * 3 + 1)(2.0))
"""


def test_a_damaged_program_is_told_and_compiled_again(tmp_path):
  compiled = lambda: subprocess.run([sys.executable, "-c", COMPILE, str(tmp_path)], capture_output=True, text=True)
  assert compiled().stdout == "7.0\n"
  before = {file: file.read_bytes() for file in (tmp_path / "programs").iterdir()}
  assert before and all(b"SHA256" in content for content in before.values())
  for file in before:
    flip(file)
  done = compiled()
  assert done.stdout == "7.0\n" and done.stderr.count("is damaged; it is removed and compiled again") == len(before)
  done = compiled()
  assert (done.stdout, done.stderr) == ("7.0\n", "")
