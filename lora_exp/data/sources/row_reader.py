"""The interface of readers of `data.path`: files on disk, or a Hugging Face dataset."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from lora_exp.data.documents import Document, Skipped
from lora_exp.data.formats.row import Row


class RowReader(ABC):
  """Reads rows. Creating a reader reads nothing."""

  @property
  @abstractmethod
  def label(self) -> str:
    """The name of the data in messages."""

  @property
  def size(self) -> int | None:
    """Total bytes for the progress bar, or None if unknown."""
    return None

  @property
  @abstractmethod
  def format_words(self) -> str:
    """The format, for the table before training."""

  @property
  def file_formats(self) -> Sequence[str]:
    """The format of each file, if there are files."""
    return ()

  @property
  def is_one_json_lines_file(self) -> bool:
    """Whether the data is one file of JSON lines, the only format of version 0.1.0."""
    return False

  @abstractmethod
  def identity(self) -> Mapping[str, object]:
    """Everything that determines the rows, as keywords of a fingerprint."""

  @abstractmethod
  def rows(self) -> Iterator[Row]:
    """The rows in order, without those of the split that is held out."""

  @abstractmethod
  def left_out(self) -> Iterator[Skipped]:
    """The files or splits that are not read."""

  def texts(self) -> Iterator[Document]:
    """The documents of plain text files; their keys count from 0."""
    yield from ()

  def text_facts(self) -> dict[str, object]:
    """How plain text is divided, for the table before training."""
    return {}
