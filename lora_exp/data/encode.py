"""Encoding of documents to token ids, with a mask of the tokens that are learned."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_exp.config.schema import DataConfig
from lora_exp.data.chat import encode_answers
from lora_exp.data.sources.source import Document
from lora_exp.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class EncodedDocument:
  """The token ids of a document, and which of them are learned."""

  ids: list[int]
  learned: np.ndarray | None  # (tokens,) bool: part of an answer; None: plain text, all of which is learned
  kind: str = "documents"  # documents (plain text) | answers (to a prompt) | conversations


def chat_template(cfg: DataConfig, tokenizer: Tokenizer) -> str | None:
  """The chat template that renders prompts and answers, or None."""
  return tokenizer.chat_template if cfg.chat == "auto" else None


def encode_documents(
  tokenizer: Tokenizer, documents: Sequence[Document], chat: bool, separator: str = ""
) -> list[EncodedDocument]:
  """Encodes each document as `bos` (if the tokenizer has one), prompt, text and the end-of-text token.

  With `chat`, prompt and text are turns of the tokenizer's chat template, which writes all control tokens. Without it,
  `separator` is put between them. Raises InputError if the template rejects a document.
  """
  with_prompt = [document for document in documents if document.prompt]
  if chat:
    pairs = iter(encode_answers(tokenizer, [(document.prompt, document.text) for document in with_prompt]))
  else:
    pairs = iter(_encode_pairs(tokenizer, [(document.prompt + separator, document.text) for document in with_prompt]))
  texts = iter(tokenizer.encode_batch([document.text for document in documents if not document.prompt]))
  encoded = []
  for document in documents:
    if document.prompt:
      prompt, answer = next(pairs)
      learned = np.arange(len(prompt) + len(answer)) >= len(prompt)
      encoded.append(EncodedDocument(prompt + answer, learned, "answers"))
    else:
      encoded.append(EncodedDocument([*_bos(tokenizer), *next(texts), tokenizer.eot], None))
  return encoded


def _encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
  """Returns for each (prompt, text) the ids of both: `bos` before the prompt, the end-of-text token after the text."""
  prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
  texts = tokenizer.encode_batch([text for _, text in pairs], start=False)
  return [([*_bos(tokenizer), *prompt], [*text, tokenizer.eot]) for prompt, text in zip(prompts, texts, strict=True)]


def _bos(tokenizer: Tokenizer) -> list[int]:
  """The token that begins every document, if there is one."""
  return [] if tokenizer.bos is None else [tokenizer.bos]
