"""metrics.jsonl of a run: one JSON object per logged step, written during training."""

import json
import math
import os
from pathlib import Path
from typing import Any

from lora_exp.config.errors import DiskError
from lora_exp.runtime.files import write_text_atomically
from lora_exp.runtime.json_lines import parse_metrics
from lora_exp.runtime.run_files import METRICS_FILE


class MetricsFile:
  """Appends rows to a run's metrics.jsonl, one line per row. Every row is flushed when it is logged."""

  def __init__(self, run_dir: Path, last_step: int | None):
    """Starts a new file. With `last_step`, continues the existing one without the rows of later steps.

    Raises DiskError if the file cannot be written.
    """
    self.path = Path(run_dir) / METRICS_FILE
    lines = []
    if last_step is not None and self.path.exists():
      lines = [line for line, row in parse_metrics(self.path) if row.get("step", 0) <= last_step]
    try:
      write_text_atomically(self.path, "".join(f"{line}\n" for line in lines), durable=True)
      self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
    except OSError as error:
      raise DiskError(f"{self.path}: cannot be written ({error.strerror})") from error

  def log(self, row: dict) -> None:
    """Appends `row`; NaN and infinity become null. Raises DiskError."""
    try:
      self.file.write(json.dumps({key: _json_value(value) for key, value in row.items()}) + "\n")
      self.file.flush()
    except OSError as error:
      raise DiskError(f"{self.path}: cannot be written ({error.strerror}); free disk space and resume") from error

  def sync(self) -> None:
    """Syncs the rows to disk, so that a power loss after the next checkpoint keeps them. Raises DiskError."""
    try:
      os.fsync(self.file.fileno())
    except OSError as error:
      raise DiskError(f"{self.path}: cannot be written ({error.strerror}); free disk space and resume") from error

  def close(self) -> None:
    """Closes the file."""
    self.file.close()


def _json_value(value: Any) -> Any:
  """Converts NumPy and JAX scalars to Python numbers, and NaN and infinity to None."""
  value = value.item() if hasattr(value, "item") else value
  return None if isinstance(value, float) and not math.isfinite(value) else value
