"""A question and its answer as the turns of a chat, the way the model was tuned: its own template, then its own ids.

What people write stays text: `<|im_end|>` in a question must not end the turn. Before a template is rendered, every
control token that a content spells is broken by a character that no content holds. After it, what still spells a
control token was written by the template and becomes that token; the rest is encoded as ordinary text, mended. The
template itself sees true contents, so that what it trims, splits or looks for is what it would in any other library.
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
TODAY = datetime(2024, 7, 26)  # for templates that write a date (Llama 3's default), lest rows depend on the day
FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)  # of a template's code
INSTEAD = "data.chat=none takes the prompt as it is"


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
  """The ids that ask for an answer to `messages`. Raises InputError if the template does not take them."""
  return next(_encoded(tokenizer, [_Chat(tokenizer, messages).prompt()]))


def encode_answers(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
  """For each (question, answer) the ids that ask, as `encode_chat`, and those of the answer with the end of its turn.

  Raises InputError if the template does not take them, or puts the answer elsewhere than after its prompt.
  """
  turns = [_Chat(tokenizer, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
           for question, answer in pairs]
  ids = _encoded(tokenizer, (pieces for chat in turns for pieces in chat.prompt_and_answer()))
  return list(zip(ids, ids, strict=True))


Pieces = list[int | tuple[str, bool]]  # a control token, or (text, whether it starts anew)


class _Chat:
  """A conversation under a tokenizer's template; its contents hold no control token."""

  def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message]):
    if tokenizer.chat_template is None:
      raise InputError(f"the tokenizer {tokenizer.name} has no chat template; {INSTEAD}")
    self.tokenizer, self.controls = tokenizer, _control_pattern(tuple(tokenizer.special_tokens))
    contents = "".join(message["content"] for message in messages)
    self.mark = next(chr(c) for c in range(0xF0000, 0x110000) if chr(c) not in contents)  # private use
    self.messages = [{**message, "content": self._broken(message["content"])} for message in messages]

  def prompt(self) -> Pieces:
    """All messages, and the beginning of an answer."""
    return self._pieces(self._rendered(self.messages, True), start=True)

  def prompt_and_answer(self) -> tuple[Pieces, Pieces]:
    """All messages but the last with the beginning of an answer, and the last message up to the end of its turn."""
    asked, whole = self._rendered(self.messages[:-1], True), self._rendered(self.messages, False)
    if not whole.startswith(asked):
      raise InputError(f"the chat template of {self.tokenizer.name} does not go on from its generation prompt with "
                       f"the answer; {INSTEAD}")
    prompt = self._pieces(asked, start=True)
    anew = not prompt or (isinstance(prompt[-1], int) and self.tokenizer.start_after_control)
    return prompt, self._one_turn(self._pieces(whole[len(asked) :], start=anew))

  def _one_turn(self, answer: Pieces) -> Pieces:
    """`answer` up to the token that ends it: one that ends generation, else its last control token, else `eot`."""
    controls = [n for n, piece in enumerate(answer) if isinstance(piece, int)]
    end = next((n for n in controls if answer[n] in self.tokenizer.stops), controls[-1] if controls else None)
    return [*answer, self.tokenizer.eot] if end is None else answer[: end + 1]

  def _broken(self, content: str) -> str:
    return self.controls.sub(lambda found: found[0] + self.mark, content)

  def _rendered(self, messages: Sequence[Message], ask: bool) -> str:
    assert self.tokenizer.chat_template is not None
    try:
      return _compiled(self.tokenizer.chat_template).render(
        **self.tokenizer.template_variables, messages=messages, add_generation_prompt=ask, tools=None, documents=None)
    except (TemplateError, *FAULTS) as error:
      raise InputError(f"the chat template of {self.tokenizer.name} fails: {error}; {INSTEAD}") from error

  def _pieces(self, text: str, start: bool) -> Pieces:
    """`text` cut at the control tokens that the template wrote; the texts between are mended."""
    pieces: Pieces = []
    at = 0
    for found in self.controls.finditer(text):
      if found.start() < at:
        continue  # inside the token before
      token = found[1]
      pieces += self._text(text[at : found.start()], start)
      pieces.append(self.tokenizer.special_tokens[token])
      at, start = found.start() + len(token), self.tokenizer.start_after_control
    return pieces + self._text(text[at:], start)

  def _text(self, text: str, start: bool) -> Pieces:
    return [(mended, start)] if (mended := text.replace(self.mark, "")) else []


def _encoded(tokenizer: Tokenizer, chats: Iterable[Pieces]) -> Iterator[list[int]]:
  """The ids of each list of pieces; all texts are encoded together, and each once: templates repeat theirs."""
  chats = list(chats)
  texts = dict.fromkeys(piece for pieces in chats for piece in pieces if not isinstance(piece, int))
  ids: dict[tuple[str, bool], list[int]] = {}
  for start in (True, False):
    alike = [piece for piece in texts if piece[1] == start]
    ids.update(zip(alike, tokenizer.encode_batch([text for text, _ in alike], start), strict=True))
  for pieces in chats:
    yield [i for piece in pieces for i in ([piece] if isinstance(piece, int) else ids[piece])]


@cache
def _control_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
  """Finds a character at which one of `tokens` begins, the longest that does, overlapping ones too."""
  words = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1)
  return re.compile(f"(?=({words or '(?!)'})).", re.DOTALL)


@cache
def _compiled(template: str) -> Template:
  """`template` with what templates of published models rely on, in jinja's sandbox: they come from strangers."""
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
  environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime, "namespace": _Namespace}
  environment.filters["tojson"] = _to_json
  try:
    return environment.from_string(template)
  except TemplateError as error:
    raise InputError(f"the chat template is no Jinja template: {error}; {INSTEAD}") from error


class _Generation(Extension):
  """`{% generation %}…{% endgeneration %}`, with which a template marks the answer, is what stands in it."""

  tags = {"generation"}

  def parse(self, parser: Parser) -> Node:
    line = next(parser.stream).lineno
    return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
  """Jinja's namespace; names with an underscore lead out of the sandbox."""

  def __setitem__(self, name: str, value: Any) -> None:
    if name.startswith("_"):
      raise SecurityError(f"a template must not set {name}")
    super().__setitem__(name, value)


def _refuse(message: str) -> NoReturn:
  raise TemplateError(message)


def _to_json(value: Any, **settings: Any) -> str:
  return json.dumps(value, ensure_ascii=settings.pop("ensure_ascii", False), **settings)
