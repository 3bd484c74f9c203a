"""Atomic writes leave the old file or the new one, and locks end with the process that holds them."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.config.errors import DiskError, InputError, InUseError
from lora_exp.runtime.disk_errors import write_error
from lora_exp.runtime.files import file_problem, write_atomically, write_json, write_text_atomically
from lora_exp.runtime.locks import file_lock, run_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import pathlib, sys, time
from lora_exp.runtime.locks import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
  print("locked", flush=True)
  time.sleep(60)
"""


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_replaces_the_file(durable, tmp_path):
  file = tmp_path / "a.txt"
  for text in ("first", "zweite Fassung: é"):
    write_text_atomically(file, text, durable)
    assert file.read_text(encoding="utf-8") == text
  assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
  write_json(tmp_path / "a.json", {"b": [1]})
  assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1\n  ]\n}\n'


def test_a_failed_write_leaves_the_old_file(tmp_path):
  file = tmp_path / "a.txt"
  file.write_text("old")

  def fail(temporary: Path) -> None:
    temporary.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(OSError, match="No space left"):
    write_atomically(file, fail)
  assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_lock_ends_with_its_process(tmp_path):
  holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
  with pytest.raises(InUseError, match="another process is training here"), run_lock(tmp_path):
    pass
  holder.kill()
  holder.communicate()
  with run_lock(tmp_path), file_lock(tmp_path / ".lock", wait=False) as acquired:
    assert not acquired


@pytest.mark.parametrize(("code", "kind", "words"), [
  (errno.ENOSPC, DiskError, "No space left on device; free some space"),
  (errno.EDQUOT, DiskError, "free some space"),
  (errno.ENOTDIR, InputError, "a file is in the way; give another path"),
  (errno.EACCES, InputError, "Permission denied; give another path"),
])  # fmt: skip
def test_a_write_error_says_what_to_do(code, kind, words):
  error = write_error(OSError(code, os.strerror(code)), Path("/x"))
  assert type(error) is kind and words in str(error) and str(error).startswith("/x: ")


def test_a_path_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / "stories.txt").touch()
  assert file_problem("data.path", str(tmp_path / "stories.txt")) is None
  assert "did you mean stories.txt?" in str(file_problem("data.path", str(tmp_path / "storys.txt")))
  assert "is a directory; give a file" in str(file_problem("data.path", str(tmp_path)))
  assert "is a device; write its content to a file" in str(file_problem("prompt_file", "/dev/zero"))
