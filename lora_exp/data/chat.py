"""Renders messages with a model's chat template, and encodes them.

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
from os.path import commonprefix
from typing import Any, NamedTuple

from lora_exp.config.errors import InputError
from lora_exp.data.chat_template import ADVICE, MARKS, ChatTemplate, chat_template
from lora_exp.data.tokenizers import Tokenizer

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


class Answer(NamedTuple):
  """A question and its answer as token ids."""

  prompt: list[int]
  answer: list[int]  # including the end of its turn
  changed: int = 0  # how many of the two contents the template changes or leaves out
  missing: str = ""  # the end of the generation prompt, if the answer does not begin with it


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
  """The ids of `messages` with the generation prompt.

  Raises InputError if the tokenizer has no template, or if its template refuses the messages.
  """
  chat = GuardedChat(tokenizer, messages)
  return next(encode_segments(tokenizer, [chat.segments(chat.rendered(chat.messages, True), True)]))


def encode_answers(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
  """Encodes each (question, answer).

  Raises InputError if the template refuses the messages, or does not put the answer right after the prompt.
  """
  parts: list[list[Segment]] = []
  facts: list[tuple[int, str]] = []
  for question, answer in pairs:
    chat = GuardedChat(tokenizer, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    prompt_text, full_text, missing = prompt_and_full_text(chat)
    if missing:
      common = len(prompt_text) - len(missing)
      parts += [chat.segments(prompt_text, True), _first_turn(tokenizer, chat.segments(full_text, True), common)]
    else:
      parts += _prompt_and_answer(chat, prompt_text, full_text)
    facts.append((sum(not chat.has_text(full_text, content) for content in (question, answer)), missing))
  ids = encode_segments(tokenizer, parts)  # of prompts and answers in turn: each step of zip takes one of each
  return [_answer(prompt, answer, *fact) for prompt, answer, fact in zip(ids, ids, facts, strict=True)]


def _answer(prompt: list[int], answer: list[int], changed: int, missing: str) -> Answer:
  """Splits prompt and answer; if the prompt has a `missing` end, `answer` still begins with the prompt."""
  if missing:
    common = len(commonprefix([prompt, answer]))  # of the tokens, as in TRL
    prompt, answer = answer[:common], answer[common:]
  return Answer(prompt, answer, changed, missing)


class GuardedChat:
  """Messages under a tokenizer's template, with guards in their contents."""

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
    self.variables = {**tokenizer.template_variables, **(variables or {})}
    characters = set(json.dumps([list(messages), list(tools)], ensure_ascii=False, default=str))
    unused = (chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in characters)
    self.guard, self.before, self.after, self.sentinel = (next(unused) for _ in range(4))
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

  def has_text(self, rendered: str, content: str) -> bool:
    """Whether `rendered` contains `content`, as it is or as a JSON string. Spaces at its ends are ignored."""
    text, content = self._unguarded(rendered), content.strip()
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text or json.dumps(content)[1:-1] in text

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
    plain = self._unguarded(part)
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

  def _unguarded(self, text: str) -> str:
    """`text` without guards, including those that a template has escaped as JSON."""
    return text.replace(self.guard, "").replace(json.dumps(self.guard)[1:-1], "")


def prompt_and_full_text(chat: GuardedChat) -> tuple[str, str, str]:
  """The rendered prompt, the rendered conversation, and the end of the prompt that the conversation lacks (or '').

  The prompt is all messages but the last, with the generation prompt. A generation prompt may end in text that the
  conversation does not contain, such as `<think>`. What is learned then starts after the common prefix, as in TRL.
  Raises InputError if the rendering of the last message does not follow that of the others.
  """
  prompt_text, full_text = chat.rendered(chat.messages[:-1], True), chat.rendered(chat.messages, False)
  if full_text.startswith(prompt_text):
    return prompt_text, full_text, ""
  history = chat.rendered(chat.messages[:-1], False)
  if not (prompt_text.startswith(history) and full_text.startswith(history)):
    raise InputError(f"the chat template of {chat.tokenizer.name} does not continue its generation prompt with the "
                     f"answer; {ADVICE}")
  return prompt_text, full_text, prompt_text[common_prefix_length(prompt_text, full_text, len(history)) :]


class ControlNames:
  """Finds control tokens that a text spells out, such as `<|im_end|>`. They are encoded as ordinary text."""

  def __init__(self, tokenizer: Tokenizer):
    names = [token for token in tokenizer.special_tokens if len(token) > 1]
    self.beginnings = {name[:2] for name in names}  # searched first, because that is fast
    self.pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

  def first(self, *texts: str) -> str | None:
    """The first name in `texts`, or None."""
    for text in texts:
      if any(beginning in text for beginning in self.beginnings):
        match = self.pattern.search(text)
        if match is not None:
          return match[0]
    return None


def control_name_reason(name: str) -> str:
  """The reason in `unlearned` for a text that spells out the control token `name`."""
  return f"{name!r} in their text is encoded as ordinary text, not as the control token"


def common_prefix_length(prompt_text: str, full_text: str, least: int) -> int:
  """The length of the common prefix of two texts, at least `least`. It does not end inside a word."""
  common = commonprefix([prompt_text, full_text])
  return max(least, len(WORD_BEGINNING.sub("", common)))


OPENINGS = "openings of answers"  # the unit of `missing_reason`


def missing_reason(missing: str) -> str:
  """The reason in `unlearned` for answers that lack the `missing` end of the generation prompt."""
  return f"the chat template's generation prompt ends in {missing!r}, and the answers do not begin with it"


def _prompt_and_answer(chat: GuardedChat, prompt_text: str, full_text: str) -> tuple[list[Segment], list[Segment]]:
  """The segments of the prompt, and those of the answer up to the end of its turn."""
  prompt = chat.segments(prompt_text, True)
  start = not prompt or (prompt[-1].token is not None and chat.tokenizer.start_after_control)
  strips = prompt and prompt[-1].token is not None and chat.tokenizer.strips.get(prompt[-1].token, (False, False))[1]
  begin = len(prompt_text)
  if strips:
    begin = len(full_text) - len(full_text[begin:].lstrip())
  return prompt, _first_turn(chat.tokenizer, chat.segments(full_text, start, begin))


def _first_turn(tokenizer: Tokenizer, answer: list[Segment], begin: int = 0) -> list[Segment]:
  """`answer` up to the token that ends it: the first that stops generation, else its last control token, else `eot`.

  Control tokens before the character `begin` belong to the prompt and are not considered.
  """
  controls = [n for n, segment in enumerate(answer) if segment.token is not None and segment.begin >= begin]
  last = controls[-1] if controls else None
  end = next((n for n in controls if answer[n].token in tokenizer.stops), last)
  return [*answer, Segment(0, 0, tokenizer.eot)] if end is None else answer[: end + 1]


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
