"""Reading of files that other programs wrote: an exception of a reader is reported as an error of the file."""

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.config.errors import InputError

# What Python raises for values of an unexpected type, range or size. It is chained, so HYDRA_FULL_ERROR=1 shows it.
CAUSES = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
          struct.error)  # fmt: skip
NO_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTDIR)  # errors of names in a file
LONGEST_CAUSE = 300  # characters


@contextmanager
def damage_reported(path: Path | str, kind: str) -> Iterator[None]:
  """Context in which an error of reading the file `path`, `kind` as in 'a tokenizer', is an InputError."""
  try:
    yield
  except CAUSES as error:
    cause = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_CAUSE]
    raise InputError(f"{path}: cannot be read as {kind}: it is damaged or in another format ({cause})") from error
  except OSError as error:
    if error.errno not in NO_NAMES:
      raise
    raise InputError(f"{path}: cannot be read as {kind}: it names an impossible file ({error.strerror})") from error
