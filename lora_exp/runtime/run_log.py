"""lora_exp.log of a directory: what the program prints and logs, as plain text."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.runtime.console import log_opened

LOG_FILE = "lora_exp.log"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # as in conf/hydra/job_logging/file.yaml


def keep_log_off_stderr() -> None:
  """Adds a handler that does nothing if there is no handler, because absl, which orbax imports, would log to stderr."""
  root = logging.getLogger()
  if not root.handlers:
    root.addHandler(logging.NullHandler())


@contextmanager
def log_file(directory: Path) -> Iterator[None]:
  """Context in which the program's log lines are appended to lora_exp.log in `directory`."""
  logger = logging.getLogger("lora_exp")
  handler = logging.FileHandler(directory / LOG_FILE, encoding="utf-8", delay=True)
  handler.setFormatter(logging.Formatter(FORMAT))
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  keep_log_off_stderr()
  try:
    log_opened()
    yield
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)
    handler.close()
