"""Chat templates: untrusted Jinja, rendered in a sandbox with the functions that transformers offers to templates."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import CallBlock, ContextReference, Node
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.utils import Namespace

from lora_exp.config.errors import InputError
from lora_exp.data.chats.template_limits import LimitedEnvironment

DATE = datetime(2024, 7, 26)  # as in Llama 3's template; today's date would make rows depend on the day
CODE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
               MemoryError)  # of a template
ADVICE = "data.chat=none uses no template"
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS = "generation_marks"  # the variable with the two characters that are put around what the model generates
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the reasoning in a message


@dataclass(frozen=True)
class ChatTemplate:
  """A compiled template, and the name of its tokenizer for messages."""

  owner: str
  template: Template
  variables: frozenset[str]  # that it reads
  marks_generations: bool  # whether it has {% generation %} blocks around what the model generates

  def render(
    self, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = ()
  ) -> str:
    """The text of `messages`, with the generation prompt if `add_generation_prompt`.

    Raises InputError if the template refuses the messages.
    """
    _environment().rendering()
    try:
      return self.template.render(**{
        "tools": list(tools) or None, "documents": None, **variables, "messages": [_readable(m) for m in messages],
        "add_generation_prompt": add_generation_prompt})
    except (TemplateError, *CODE_ERRORS) as error:
      raise InputError(f"the chat template of {self.owner} fails: {error}; {ADVICE}") from error


def chat_template(owner: str, source: str) -> ChatTemplate:
  """Compiles the template `source` of the tokenizer `owner`. Raises InputError if it is not a Jinja template."""
  return ChatTemplate(owner, _compiled(source), _variables(source), GENERATION.search(source) is not None)


def _readable(message: Mapping[str, Any]) -> dict[str, Any]:
  """`message` as transformers passes it to templates: without null values, with the reasoning under all its names."""
  values = {name: value for name, value in message.items() if value is not None}
  reasoning = next((values[name] for name in REASONING if name in values), None)
  return values if reasoning is None else {"thinking": reasoning, **values, "reasoning_content": reasoning}


@cache
def _compiled(source: str) -> Template:
  """Compiles `source` with the extensions that published models rely on."""
  environment = _environment()
  try:
    code = environment.compile(environment.limited_nodes(source))
    return Template.from_code(environment, code, environment.make_globals(None))
  except (TemplateError, SyntaxError, *CODE_ERRORS) as error:  # SyntaxError: twenty loops inside one another
    raise InputError(f"the chat template is not a Jinja template: {error}; {ADVICE}") from error


@cache
def _variables(source: str) -> frozenset[str]:
  """The names of the variables that the template `source` reads."""
  return frozenset(find_undeclared_variables(_environment().parse(source)))


@cache
def _environment() -> LimitedEnvironment:
  environment = LimitedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
  environment.globals |= {"raise_exception": _raise_exception, "strftime_now": DATE.strftime, "namespace": _Namespace,
                          "dict": _Dict()}
  environment.filters["tojson"] = _to_json
  environment.limit_filters()
  return environment


class _Generation(Extension):
  """The tag `{% generation %}…{% endgeneration %}`. Puts the two characters of MARKS, if given, around its body."""

  tags = {"generation"}

  def parse(self, parser: Parser) -> Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return CallBlock(self.call_method("_marked", [ContextReference()]), [], [], body).set_lineno(line)

  def _marked(self, context: Context, caller: Macro) -> str:
    before, after = context.get(MARKS, ("", ""))
    return f"{before}{caller()}{after}"


class _Namespace(Namespace):
  """Jinja's namespace without names that begin with an underscore, which can escape the sandbox."""

  def __setitem__(self, name: str, value: Any) -> None:
    if name.startswith("_"):
      raise SecurityError(f"a template must not set {name}")
    super().__setitem__(name, value)


class _Dict:
  """`dict` as templates may use it: callable, with `fromkeys` and no other attribute."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict[Any, Any]:
    """`dict.fromkeys`."""
    return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
  raise TemplateError(message)


def _to_json(
  value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
  sort_keys: bool = False
) -> str:
  """Jinja's `tojson`, which transformers replaces: it does not escape HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
