"""The command line that started a sweep, and the day of its last event."""

import shlex
from contextlib import suppress
from pathlib import Path

import yaml

from lora_exp.config import InputError
from lora_exp.runtime.json_lines import read_ledger
from lora_exp.runtime.run_files import MULTIRUN

LEFT_OUT = ("hydra.mode=", "hydra.sweep.dir=")  # implied by -m, and a path on the training machine


def sweep_command(directory: Path) -> str | None:
  """The command as typed, without the sweep's directory; None if multirun.yaml is missing or damaged."""
  try:
    content = yaml.load((directory / MULTIRUN).read_text(encoding="utf-8"), yaml.CSafeLoader)
    overrides = content["hydra"]["overrides"]
    typed = [*overrides["task"], *overrides["hydra"]]
    shown = [text for text in typed if not text.startswith(LEFT_OUT)]
  except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
    return None
  return shlex.join(["python", "-m", "lora_exp", "-m", *shown])


def sweep_day(directory: Path) -> str | None:
  """The day (YYYY-MM-DD, UTC) of the last event in the sweep's ledger; None if there is none."""
  rows: list[dict] = []
  with suppress(InputError):  # with a damaged ledger, the report has no date
    rows = read_ledger(directory)
  times = [row["time"] for row in rows if isinstance(row.get("time"), str)]
  return max(times)[:10] if times else None
