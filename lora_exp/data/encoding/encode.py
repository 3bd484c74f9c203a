"""Encoding of documents to token ids, with a mask of the tokens that are learned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_exp.config.schema import DataConfig
from lora_exp.data.chats.chat import encode_answers
from lora_exp.data.chats.control_names import ControlNames, control_name_reason
from lora_exp.data.chats.conversations import encode_conversations
from lora_exp.data.chats.template_checks import TURNS, Problem
from lora_exp.data.documents import Document
from lora_exp.data.tokenization import Tokenizer


@dataclass(frozen=True)
class EncodedDocument:
  """The token ids of a document, and which of them are learned."""

  ids: list[int]
  learned: np.ndarray | None  # (tokens,) bool: part of an answer; None: plain text, all of which is learned
  kind: str = "documents"  # documents (plain text) | answers (to a prompt) | conversations
  totals: Mapping[str, int] = field(default_factory=dict)  # the numbers of turns that a chat template rendered, by unit
  problems: Mapping[Problem, int] = field(default_factory=dict)  # how many have it


def chat_template(cfg: DataConfig, tokenizer: Tokenizer) -> str | None:
  """The chat template that renders prompts and answers, or None."""
  return tokenizer.chat_template if cfg.chat == "auto" else None


def encode_documents(
  tokenizer: Tokenizer, documents: Sequence[Document], cfg: DataConfig, separator: str = ""
) -> list[EncodedDocument]:
  """Encodes each document as `bos` (if the tokenizer has one), prompt, text and the end-of-text token.

  Conversations are rendered by the tokenizer's chat template, which writes all control tokens; so are prompts with
  their texts, with data.chat=auto. Without a template, `separator` is put between prompt and text. Raises InputError
  if the template refuses a document.
  """
  has_template = chat_template(cfg, tokenizer) is not None
  loss = "all" if cfg.prompt_in_loss else cfg.loss
  conversations = [document.conversation for document in documents if document.conversation is not None]
  turns = iter(encode_conversations(tokenizer, conversations, loss, plain=not has_template))
  pairs = _encoded_pairs(tokenizer, [document for document in documents if document.prompt], has_template, separator)
  texts = iter(tokenizer.encode_batch([document.text for document in documents if _is_text(document)]))
  encoded = []
  control_names = ControlNames(tokenizer)
  for document in documents:
    if document.conversation is not None:
      conversation = next(turns)
      encoded.append(EncodedDocument(
        conversation.ids, conversation.learned, "conversations", conversation.totals, conversation.problems))
    elif document.prompt:
      encoded.append(_with_control_name(next(pairs), control_names.first(document.prompt, document.text)))
    else:
      plain = EncodedDocument([*_bos(tokenizer), *next(texts), tokenizer.eot], None)
      encoded.append(_with_control_name(plain, control_names.first(document.text)))
  encoded = [_with_unknown(document, tokenizer) for document in encoded]
  if not tokenizer.missing_bytes:
    return encoded
  return [_with_missing_bytes(one, _text_of(document), tokenizer)
          for one, document in zip(encoded, documents, strict=True)]


def _text_of(document: Document) -> str:
  """The text of a document, or those of the messages of its conversation."""
  if document.conversation is None:
    return document.prompt + document.text
  return "".join(str(message.get("content") or "") for message in document.conversation.messages)


def _with_missing_bytes(document: EncodedDocument, text: str, tokenizer: Tokenizer) -> EncodedDocument:
  """`document` with the problem that its `text` has characters that the tokenizer leaves out, if it has any."""
  if tokenizer.missing_bytes.isdisjoint(text.encode(errors="replace")):
    return document
  key = document.kind, "they have characters that are not in the tokenizer's vocabulary and are left out"
  return replace(document, problems={**document.problems, key: 1})


def _with_unknown(document: EncodedDocument, tokenizer: Tokenizer) -> EncodedDocument:
  """`document` with the problem that it contains the tokenizer's unknown token, if it does."""
  if tokenizer.unknown is None or tokenizer.unknown not in document.ids:
    return document
  key = document.kind, "they have characters that are not in the tokenizer's vocabulary and become its unknown token"
  return replace(document, problems={**document.problems, key: 1})


def _with_control_name(document: EncodedDocument, name: str | None) -> EncodedDocument:
  """`document` with the problem that its text spells out the control token `name`."""
  if name is None:
    return document
  return replace(document, problems={**document.problems, (document.kind, control_name_reason(name)): 1})


def _is_text(document: Document) -> bool:
  return document.conversation is None and not document.prompt


def _encoded_pairs(
  tokenizer: Tokenizer, documents: Sequence[Document], has_template: bool, separator: str
) -> Iterator[EncodedDocument]:
  """The encoded prompts and answers of `documents`."""
  if not has_template:
    for prompt, answer in _encode_pairs(tokenizer, [(one.prompt + separator, one.text) for one in documents]):
      yield EncodedDocument(prompt + answer, _after(prompt, answer), "answers")
    return
  for prompt, answer, problems in encode_answers(tokenizer, [(one.prompt, one.text) for one in documents]):
    yield EncodedDocument(prompt + answer, _after(prompt, answer), "answers", {TURNS: 2}, problems)


def _after(prompt: list[int], answer: list[int]) -> np.ndarray:
  """The mask of the answer's tokens in the tokens of prompt and answer."""
  return np.arange(len(prompt) + len(answer)) >= len(prompt)


def _encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
  """Returns for each (prompt, text) the ids of both: `bos` before the prompt, the end-of-text token after the text."""
  prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
  texts = tokenizer.encode_batch([text for _, text in pairs], start=False)
  return [([*_bos(tokenizer), *prompt], [*text, tokenizer.eot]) for prompt, text in zip(prompts, texts, strict=True)]


def _bos(tokenizer: Tokenizer) -> list[int]:
  """The token that begins every document, if there is one."""
  return [] if tokenizer.bos is None else [tokenizer.bos]
