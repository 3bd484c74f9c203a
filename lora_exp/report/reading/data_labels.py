"""Short names of data and files in tables, without directories of the machine."""

from typing import Any

from lora_exp.report.reading.run_record import RunRecord


def source_label(run: RunRecord, node: str) -> str:
  """The source of a data node with its view or file, such as `stdlib (docs)`; empty if the node is null."""
  source = run.config.get(f"{node}.source")
  if not source:
    return ""
  detail = run.config.get(f"{node}.view") or last_part(run.config.get(f"{node}.path"))
  return f"{source} ({detail})" if detail else str(source)


def last_part(path: Any) -> str:
  """The last part of each path, without directories of the machine; a hub id unchanged; empty for None."""
  if isinstance(path, list):
    return ", ".join(map(last_part, path))
  text = str(path or "")
  return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~", ".")) else text
