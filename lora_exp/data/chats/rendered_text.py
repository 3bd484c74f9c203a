"""A rendered conversation as segments: its token ids, and which tokens overlap given spans of its characters."""

from collections.abc import Mapping, Sequence
from os.path import commonprefix

import numpy as np

from lora_exp.data.chats.guarded_chat import GuardedChat, Segment, encode_segments

Span = tuple[int, int]  # characters of a rendered text, with guards


class RenderedText:
  """A rendered text with its guards, divided into segments."""

  def __init__(self, chat: GuardedChat, text: str):
    self.chat, self.tokenizer, self.text = chat, chat.tokenizer, text
    self.segments = chat.segments(text, True)

  def encoded(self, texts: Mapping[tuple[str, bool], list[int]], spans: Sequence[Span]) -> tuple[list[int], np.ndarray]:
    """The token ids, and whether each overlaps one of `spans`, (tokens,) bool.

    `texts`: the ids of each text, by (text, at_start).
    """
    ids: list[int] = []
    masks = [np.zeros(0, bool)]
    for segment in self.segments:
      if segment.token is not None:
        ids.append(segment.token)
        masks.append(np.array([_overlaps(segment, spans)]))
        continue
      tokens = texts[segment.text, segment.at_start]
      ids += tokens
      masks.append(self._text_mask(segment, tokens, spans))
    return ids, np.concatenate(masks)

  def common_tokens_end(self, prompt: str) -> int:
    """The character at which the common prefix of the tokens of `prompt` and of this text ends."""
    parts = [self.chat.segments(prompt, True), self.segments]
    prompt_ids, ids = encode_segments(self.tokenizer, parts)
    remaining = len(commonprefix([prompt_ids, ids]))
    for segment in self.segments:
      tokens = [segment.token] if segment.token is not None else self.tokenizer.encode(segment.text, segment.at_start)
      if remaining < len(tokens):
        least = self._token_bounds(segment, tokens, ())[1][remaining - 1] if remaining else 0
        places = range(segment.begin, segment.end)
        return next(place for place in places if self._bytes_before(segment, place) >= least)
      remaining -= len(tokens)
    return len(self.text)

  def _text_mask(self, segment: Segment, tokens: list[int], spans: Sequence[Span]) -> np.ndarray:
    """Whether each token of a text overlaps one of `spans`."""
    inside = [span for span in spans if span[0] < segment.end and segment.begin < span[1]]
    mask = np.zeros(len(tokens), bool)
    if not inside:
      return mask
    if inside[0][0] <= segment.begin and segment.end <= inside[0][1]:
      return ~mask
    begins_N, ends_N = self._token_bounds(segment, tokens, inside)
    for span in inside:
      begin, end = (self._bytes_before(segment, place) for place in span)
      mask |= (begins_N < end) & (ends_N > begin)
    return mask

  def _bytes_before(self, segment: Segment, place: int) -> int:
    """The number of bytes of the segment's text before the character `place` of the rendered text."""
    return _size(self._plain(self.text[segment.begin : max(place, segment.begin)]))

  def _plain(self, text: str) -> str:
    return text.replace(self.chat.guard, "")

  def _token_bounds(
    self, segment: Segment, tokens: list[int], spans: Sequence[Span]
  ) -> tuple[np.ndarray, np.ndarray]:
    """The byte offsets in the segment's text at which the tokens begin and end, (n,) and (n,).

    They are exact at the ends of `spans`, and everywhere unless the tokenizer normalises texts.
    """
    lengths = self.tokenizer.byte_lengths[tokens]
    size = _size(segment.text)
    added = int(lengths.sum()) - size  # a tokenizer may put a space before a text
    if added in (0, 1):
      ends_N = np.cumsum(lengths) - added
      return np.maximum(ends_N - lengths, 0), ends_N
    # The tokenizer normalises texts, so byte lengths do not add up. Instead, the text up to each boundary is encoded.
    places = sorted({place for span in spans for place in span if segment.begin < place < segment.end})
    bounds = np.zeros(len(tokens) + 1, np.int64)
    bounds[-1] = size
    for place in places:
      part = self._plain(self.text[segment.begin : place])
      count = len(commonprefix([self.tokenizer.encode(part, segment.at_start), tokens]))
      bounds[count] = _size(part)
    bounds = np.maximum.accumulate(bounds)
    return bounds[:-1], np.maximum(bounds[1:], bounds[:-1] + 1)


def _size(text: str) -> int:
  """The number of bytes of `text` in UTF-8."""
  return len(text.encode(errors="surrogatepass"))


def _overlaps(segment: Segment, spans: Sequence[Span]) -> bool:
  return any(first < segment.end and segment.begin < last for first, last in spans)
