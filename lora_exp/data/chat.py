"""A prompt and its answer as turns of a chat: rendered by the model's own template, then encoded.

Text that people write stays text: `<|im_end|>` in a question must not end the turn. Before a template is rendered,
every control token that occurs in a content is interrupted by a character that no content has, the guard. What reads as
a control token afterwards was written by the template, and becomes that token. The guards are removed from the text in
between, which is encoded as ordinary text. Nothing else is changed in the contents that the template sees, so that it
trims, splits and searches as it does in any other library.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers import Tokenizer

Message = Mapping[str, str]  # {"role": "user", "content": "Hello"}
Segment = int | tuple[str, bool]  # a control token, or (text, whether it is encoded with start=True)
DATE = datetime(2024, 7, 26)  # as in Llama 3's template; today's date would make rows depend on the day
CODE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)  # of a template
ADVICE = "data.chat=none takes the prompt as it is"


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
  """The ids of `messages` and of the beginning of an answer to them.

  Raises InputError if the tokenizer has no template, or if its template refuses the messages.
  """
  return next(_encode_segments(tokenizer, [_Conversation(tokenizer, messages).prompt()]))


def encode_answers(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
  """Returns for each (question, answer) the ids of the question and of the answer, including the end of its turn.

  Raises InputError if the template refuses the messages, or does not put the answer right after the prompt.
  """
  conversations = [
    _Conversation(tokenizer, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    for question, answer in pairs]
  parts = (segments for conversation in conversations for segments in conversation.prompt_and_answer())
  ids = _encode_segments(tokenizer, parts)
  return list(zip(ids, ids, strict=True))


class _Conversation:
  """Messages under a tokenizer's template, with guards in their contents."""

  def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message]):
    if tokenizer.chat_template is None:
      raise InputError(f"the tokenizer {tokenizer.name} has no chat template; {ADVICE}")
    self.tokenizer, self.template = tokenizer, _compiled(tokenizer.chat_template)
    self.control_pattern = _control_pattern(tuple(tokenizer.special_tokens))
    contents = "".join(message["content"] for message in messages)
    private_use = map(chr, range(0xF0000, 0x110000))
    self.guard = next(character for character in private_use if character not in contents)
    self.messages = [{**message, "content": self._guarded(message["content"])} for message in messages]

  def prompt(self) -> list[Segment]:
    """All messages, and the beginning of an answer."""
    return self._segments(self._rendered(self.messages, True), start=True)

  def prompt_and_answer(self) -> tuple[list[Segment], list[Segment]]:
    """All messages but the last with the beginning of an answer, and the last message up to the end of its turn."""
    prompt_text, full_text = self._rendered(self.messages[:-1], True), self._rendered(self.messages, False)
    if not full_text.startswith(prompt_text):
      raise InputError(f"the chat template of {self.tokenizer.name} does not continue its generation prompt with the "
                       f"answer; {ADVICE}")
    prompt = self._segments(prompt_text, start=True)
    start = not prompt or (isinstance(prompt[-1], int) and self.tokenizer.start_after_control)
    return prompt, self._first_turn(self._segments(full_text[len(prompt_text) :], start))

  def _first_turn(self, answer: list[Segment]) -> list[Segment]:
    """`answer` up to the token that ends it: one that ends generation, else its last control token, else `eot`."""
    controls = [n for n, segment in enumerate(answer) if isinstance(segment, int)]
    last = controls[-1] if controls else None
    end = next((n for n in controls if answer[n] in self.tokenizer.stops), last)
    return [*answer, self.tokenizer.eot] if end is None else answer[: end + 1]

  def _guarded(self, content: str) -> str:
    """`content` with the guard inside every control token."""
    return self.control_pattern.sub(lambda match: match[0] + self.guard, content)

  def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    try:
      return self.template.render(**self.tokenizer.template_variables, messages=messages, tools=None, documents=None,
                                  add_generation_prompt=add_generation_prompt)
    except (TemplateError, *CODE_ERRORS) as error:
      raise InputError(f"the chat template of {self.tokenizer.name} fails: {error}; {ADVICE}") from error

  def _segments(self, text: str, start: bool) -> list[Segment]:
    """`text` split at the control tokens that the template wrote, without guards.

    `start`: whether the first text is encoded with start=True.
    """
    segments: list[Segment] = []
    position = 0
    for match in self.control_pattern.finditer(text):
      if match.start() < position:
        continue  # inside the token before
      token = match[1]
      segments += self._text_segment(text[position : match.start()], start)
      segments.append(self.tokenizer.special_tokens[token])
      position, start = match.start() + len(token), self.tokenizer.start_after_control
    return segments + self._text_segment(text[position:], start)

  def _text_segment(self, text: str, start: bool) -> list[Segment]:
    """`text` without guards, if anything is left of it."""
    text = text.replace(self.guard, "")
    return [(text, start)] if text else []


def _encode_segments(tokenizer: Tokenizer, parts: Iterable[list[Segment]]) -> Iterator[list[int]]:
  """The ids of each list of segments. Equal texts, which templates repeat, are encoded once, all in one batch."""
  parts = list(parts)
  texts = dict.fromkeys(segment for segments in parts for segment in segments if not isinstance(segment, int))
  ids: dict[Segment, list[int]] = {}
  for start in (True, False):
    batch = [segment for segment in texts if segment[1] == start]
    ids.update(zip(batch, tokenizer.encode_batch([text for text, _ in batch], start), strict=True))
  for segments in parts:
    encoded: list[int] = []
    for segment in segments:
      encoded += [segment] if isinstance(segment, int) else ids[segment]
    yield encoded


@cache
def _control_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
  """Matches a character at which one of `tokens` begins; group 1 is the longest that does. Overlaps are found too."""
  alternatives = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1)
  return re.compile(f"(?=({alternatives or '(?!)'})).", re.DOTALL)


@cache
def _compiled(template: str) -> Template:
  """Compiles `template`, which is untrusted, in jinja's sandbox, with the extensions that published models rely on."""
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
  environment.globals |= {"raise_exception": _raise_exception, "strftime_now": DATE.strftime, "namespace": _Namespace}
  environment.filters["tojson"] = _to_json
  try:
    return environment.from_string(template)
  except TemplateError as error:
    raise InputError(f"the chat template is not a Jinja template: {error}; {ADVICE}") from error


class _Generation(Extension):
  """`{% generation %}…{% endgeneration %}`, which marks the answer in a template. Renders its content unchanged."""

  tags = {"generation"}

  def parse(self, parser: Parser) -> Node:
    line = next(parser.stream).lineno
    return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
  """Jinja's namespace without names that begin with an underscore, which can escape the sandbox."""

  def __setitem__(self, name: str, value: Any) -> None:
    if name.startswith("_"):
      raise SecurityError(f"a template must not set {name}")
    super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
  raise TemplateError(message)


def _to_json(value: Any, **settings: Any) -> str:
  """Jinja's `tojson`, which transformers replaces: it does not escape HTML."""
  return json.dumps(value, ensure_ascii=settings.pop("ensure_ascii", False), **settings)
