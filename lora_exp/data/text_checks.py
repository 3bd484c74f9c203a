"""Finds signs that the texts of documents were damaged earlier, or that more is learned than was intended."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_exp.data.documents import Document

# What other formats put before the answers in a chat that is a single text.
ANSWER_MARKS = ("### Assistant", "### Response", "<|im_start|>assistant", "[/INST]", "<|start_header_id|>assistant",
                "<start_of_turn>model", "\nAssistant:", "\nASSISTANT:")
# UTF-8 that was read as Windows-1252: é, ä, ö, ü, ß, ’, “, –
MISREAD = ("Ã©", "Ã¤", "Ã¶", "Ã¼", "ÃŸ", "â€™", "â€œ", "â€“")
END_MARKS = ("</s>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
ENTITIES = ("&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&nbsp;")
INVISIBLE = ("\x00", "\ufeff", "\u200b")
PLACEHOLDERS = ("{instruction}", "{input}", "{question}", "{context}", "{prompt}")
LEAST_ECHO = 20  # characters of a prompt with which an answer begins
MISSING_VALUES = ("nan", "null", "none", "n/a", "#n/a", "<na>", "undefined")  # as programs write them; case is ignored


# What texts contain -> why it is suspicious.
SIGNS: dict[tuple[str, ...], str] = {
  ("\ufffd",): "they contain {}, which stands for characters that were lost earlier",
  MISREAD: "they contain {}, which is typical of UTF-8 text that was read in another encoding",
  ENTITIES: "they contain {}, which is HTML",
  INVISIBLE: "they contain the invisible character {}",
  PLACEHOLDERS: "they contain the placeholder {}, which was not filled in",
  ("\r\n",): "their lines end in {}, and the '\\r' is learned too",
}


def suspicions(document: Document, control_tokens: Collection[str] = ()) -> Iterator[str]:
  """What is suspicious about the texts of `document`, as in 'they contain …'.

  `control_tokens`: those of the tokenizer, whose names in texts are counted elsewhere.
  """
  texts = list(_texts(document))
  mark = _first_in(ANSWER_MARKS, texts)
  if mark is not None and document.conversation is None and not document.prompt:
    yield f"they contain a chat as one text ({mark.strip()!r}), so the user turns are learned too"
  elif mark is not None:
    yield f"they contain marks of a chat format ({mark.strip()!r}) in their texts"
  for marks, words in SIGNS.items():
    sign = _first_in(marks, texts)
    if sign is not None:
      yield words.format(_shown(sign))
  end = _first_in(END_MARKS, texts)
  if end is not None and end not in control_tokens:
    yield f"they contain {end!r}, which this tokenizer reads as ordinary text"
  if any(text.count("\\n") > 1 and "\n" not in text for text in texts):
    yield r"they contain '\n' as two characters instead of line breaks"
  if document.prompt.strip() and document.text.strip() == document.prompt.strip():
    yield "the answer is the prompt"
  elif len(document.prompt) >= LEAST_ECHO and document.text.startswith(document.prompt):
    yield "the answer begins with the prompt"
  for answer in _answers(document):
    if answer.strip().lower() in MISSING_VALUES:
      yield f"an answer is {answer.strip()!r}, perhaps a missing value"
      return


def _shown(sign: str) -> str:
  """`sign` in quotes, with escapes for what cannot be seen."""
  return f"'{sign}'" if sign.isprintable() else repr(sign)


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
