"""Documents become ids: what is read first, and what is learned."""

from collections.abc import Sequence

from lora_exp.data.chat import encode_answers
from lora_exp.data.documents import Document
from lora_exp.data.tokenizers import Tokenizer

Ids = tuple[list[int], int]  # all tokens of a document, and how many of them are its prompt


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], chat: bool) -> list[Ids]:
  """Each document's ids: its prompt, then its text and the token that ends it, after `bos` where there is one.

  With `chat`, a prompt and its answer are turns of the tokenizer's chat template, which writes all control tokens.
  """
  prompt = lambda document: document.prompt if chat else document.prompt + document.between
  pairs = [(prompt(document), document.text) for document in documents if document.prompt]
  asked = iter((encode_answers if chat else _plain)(tokenizer, pairs))
  alone = iter(tokenizer.encode_batch([document.text for document in documents if not document.prompt]))
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  ids: list[Ids] = []
  for document in documents:
    if document.prompt:
      question, answer = next(asked)
      ids.append((question + answer, len(question)))
    else:
      ids.append(([*bos, *next(alone), tokenizer.eot], 0))
  return ids


def _plain(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
  texts = tokenizer.encode_batch([text for _, text in pairs], start=False)
  return [(bos + prompt, [*text, tokenizer.eot]) for prompt, text in zip(prompts, texts, strict=True)]
