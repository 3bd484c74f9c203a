"""The former name of the source `files`, which read only JSON lines in version 0.1.0."""

from dataclasses import dataclass

from lora_exp.data.sources.files import Files


@dataclass(frozen=True)
class JsonLines(Files):
  """The source `files` under its former name, which is part of the keys of cached rows."""

  name = "jsonl"
