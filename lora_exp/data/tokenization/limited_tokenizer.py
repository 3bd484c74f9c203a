"""A tokenizer with more tokens than the embedding table has rows. It is usable until a text needs one without a row."""

from collections.abc import Mapping, Sequence

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization.tokenizer import Tokenizer


class KnownTokens(dict[str, int]):
  """{token: id} of the control tokens. Looking up a token whose id has no row raises InputError."""

  def __init__(self, ids: Mapping[str, int], rows: int, advice: str):
    super().__init__(ids)
    self.rows, self.advice = rows, advice

  def __getitem__(self, token: str) -> int:
    i = super().__getitem__(token)
    if i >= self.rows:
      raise _without_row(token, i, self.rows, self.advice)
    return i


class LimitedTokenizer:
  """`tokenizer`, for a model whose embedding table has `rows` rows.

  Text and templates that need a further token raise InputError with `advice`, which says what to do.
  """

  def __init__(self, tokenizer: Tokenizer, rows: int, advice: str):
    self._inner, self._advice = tokenizer, advice
    self.name, self.fingerprint, self.vocab_size = tokenizer.name, tokenizer.fingerprint, rows
    self.eot, self.bos = tokenizer.eot, tokenizer.bos
    self.stops = tuple(i for i in tokenizer.stops if i < rows)
    self.byte_lengths = tokenizer.byte_lengths[:rows]
    self.special_tokens: Mapping[str, int] = KnownTokens(tokenizer.special_tokens, rows, advice)
    self.chat_template, self.template_variables = tokenizer.chat_template, tokenizer.template_variables
    self.tool_template, self.strips, self.unknown = tokenizer.tool_template, tokenizer.strips, tokenizer.unknown
    self.missing_bytes = tokenizer.missing_bytes
    self.start_after_control = tokenizer.start_after_control

  def encode(self, text: str, start: bool = True) -> list[int]:
    """Returns the ids of `text`. Raises InputError if one has no row."""
    return self.encode_batch([text], start)[0]

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    """`encode` of each text."""
    encoded = self._inner.encode_batch(texts, start)
    for ids in encoded:
      largest = max(ids, default=0)
      if largest >= self.vocab_size:
        token = self._inner.decode([largest], start=False)
        raise _without_row(token, largest, self.vocab_size, self._advice)
    return encoded

  def decode(self, ids: Sequence[int], start: bool = True) -> str:
    """Returns the text of `ids`."""
    return self._inner.decode(ids, start)


def _without_row(token: str, i: int, rows: int, advice: str) -> InputError:
  return InputError(f"a text needs the token {token!r} with the id {i}, and the embedding table has only {rows} rows "
                    f"(model.vocab_size); {advice}")
