"""Where text comes from: every source by name, and those that read the standard library, a text file, a JSONL file."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import DataConfig
from lora_exp.data import python_text
from lora_exp.data.chatterbot import Chatterbot
from lora_exp.data.documents import Document, Source
from lora_exp.data.synthetic import Arithmetic, Sentences

SEPARATOR = b"<|endoftext|>"
LONGEST = 2**20  # bytes of a document before it is cut at a newline
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def get_source(cfg: DataConfig, field: str = "path") -> Source:
  """The source that `cfg` describes; text and jsonl are read from the file that `cfg.<field>` names. InputError."""
  makers: dict[str, Callable[[], Source]] = {
    "stdlib": lambda: Stdlib(cfg.view), "text": lambda: Text(_file(cfg, field)),
    "jsonl": lambda: Jsonl(_file(cfg, field), cfg.prompt_field, cfg.response_field),
    "chatterbot": Chatterbot, "arithmetic": lambda: Arithmetic(cfg.seed, cfg.limit),
    "sentences": lambda: Sentences(cfg.sentences, cfg.repeat)}
  if cfg.source not in makers:
    raise InputError(f"data.source={cfg.source}: one of {', '.join(makers)}{did_you_mean(cfg.source, makers)}")
  return makers[cfg.source]()


def _file(cfg: DataConfig, field: str) -> Path:
  name = getattr(cfg, field)
  if not name:
    raise InputError(f"data.source={cfg.source} reads a file: set data.{field}")
  path = Path(name).expanduser()
  if path.is_file() and os.access(path, os.R_OK):
    return path
  if path.exists():
    raise InputError(f"data.{field}: {path} is not a file that can be read")
  others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
  raise InputError(f"data.{field}: there is no file {path}{did_you_mean(path.name, others)}")


class Stdlib:
  """Python's own standard library without its tests: view=code or view=docs. Held out by file."""

  name, unit = "the standard library", "files"

  def __init__(self, view: str | None):
    if view not in ("code", "docs"):
      raise InputError(f"data.view={view}: the source stdlib has the views code and docs")
    self.view = view
    self.paths = stdlib_files()
    self.size = sum(path.stat().st_size for path in self.paths)

  def digest(self) -> str:
    sha = hashlib.sha256(sys.version.encode())  # ast.unparse may differ between versions
    for path in self.paths:
      content = path.read_bytes()
      sha.update(f"{path.name} {len(content)}\n".encode())
      sha.update(content)
    return sha.hexdigest()

  def documents(self) -> Generator[Document, None, None]:
    read = 0
    for key, (path, texts) in enumerate(zip(self.paths, parsed(self.paths, self.view), strict=True)):
      read += path.stat().st_size
      for text in texts:
        yield Document(key, text, read=read)


