"""The base classes of data sources: name, settings and their checks, documents or examples, identity for the cache."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lora_exp.config.conversion import shown
from lora_exp.config.schema import DataConfig
from lora_exp.data.documents import Document, Message, Skipped

if TYPE_CHECKING:
  import numpy as np

COMMON = frozenset(setting.name for setting in dataclasses.fields(DataConfig)) - {"options"}  # typed as data.NAME
Shapes = dict[str, tuple[tuple[int, ...], str]]  # array's name -> (shape, dtype)
EXAMPLE, EXAMPLE_TURNS = 300, 6  # characters of a text, and turns, in the table before training


def example_facts(document: Document) -> dict[str, object]:
  """The first document, for the table before training: its text, its prompt and response, or its turns."""
  if document.conversation is not None:
    turns = document.conversation.messages
    facts: dict[str, object] = {
      f"first example, {n}. {turn['role']}": _shortened(turn) for n, turn in enumerate(turns[:EXAMPLE_TURNS], 1)}
    more = len(turns) - EXAMPLE_TURNS
    return facts | ({"first example, then": f"{more} more turns"} if more > 0 else {})
  if document.prompt:
    return {"first prompt": _shortened(document.prompt), "first response": _shortened(document.text)}
  return {"first text": _shortened(document.text)}


def _shortened(value: Message | str) -> str:
  """The beginning of a text, or of the content of a message."""
  text = value if isinstance(value, str) else str(value.get("content") or json.dumps(value.get("tool_calls")))
  return text if len(text) <= EXAMPLE else f"{text[:EXAMPLE]}… ({len(text):,} characters)"


def covered_by_digest(default: Any = dataclasses.MISSING) -> Any:
  """A setting that is not part of a source's identity, because `digest` changes whenever it changes the data.

  A path is an example: the content of the file matters, not its name.
  """
  return field(default=default, metadata={"covered_by_digest": True})


@dataclass(frozen=True)
class Source(ABC):
  """A data source. A subclass is a frozen dataclass whose fields are its settings.

  A field with the name of a `DataConfig` setting (view, path, seed, ...) has the value of `data.NAME`, any other field
  that of `data.options.NAME`. Creating a source reads no files.
  """

  name: ClassVar[str]  # data.source=NAME
  version: ClassVar[int] = 1  # raise it when the same files and settings yield other data
  numeric: ClassVar[bool] = False  # yields numeric examples instead of text

  def check(self) -> Iterator[str]:
    """Yields the problems of the settings alone, one line each, formatted by `problem`. Must not read files."""
    yield from ()

  def check_inputs(self) -> Iterator[str]:
    """Yields the problems of required files and packages, one line each. Checks only that they exist."""
    yield from ()

  def problem(self, setting: str, reason: str) -> str:
    """Formats 'data.SETTING=VALUE: REASON'. For other groups such as `data@retain`, the caller replaces `data.`."""
    key = setting if setting in COMMON else f"options.{setting}"
    return f"data.{key}={shown(getattr(self, setting))}: {reason}"

  @abstractmethod
  def digest(self) -> str:
    """SHA-256 (hex) of everything except the settings that determines the data: files, versions of libraries."""

  def settings(self) -> dict[str, object]:
    """The settings that are part of the identity: all except those `covered_by_digest`."""
    fields = dataclasses.fields(self)
    return {setting.name: getattr(self, setting.name) for setting in fields
            if not setting.metadata.get("covered_by_digest")}

  def replace(self, **settings: object) -> Self:
    """Returns a copy with other settings."""
    return dataclasses.replace(self, **settings)

  @classmethod
  @abstractmethod
  def batch_shapes(cls, batch_size: int, seq_len: int) -> Shapes:
    """The arrays of a batch of B rows of T positions: name -> (shape, dtype)."""


@dataclass(frozen=True)
class TextSource(Source):
  """A source of documents."""

  unit: ClassVar[str] = "documents"  # what is counted and held out
  prompt_separator: ClassVar[str | None] = None  # put between prompt and text without a chat template;
  # None: the text is not an answer to the prompt, so samples continue the plain prompt

  @property
  def label(self) -> str:
    """The name of the source in messages."""
    return f"the source {self.name}"

  @property
  def size(self) -> int | None:
    """Total bytes for the progress bar, or None if unknown."""
    return None

  @property
  def counts_rest(self) -> bool:
    """Whether the documents that follow after data.limit are read too, to count them."""
    return False

  @abstractmethod
  def documents(self) -> "Iterator[Document | Skipped]":
    """Yields every document in order; keys start at 0 and never decrease.

    A row that cannot be used is yielded as `Skipped`. Raises InputError for bad data.
    """

  def separator(self) -> str | None:
    """The text between a prompt and its answer; None if documents have no answers, see `prompt_separator`."""
    return self.prompt_separator

  def file_formats(self) -> Sequence[str]:
    """The format in which each file is read; () if the source reads no files, or files of one format only."""
    return ()

  def has_conversations(self) -> bool:
    """Whether the first document is a conversation."""
    return False

  def facts(self) -> dict[str, object]:
    """What is read, for the table before training: name -> value. {}: the settings already show it."""
    return {}

  def held_out(self) -> "TextSource | None":
    """The source of the held-out documents, or None if a share of this source's documents is held out."""
    return None

  def digest(self) -> str:
    """SHA-256 (hex) of all documents, which it reads. Override it if files can be hashed instead."""
    sha = hashlib.sha256()
    for document in self.documents():
      if isinstance(document, Skipped):
        continue
      turns = [] if document.conversation is None else [repr(document.conversation)]
      sha.update(json.dumps([document.key, document.prompt, document.text, *turns]).encode())
    return sha.hexdigest()

  @classmethod
  def batch_shapes(cls, batch_size: int, seq_len: int) -> Shapes:
    """tokens, targets, segments, positions (B, T) int32 and weights (B, T) float32."""
    ints = dict.fromkeys(("tokens", "targets", "segments", "positions"), ((batch_size, seq_len), "int32"))
    return {**ints, "weights": ((batch_size, seq_len), "float32")}


@dataclass(frozen=True)
class NumericSource(Source):
  """A source of examples for models without tokens: I features, and a class or O numbers to predict.

  A row is one example and counts as one token. Both splits contain every example.
  """

  numeric: ClassVar[bool] = True
  inputs: ClassVar[int]  # I
  outputs: ClassVar[int]  # classes, or numbers to predict (O)
  classes: ClassVar[bool]  # whether targets are classes

  @abstractmethod
  def examples(self) -> "tuple[np.ndarray, np.ndarray]":
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
