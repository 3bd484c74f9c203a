"""What a data source yields: documents, conversations, and rows that cannot be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]  # a turn as chat templates read it: role, content, tool_calls, name, …


@dataclass(frozen=True)
class Conversation:
  """The turns of a conversation, in the form that chat templates read.

  Every message has a `role` and a `content` (a string, or None if it has `tool_calls`). Roles are system, user,
  assistant, tool, and others that the template accepts.
  """

  messages: tuple[Message, ...]
  prompt_messages: int = 0  # the number of first messages that are the prompt of the others, and are not learned
  zero_weight: frozenset[int] = frozenset()  # indices of messages of weight 0, which are never learned
  tools: tuple[Mapping[str, Any], ...] = ()  # the functions that may be called, as JSON schemas
  variables: Mapping[str, Any] = field(default_factory=dict)  # other variables of the template: enable_thinking


@dataclass(frozen=True)
class Document:
  """A text to learn, with a prompt that has no loss (unless data.prompt_in_loss=true); or a conversation."""

  key: int  # determines whether it is held out: index of the document, or of its file or question
  text: str
  prompt: str = ""
  read: int = 0  # bytes of the source read so far
  conversation: Conversation | None = None  # then `text` and `prompt` are empty
  unread: tuple[str, ...] = ()  # messages about parts of the row: "the column 'id' is not read"
  where: str = ""  # its place in the source, for messages: "pairs.jsonl, line 7"
  choices: tuple[str, ...] = ()  # the possible answers of a multiple-choice question, one of which is `text`
  columns: tuple[str, ...] = ()  # of its row: those with the messages, the prompt and response, or the text

  @property
  def characters(self) -> int:
    """The approximate number of characters."""
    if self.conversation is None:
      return len(self.prompt) + len(self.text)
    return sum(len(str(message.get("content"))) for message in self.conversation.messages)


@dataclass(frozen=True)
class Skipped:
  """A row of a source that cannot be used, or a file that is left out."""

  reason: str  # "the response is empty"
  where: str  # "pairs.jsonl, line 7"
  read: int = 0  # bytes of the source read so far
  unit: str = "rows"  # what is counted: rows, files or splits