def stdlib_files() -> list[Path]:
  """The standard library's *.py by relative path, without tests, idlelib and installed packages."""
  root = sysconfig.get_paths()["stdlib"]
  found = []
  for parent, folders, names in os.walk(root):
    folders[:] = [folder for folder in folders if folder not in NOT_LIBRARY]
    found += [Path(parent, name) for name in names if name.endswith(".py")]
  return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def parsed(paths: list[Path], view: str, workers: int | None = None) -> Iterator[list[str]]:
  """The texts of each Python file in order, parsed by `workers` processes (default: a CPU each).

  Plain subprocesses and not a pool: a pool's workers import the caller's main module, slowly or with its side effects.
  """
  workers = min(workers or os.cpu_count() or 1, len(paths))
  with ExitStack() as stack:
    pool = []
    for n in range(workers):
      worker = stack.enter_context(subprocess.Popen(
        [sys.executable, "-I", "-S", python_text.__file__, view], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
      stack.callback(worker.kill)  # runs first: a consumer that stops early leaves no worker behind
      assert worker.stdin is not None
      worker.stdin.write(b"\n".join(map(os.fsencode, paths[n::workers])))
      worker.stdin.close()
      pool.append(worker)
    for n, path in enumerate(paths):
      line = _answers(pool[n % workers]).readline()
      if not line:
        raise InputError(f"the worker that parses {path} died; see its message above")
      yield json.loads(line)


def _answers(worker: subprocess.Popen) -> IO[bytes]:
  assert worker.stdout is not None
  return worker.stdout


def file_digest(path: Path) -> str:
  """SHA-256 of a file's content."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class Text:
  """UTF-8 text with `<|endoftext|>` between documents; one longer than 1 MiB is cut at a newline into several."""

  unit = "documents"

  def __init__(self, path: Path):
    self.path, self.name, self.size = path, str(path), path.stat().st_size

  def digest(self) -> str:
    return file_digest(self.path)

  def documents(self) -> Generator[Document, None, None]:
    offset, line, key = 0, 1, 0
    with self.path.open("rb") as file:
      for piece, skipped in split_documents(file):
        try:
          text = piece.decode()
        except UnicodeDecodeError as error:
          line += piece.count(b"\n", 0, error.start)
          raise InputError(f"{self.path}, line {line}: byte {offset + error.start} is not UTF-8 ({error.reason}); "
                           "convert the file to UTF-8") from error
        if key == 0:
          text = text.removeprefix("\ufeff")
        offset += len(piece) + skipped
        line += piece.count(b"\n")
        if text.strip():
          yield Document(key, text, read=offset)
          key += 1


def split_documents(file: IO[bytes], block: int = 2**20) -> Iterator[tuple[bytes, int]]:
  """(document, bytes of the separator after it); holds a document and a `block` in memory, whatever the file."""
  rest = b""
  while read := file.read(block):
    *whole, rest = (rest + read).split(SEPARATOR)
    for document in whole:
      *pieces, last = _cut(document, LONGEST)
      yield from ((piece, 0) for piece in pieces)
      yield last, len(SEPARATOR)
    *pieces, rest = _cut(rest, LONGEST + len(SEPARATOR))  # its end may be part of a separator
    yield from ((piece, 0) for piece in pieces)
  yield from ((piece, 0) for piece in _cut(rest, LONGEST))


def _cut(document: bytes, keep: int) -> list[bytes]:
  """Pieces of at most LONGEST bytes cut off the beginning until at most `keep` bytes are left: the last piece."""
  pieces, start = [], 0
  while len(document) - start > keep:
    end = document.rfind(b"\n", start, start + LONGEST) + 1
    if end == 0:
      end = start + LONGEST
      while document[end] & 0xC0 == 0x80 and end > start + LONGEST - 3:  # not inside a character
        end -= 1
    pieces.append(document[start:end])
    start = end
  return [*pieces, document[start:]]


class Jsonl:
  """A JSON object on each line; the text of `response` is learned after that of `prompt`."""

  unit = "documents"

  def __init__(self, path: Path, prompt: str, response: str):
    self.path, self.name, self.size, self.fields = path, str(path), path.stat().st_size, (prompt, response)

  def digest(self) -> str:
    return file_digest(self.path)

  def documents(self) -> Generator[Document, None, None]:
    read = key = 0
    with self.path.open("rb") as file:
      for number, line in enumerate(file, 1):
        read += len(line)
        if not line.strip():
          continue
        try:
          prompt, response = self._texts(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
          raise InputError(f"{self.path}, line {number}: byte {read - len(line) + error.start} is not UTF-8 "
                           f"({error.reason}); convert the file to UTF-8") from error
        except InputError as error:
          raise InputError(f"{self.path}, line {number}: {error}") from error
        yield Document(key, response, prompt, read)
        key += 1

  def _texts(self, line: str) -> list[str]:
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise InputError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    except RecursionError as error:
      raise InputError("JSON nested too deeply") from error
    if not isinstance(record, dict):
      raise InputError(f"a JSON object is expected, this is {type(record).__name__}")
    return [_field(record, name) for name in self.fields]


def _field(record: dict[str, object], name: str) -> str:
  if name not in record:
    raise InputError(f"no field {name!r}, the fields are {', '.join(map(repr, record)) or 'none'}"
                     f"{did_you_mean(name, record)} (data.prompt_field and data.response_field name them)")
  value = record[name]
  if not isinstance(value, str):
    raise InputError(f"the field {name!r} holds {type(value).__name__}, a string is expected")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"the field {name!r} holds half of a surrogate pair at character {error.start}") from error
  return value
