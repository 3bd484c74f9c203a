"""The name under which version 0.1.0 read JSON lines; every file that `files` reads can be read under it."""

from dataclasses import dataclass

from lora_exp.data.sources.files import Files


@dataclass(frozen=True)
class JsonLines(Files):
  """The source `files` under its former name, which the keys of cached rows contain."""

  name = "jsonl"
