"""What every source of data is: its name, its settings with their checks, what it gives, and its identity."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from lora_exp.config.conversion import shown
from lora_exp.config.schema import DataConfig

COMMON = frozenset(setting.name for setting in dataclasses.fields(DataConfig)) - {"options"}  # typed as data.NAME
Shapes = dict[str, tuple[tuple[int, ...], str]]  # array's name -> (shape, dtype)


@dataclass(frozen=True)
class Document:
  """A text to learn, after a prompt that is read and not learned (unless data.prompt_in_loss=true)."""

  key: int  # decides whether it is held out: the number of the document, or of the file or question it belongs to
  text: str
  prompt: str = ""
  read: int = 0  # bytes of the source that have been read so far


def covered_by_digest(default: Any = dataclasses.MISSING) -> Any:
  """A setting that is not part of a source's identity, because `digest` changes whenever it changes the data.

  A path is one: the content of the file counts, and not its name.
  """
  return field(default=default, metadata={"covered_by_digest": True})


@dataclass(frozen=True)
class Source(ABC):
  """Where data comes from. A subclass is a frozen dataclass whose fields are its settings.

  A field named as a setting of `DataConfig` (view, path, seed, ...) has its value from `data.NAME`, any other from
  `data.options.NAME`. Making a source reads nothing.
  """

  name: ClassVar[str]  # as typed: data.source=NAME
  version: ClassVar[int] = 1  # raise it when the same files and settings come to give other data
  numeric: ClassVar[bool] = False  # gives examples of numbers, and no text

  def check(self) -> Iterator[str]:
    """Problems of the settings alone, one line each, best made by `problem`. No file is read here."""
    yield from ()

  def check_inputs(self) -> Iterator[str]:
    """Problems of the files and packages that it reads, one line each. They are looked for, and not read."""
    yield from ()

  def problem(self, setting: str, reason: str) -> str:
    """'data.SETTING=VALUE: REASON'. In a source of `data@retain`, `data.` is replaced before the message is shown."""
    key = setting if setting in COMMON else f"options.{setting}"
    return f"data.{key}={shown(getattr(self, setting))}: {reason}"

  @abstractmethod
  def digest(self) -> str:
    """SHA-256 (hex) of everything besides the settings that decides the data: files, versions of libraries."""

  def settings(self) -> dict[str, object]:
    """The settings that are part of the identity: all but those that are `covered_by_digest`."""
    fields = dataclasses.fields(self)
    return {setting.name: getattr(self, setting.name) for setting in fields
            if not setting.metadata.get("covered_by_digest")}

  def replace(self, **settings: object) -> Self:
    """The same source with other settings."""
    return dataclasses.replace(self, **settings)

  @classmethod
  @abstractmethod
  def batch_shapes(cls, batch_size: int, seq_len: int) -> Shapes:
    """The arrays of a batch of B rows of T positions: name -> (shape, dtype)."""


@dataclass(frozen=True)
class TextSource(Source):
  """A source of documents."""

  unit: ClassVar[str] = "documents"  # what is counted and held out
  prompt_separator: ClassVar[str | None] = None  # between prompt and text where no chat template is used;
  # None: what follows a prompt is no answer to it, so that samples go on from the plain prompt

  @property
  def label(self) -> str:
    """What messages call it."""
    return f"the source {self.name}"

  @property
  def size(self) -> int | None:
    """Bytes to read, where they are known: the length of the progress bar."""
    return None

  @abstractmethod
  def documents(self) -> Iterator[Document]:
    """Every document in order, lazily; keys count from 0 and never fall. Raises InputError for bad data."""

  def held_out(self) -> "TextSource | None":
    """The source of the held-out documents, or None: a share of this one's documents is held out."""
    return None

  def digest(self) -> str:
    """SHA-256 (hex) of all documents. It reads them; override it where the files can be hashed instead."""
    sha = hashlib.sha256()
    for document in self.documents():
      sha.update(json.dumps([document.key, document.prompt, document.text]).encode())
    return sha.hexdigest()

  @classmethod
  def batch_shapes(cls, batch_size: int, seq_len: int) -> Shapes:
    """tokens, targets, segments, positions (B, T) int32 and weights (B, T) float32."""
    ints = dict.fromkeys(("tokens", "targets", "segments", "positions"), ((batch_size, seq_len), "int32"))
    return {**ints, "weights": ((batch_size, seq_len), "float32")}


@dataclass(frozen=True)
class NumericSource(Source):
  """A source of examples for models that read no tokens: I features, and a class or O numbers to predict.

  A row is one example, and counts as one token wherever tokens are counted. Both splits hold every example.
  """

  numeric: ClassVar[bool] = True
  inputs: ClassVar[int]  # I
  outputs: ClassVar[int]  # classes, or numbers to predict (O)
  classes: ClassVar[bool]  # what is predicted is a class

  @abstractmethod
  def examples(self) -> tuple[np.ndarray, np.ndarray]:
    """x (N, I) float32 and y: classes (N,) int32, or numbers (N, O) float32."""

  def digest(self) -> str:
    """SHA-256 (hex) of the examples."""
    x_NI, y = self.examples()
    return hashlib.sha256(x_NI.tobytes() + y.tobytes()).hexdigest()

  @classmethod
  def batch_shapes(cls, batch_size: int, seq_len: int) -> Shapes:
    """x (B, I) float32, y (B,) int32 or (B, O) float32, and weights (B,) float32."""
    y = ((batch_size,), "int32") if cls.classes else ((batch_size, cls.outputs), "float32")
    return {"x": ((batch_size, cls.inputs), "float32"), "y": y, "weights": ((batch_size,), "float32")}
