"""What a source yields: documents, one at a time."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Document:
  """A text to learn, after a prompt that is read but not learned (unless data.prompt_in_loss)."""

  key: int  # decides whether it is held out: the number of the document, or of the file or question it belongs to
  text: str
  prompt: str = ""
  read: int = 0  # bytes of the source read so far
  between: str = ""  # stands after the prompt where no chat template is used


class Source(Protocol):
  """What makes a corpus: its `name` in messages, `size` in bytes, `unit` the noun that is counted and held out."""

  name: str
  size: int
  unit: str

  def digest(self) -> str:
    """SHA-256 of the content."""

  def documents(self) -> Generator[Document, None, None]:
    """Every document in order, lazily; keys never fall."""
