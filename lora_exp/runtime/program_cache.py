"""The cache of compiled programs: JAX's persistent compilation cache, with a checksum in every file.

JAX writes a program without a checksum, and not atomically. With the `zstandard` package installed, a flipped bit would
load as another program. Here each file ends with the SHA-256 of its content. A file that does not match is removed and
the program is compiled again. A file that JAX wrote itself is read if zlib, which has a checksum, can read it.

JAX has no public interface to replace how programs are read and written, so a private one is used if it exists.
Otherwise programs are not kept: every process compiles its own, and nothing else changes.
"""

import hashlib
import zlib
from pathlib import Path

import jax

from lora_exp.runtime.cache import PROGRAMS
from lora_exp.runtime.console import show_warning

MARK = b"SHA256 of key and program"  # at the end of a file, after the digest
OLD_MARK = b"SHA256"  # of a digest of the program alone
DIGEST = hashlib.sha256().digest_size  # bytes

try:
  from jax._src import compilation_cache
  from jax._src.compilation_cache_interface import CacheInterface

  _jax_file_cache, _reset = compilation_cache.get_file_cache, compilation_cache.reset_cache
except (ImportError, AttributeError):  # another version of JAX
  compilation_cache, CacheInterface = None, object  # type: ignore[assignment, misc]


def keep_programs(cache: str) -> None:
  """Enables JAX's persistent compilation cache in `cache`/programs, for programs of any size, if it can be checked."""
  if compilation_cache is None:
    jax.config.update("jax_compilation_cache_dir", None)
    return
  directory = str(Path(cache).expanduser() / PROGRAMS)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  is_checked = compilation_cache.get_file_cache is _checked_file_cache
  if is_checked and jax.config.values["jax_compilation_cache_dir"] == directory:
    return
  compilation_cache.get_file_cache = _checked_file_cache
  jax.config.update("jax_compilation_cache_dir", directory)
  _reset()  # JAX opens the cache once, perhaps before this call


def _checked_file_cache(path: str) -> tuple[CacheInterface, str] | None:
  """JAX's cache of files at `path`, with checksums."""
  found = _jax_file_cache(path)
  return None if found is None else (CheckedPrograms(found[0], Path(path)), found[1])


class CheckedPrograms(CacheInterface):
  """Adds a checksum to what `files` stores in `directory`, and compares it when a program is read."""

  def __init__(self, files: CacheInterface, directory: Path):
    self.files, self._path = files, directory

  def get(self, key: str) -> bytes | None:
    """The program of `key`; None if there is none, or if its file is damaged."""
    content = self.files.get(key)
    if content is None:
      return None
    program = _verified(key, content)
    if program is not None:
      return program
    file = self._path / f"{key}-cache"
    show_warning(f"the compiled program {file} is damaged; it is removed and compiled again")
    file.unlink(missing_ok=True)
    return None

  def put(self, key: str, value: bytes) -> None:
    """Stores the program of `key`, with its checksum."""
    self.files.put(key, value + _digest(key, value) + MARK)


def _digest(key: str, program: bytes) -> bytes:
  """The checksum of a program. It covers the key, so that the file of another program is noticed."""
  return hashlib.sha256(key.encode() + b"\0" + program).digest()


def _verified(key: str, content: bytes) -> bytes | None:
  """The program in the `content` of the file of `key`, or None if it does not match its checksum or has none."""
  for mark in (MARK, OLD_MARK):
    if content.endswith(mark):
      program, digest = content[: -len(mark) - DIGEST], content[-len(mark) - DIGEST : -len(mark)]
      expected = _digest(key, program) if mark == MARK else hashlib.sha256(program).digest()
      return program if digest == expected else None
  return content if _is_whole_zlib(content) else None


def _is_whole_zlib(content: bytes) -> bool:
  """Whether `content` is one compressed stream of zlib, with a matching checksum and nothing after it."""
  stream = zlib.decompressobj()
  try:
    stream.decompress(content)
  except zlib.error:
    return False
  return stream.eof and not stream.unused_data
