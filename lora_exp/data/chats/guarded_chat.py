"""Messages under a chat template, with guards against forged control tokens.

The content of a message must not become a control token: `<|im_end|>` in a question must not end the turn. Before a
template is rendered, a guard, a character that no message contains, is inserted into every control token in a content.
A control token in the rendered text was therefore written by the template, and becomes that token. The text between
control tokens is encoded as ordinary text, without the guards. Contents are otherwise unchanged, so that a template
trims, splits and searches them as it does in any other library.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from os.path import commonprefix
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.chats.chat_template import ADVICE, MARKS, ChatTemplate, chat_template
from lora_exp.data.tokenization import Tokenizer

WORD_BEGINNING = re.compile(r"<?\w*\Z")
Message = Mapping[str, Any]  # {"role": "user", "content": "Hello"}


@dataclass(frozen=True)
class Segment:
  """A part of a rendered text: a control token, or text between control tokens."""

  begin: int  # characters of the rendered text, with guards
  end: int
  token: int | None = None  # the control token; None for text
  text: str = ""  # without guards
  at_start: bool = False  # whether the text is encoded with start=True


class GuardedChat:
  """Messages under a tokenizer's template, with guards in their contents. `template` replaces the tokenizer's."""

  def __init__(
    self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None, template: str | None = None
  ):
    source = template or (tokenizer.tool_template if tools else None) or tokenizer.chat_template
    if source is None:
      raise InputError(f"the tokenizer {tokenizer.name} has no chat template; {ADVICE}")
    self.tokenizer = tokenizer
    self.template: ChatTemplate = chat_template(tokenizer.name, source)
    self.control_pattern = _control_pattern(tuple(tokenizer.special_tokens))
    self.is_plain, self.given_variables = template is not None, frozenset(variables or ())
    self.variables = {**tokenizer.template_variables, **(variables or {})}
    characters = set(json.dumps([list(messages), list(tools)], ensure_ascii=False, default=str))
    self.unused_characters = (chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in characters)
    self.guard, self.before, self.after, self.sentinel = islice(self.unused_characters, 4)
    self.messages: list[Message] = [self._guarded(message) for message in messages]
    self.tools = [self._guarded(tool) for tool in tools]

  def rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The rendered text of guarded `messages`, guards included."""
    return self.template.render(self.variables, messages, add_generation_prompt, self.tools)

  def marked(self) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text of all messages, guards included, and its spans that the template marks as generated."""
    variables = {**self.variables, MARKS: (self.before, self.after)}
    text, spans, begins = "", list[tuple[int, int]](), list[int]()
    marked = self.template.render(variables, self.messages, False, self.tools)
    for part in re.split(f"([{self.before}{self.after}])", marked):
      if part == self.before:
        begins.append(len(text))
      elif part == self.after:
        spans.append((begins.pop(), len(text)))
      else:
        text += part
    return text, spans

  def segments(self, text: str, start: bool, begin: int = 0) -> list[Segment]:
    """Splits `text`, guards included, from the character `begin` on at the control tokens that the template wrote.

    `start`: whether the first text is encoded with start=True.
    """
    segments: list[Segment] = []
    position, stripped = begin, False
    for match in self.control_pattern.finditer(text, begin):
      if match.start() < position:
        continue  # inside the token before
      token = self.tokenizer.special_tokens[match[1]]
      strips_left, strips_right = self.tokenizer.strips.get(token, (False, False))
      segments += self._text_segment(text, position, match.start(), start, stripped, strips_left)
      position, start, stripped = match.start() + len(match[1]), self.tokenizer.start_after_control, strips_right
      segments.append(Segment(match.start(), position, token))
    return segments + self._text_segment(text, position, len(text), start, stripped, False)

  def _text_segment(
    self, text: str, begin: int, end: int, start: bool, strip_left: bool, strip_right: bool
  ) -> list[Segment]:
    """The text from `begin` to `end`, without what control tokens strip and guards; [] if nothing is left."""
    part = text[begin:end]
    if strip_left:
      part = part.lstrip()
      begin = end - len(part)
    if strip_right:
      part = part.rstrip()
      end = begin + len(part)
    plain = self.without_guards(part)
    return [Segment(begin, end, None, plain, start)] if plain else []

  def _guarded(self, value: Any) -> Any:
    """`value` with the guard inserted into every control token of its strings."""
    if isinstance(value, str):
      return self.control_pattern.sub(self._interrupted, value)
    if isinstance(value, Mapping):
      return {self._guarded(key): self._guarded(item) for key, item in value.items()}
    return [self._guarded(item) for item in value] if isinstance(value, list | tuple) else value

  def _interrupted(self, match: re.Match[str]) -> str:
    return match[0] + self.guard

  def without_guards(self, text: str) -> str:
    """`text` without guards, including those that a template has escaped as JSON."""
    return text.replace(self.guard, "").replace(json.dumps(self.guard)[1:-1], "")


def common_prefix_length(prompt_text: str, full_text: str, least: int) -> int:
  """The length of the common prefix of two texts, at least `least`. It does not end inside a word."""
  common = commonprefix([prompt_text, full_text])
  return max(least, len(WORD_BEGINNING.sub("", common)))


def renamed_call(call: Any, name: str) -> Any:
  """The tool call, or tool, `call` with `name` as the name of its function."""
  if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
    return {**call, "function": {**call["function"], "name": name}}
  return {**call, "name": name} if isinstance(call, Mapping) else call


def encode_segments(tokenizer: Tokenizer, parts: Iterable[Sequence[Segment]]) -> Iterator[list[int]]:
  """The ids of each list of segments. Equal texts, which templates repeat, are encoded once, all in one batch."""
  parts = list(parts)
  encoded = encode_texts(tokenizer, parts)
  for segments in parts:
    ids: list[int] = []
    for segment in segments:
      ids += encoded[segment.text, segment.at_start] if segment.token is None else [segment.token]
    yield ids


def encode_texts(tokenizer: Tokenizer, parts: Iterable[Sequence[Segment]]) -> dict[tuple[str, bool], list[int]]:
  """The ids of the text of each segment that has one, by (text, at_start)."""
  texts = dict.fromkeys(
    (segment.text, segment.at_start) for segments in parts for segment in segments if segment.token is None)
  encoded: dict[tuple[str, bool], list[int]] = {}
  for start in (True, False):
    batch = [text for text in texts if text[1] == start]
    encoded.update(zip(batch, tokenizer.encode_batch([text for text, _ in batch], start), strict=True))
  return encoded


@cache
def _control_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
  """Matches a character at which one of `tokens` begins; group 1 is the longest that does. Overlaps are found too."""
  alternatives = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1)
  return re.compile(f"(?=({alternatives or '(?!)'})).", re.DOTALL)
