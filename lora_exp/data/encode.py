"""Documents become ids: a prompt that is read, and a text that is learned."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_exp.config.schema import DataConfig
from lora_exp.data.chat import encode_answers
from lora_exp.data.sources.source import Document
from lora_exp.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class EncodedDocument:
  """A document's tokens, of which the first `prompt_tokens` are its prompt."""

  ids: list[int]
  prompt_tokens: int


def chat_template(cfg: DataConfig, tokenizer: Tokenizer) -> str | None:
  """The chat template that prompts and answers go through, or None."""
  return tokenizer.chat_template if cfg.chat == "auto" else None


def encode_documents(
  tokenizer: Tokenizer, documents: Sequence[Document], chat: bool, separator: str = ""
) -> list[EncodedDocument]:
  """The tokens of each document: its prompt, its text, and the token that ends it; `bos` first where there is one.

  With `chat`, prompt and text are turns of the tokenizer's chat template, which writes all control tokens; without, the
  `separator` stands between them. Raises InputError where the template does not take them.
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
      encoded.append(EncodedDocument(prompt + answer, len(prompt)))
    else:
      encoded.append(EncodedDocument([*_bos(tokenizer), *next(texts), tokenizer.eot], 0))
  return encoded


def _encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
  """For each (prompt, text) the ids of both, `bos` before the first and the end of the document after the second."""
  prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
  texts = tokenizer.encode_batch([text for _, text in pairs], start=False)
  return [([*_bos(tokenizer), *prompt], [*text, tokenizer.eot]) for prompt, text in zip(prompts, texts, strict=True)]


def _bos(tokenizer: Tokenizer) -> list[int]:
  """The token that begins every document, if there is one."""
  return [] if tokenizer.bos is None else [tokenizer.bos]
