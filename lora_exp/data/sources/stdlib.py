"""Python's standard library: its code, or its docstrings."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data import python_text
from lora_exp.data.documents import Document
from lora_exp.data.sources.source import TextSource

VIEWS = ("code", "docs")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class StandardLibrary(TextSource):
  """The standard library without its tests, held out by file.

  view=code: each file's code without docstrings and comments. view=docs: each docstring.
  """

  name = "stdlib"
  unit = "files"
  label = "the standard library"

  view: str | None

  @cached_property
  def paths(self) -> list[Path]:
    """The files, in order."""
    return library_files()

  @property
  def size(self) -> int:
    return sum(path.stat().st_size for path in self.paths)

  def check(self) -> Iterator[str]:
    if self.view not in VIEWS:
      near = did_you_mean(self.view, VIEWS) if self.view else ""
      yield self.problem("view", f"choose {', '.join(VIEWS)}{near}")

  def digest(self) -> str:
    """SHA-256 (hex) of the files and of Python's version, on which the text of `ast.unparse` depends."""
    sha = hashlib.sha256(sys.version.encode())
    for path in self.paths:
      content = path.read_bytes()
      sha.update(f"{path.name} {len(content)}\n".encode())
      sha.update(content)
    return sha.hexdigest()

  def documents(self) -> Iterator[Document]:
    assert self.view is not None
    read = 0
    for key, (path, texts) in enumerate(zip(self.paths, parsed(self.paths, self.view), strict=True)):
      read += path.stat().st_size
      for text in texts:
        yield Document(key, text, read=read)


def library_files() -> list[Path]:
  """The *.py files of the standard library, by relative path, without tests, idlelib and installed packages."""
  root = sysconfig.get_paths()["stdlib"]
  files = []
  for parent, folders, names in os.walk(root):
    folders[:] = [folder for folder in folders if folder not in SKIPPED_FOLDERS]
    files += [Path(parent, name) for name in names if name.endswith(".py")]
  return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def parsed(paths: Sequence[Path], view: str, workers: int | None = None) -> Iterator[list[str]]:
  """Yields the texts of each Python file in order, parsed by `workers` processes (default: one per CPU).

  They are plain subprocesses, because the workers of a pool would import the caller's main module. Raises InputError if
  one of them dies.
  """
  workers = min(workers or os.cpu_count() or 1, len(paths))
  with ExitStack() as stack:
    pool = []
    for n in range(workers):
      command = [sys.executable, "-I", "-S", python_text.__file__, view]
      worker = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))  # noqa: S603 - Python and our file
      stack.callback(worker.kill)  # before Popen's wait, so that no worker survives a consumer that stops early
      assert worker.stdin is not None
      worker.stdin.write(b"\n".join(map(os.fsencode, paths[n::workers])))
      worker.stdin.close()
      pool.append(worker)
    for n, path in enumerate(paths):
      line = _output(pool[n % workers]).readline()
      if not line:
        raise InputError(f"the process that parses {path} died; see its message above")
      yield json.loads(line)


def _output(worker: subprocess.Popen) -> IO[bytes]:
  assert worker.stdout is not None
  return worker.stdout
