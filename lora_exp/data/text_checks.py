"""Signs in the texts of documents that something went wrong before, or that more is learned than was meant."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_exp.data.sources.source import Document

# What other formats put before the answers in a chat that is a single text.
ANSWER_MARKS = ("### Assistant", "### Response", "<|im_start|>assistant", "[/INST]", "<|start_header_id|>assistant",
                "<start_of_turn>model", "\nAssistant:", "\nASSISTANT:")
# UTF-8 that was read as Windows-1252: é, ä, ö, ü, ß, ’, “, –
MISREAD = ("Ã©", "Ã¤", "Ã¶", "Ã¼", "ÃŸ", "â€™", "â€œ", "â€“")
MISSING_VALUES = ("nan", "null", "none", "n/a", "#n/a", "<na>", "undefined")  # as programs write them; case is ignored


def suspicions(document: Document) -> Iterator[str]:
  """What is suspicious about the texts of `document`, as in 'they contain …'."""
  texts = list(_texts(document))
  is_plain = document.conversation is None and not document.prompt
  mark = _first_in(ANSWER_MARKS, texts)
  if mark is not None and is_plain:
    yield f"they contain a chat as one text ({mark.strip()!r}), so the turns of the user are learned too"
  elif mark is not None:
    yield f"they contain marks of a chat format ({mark.strip()!r}) in their texts"
  if _first_in(("\ufffd",), texts) is not None:
    yield "they contain '\ufffd', which stands for characters that were lost before"
  misread = _first_in(MISREAD, texts)
  if misread is not None:
    yield f"they contain {misread!r}, as text in UTF-8 does that was read in another encoding"
  if _first_in(("\r\n",), texts) is not None:
    yield r"their lines end in '\r\n', and the '\r' is learned too"
  for answer in _answers(document):
    if answer.strip().lower() in MISSING_VALUES:
      yield f"an answer is {answer.strip()!r}, perhaps a missing value"
      return


def _first_in(marks: tuple[str, ...], texts: list[str]) -> str | None:
  """The first of `marks` that one of `texts` contains, or None."""
  return next((mark for mark in marks if any(mark in text for text in texts)), None)


def _texts(document: Document) -> Iterator[str]:
  if document.conversation is None:
    yield from (document.prompt, document.text)
  else:
    yield from (_content(message) for message in document.conversation.messages)


def _answers(document: Document) -> Iterator[str]:
  if document.conversation is not None:
    yield from (_content(message) for message in document.conversation.messages if message.get("role") == "assistant")
  elif document.prompt:
    yield document.text


def _content(message: Mapping[str, Any]) -> str:
  content = message.get("content")
  return content if isinstance(content, str) else ""
