"""lora_exp.log of a directory: what the program prints and logs, as plain text."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.config.errors import InputError
from lora_exp.runtime.console import log_opened

LOG_FILE = "lora_exp.log"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # as in conf/hydra/job_logging/file.yaml


def keep_log_off_stderr() -> None:
  """Adds a handler that does nothing if there is none; otherwise absl, which orbax imports, would log to stderr."""
  root = logging.getLogger()
  if not root.handlers:
    root.addHandler(logging.NullHandler())


@contextmanager
def loggers_restored() -> Iterator[None]:
  """Context that closes the handlers that were added inside it, so that the next run of a process has its own.

  Hydra adds handlers and never removes them.
  """
  loggers = (logging.getLogger(), logging.getLogger("lora_exp"))
  before = [(list(logger.handlers), logger.level) for logger in loggers]
  try:
    yield
  finally:
    for logger, (handlers, level) in zip(loggers, before, strict=True):
      for handler in list(logger.handlers):
        if handler not in handlers:
          logger.removeHandler(handler)
          handler.close()
      logger.setLevel(level)


@contextmanager
def log_file(directory: Path) -> Iterator[None]:
  """Context in which the program's log lines are appended to lora_exp.log in `directory`.

  A command that is refused (InputError) leaves an existing file as it was.
  """
  logger, file = logging.getLogger("lora_exp"), directory / LOG_FILE
  size = file.stat().st_size if file.is_file() else None
  handler = logging.FileHandler(file, encoding="utf-8", delay=True)
  handler.setFormatter(logging.Formatter(FORMAT))
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  keep_log_off_stderr()
  try:
    log_opened()
    yield
  except InputError:
    handler.flush()
    if size is not None:
      os.truncate(file, size)
    raise
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)
    handler.close()
