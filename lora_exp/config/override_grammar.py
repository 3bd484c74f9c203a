"""Hydra's override grammar: parses overrides such as `key=value` and `group=choice`, and quotes their values.

Hydra stops at the first override that it cannot parse. `parse` parses all of them and returns one line per problem,
which says what to type instead.
"""

import itertools
import re
import shlex
from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

LONGEST = 10**5  # characters of an override
MOST_ITEMS = 2000  # of a list; the parser needs milliseconds for each
DEEPEST = 50  # brackets inside one another; the parser fails at some hundreds
WORDS = ("null", "true", "false", "nan", "inf")  # which the grammar does not read as text


def parse(texts: Sequence[str], loader: ConfigLoader | None = None) -> tuple[list[Override], list[str]]:
  """Returns the parsed overrides, and a problem for each one that cannot be parsed.

  `loader` finds the choices of a group for `glob(...)`.
  """
  parser = OverridesParser.create(config_loader=loader)
  overrides, problems = [], [problem for problem in map(_size_problem, texts) if problem]
  if problems:
    return [], problems
  value_of_previous = ""  # the value of the previous setting, if it was typed without '='
  for text, following in itertools.zip_longest(texts, texts[1:], fillvalue=""):
    if "=" not in text and not text.startswith("~"):
      if text != value_of_previous:
        value_of_previous = "" if "=" in following else following
        problems.append(_missing_equals(text, value_of_previous))
      continue
    try:
      overrides += parser.parse_overrides([text])
    except HydraException:
      problems.append(f"{text}: cannot be parsed{quoting_advice(text)}")
  return overrides, problems


def _size_problem(text: str) -> str | None:
  """The problem with an override that is too long or too deeply nested for the parser, or None."""
  key = text.partition("=")[0][:60]
  if len(text) > LONGEST:
    return f"{key}: has {len(text):,} characters, but at most {LONGEST:,} are allowed"
  if text.count(",") > MOST_ITEMS and not text.partition("=")[2].startswith(("'", '"')):
    return f"{key}: has {text.count(',') + 1:,} values, but at most {MOST_ITEMS:,} are allowed"
  depth = deepest = 0
  for letter in text:
    depth += (letter in "[{(") - (letter in "]})")
    deepest = max(deepest, depth)
  if deepest > DEEPEST:
    return f"{key}: its brackets are nested {deepest:,} deep, but at most {DEEPEST} levels are allowed"
  return None


def _missing_equals(text: str, value: str) -> str:
  if re.fullmatch(r"[\w.@/]+", text) and not re.fullmatch(r"[\d.]+", text):
    return f"{text}: a setting takes '=': {text}={value or 'VALUE'}"
  return f"{text}: not a setting; write key=value, with quotes around a value with spaces"


def quoting_advice(text: str) -> str:
  """'; its value needs quotes: …' with the override `text` quoted for a shell, or ''.

  >>> print(quoting_advice("lora.targets=re:(q|v)_proj"))
  ; its value needs quotes: 'lora.targets="re:(q|v)_proj"'
  """
  key, equals, value = text.partition("=")
  if re.fullmatch(r"[\w.@/]+=\S*( +[\w.@/]+=\S*)+", text):
    return f"; several overrides are in one pair of quotes, give them one by one: {' '.join(text.split())}"
  if value.startswith("[") and "]" not in value:
    return "; a list ends with ]"
  for candidate in _quoted_candidates(key, value) if equals else []:
    try:
      OverridesParser.create().parse_override(candidate)
    except HydraException:
      continue
    return f"; its value needs quotes: {shlex.quote(candidate)}"
  return ""


def _quoted_candidates(key: str, value: str) -> list[str]:
  """Quoted versions of `key=value`, the most likely first."""
  if mapping := re.fullmatch(r"\{(.*):\s*([\w.]+)\}", value, re.DOTALL):
    return [f"{key}={{{escaped(mapping[1])}: {mapping[2]}}}"]
  candidates = [f"{key}={quoted(value)}"]
  if re.fullmatch(r"\[.*\]", value, re.DOTALL):
    items = [item.strip() for item in value[1:-1].split(",")]
    words = [item if re.fullmatch(r"[\w.*]+", item) else quoted(item.strip("'\"")) for item in items]
    candidates.insert(0, f"{key}=[{','.join(words)}]")
  return candidates


def typed(key: str, value: str) -> str:
  """The override `key=value` as typed in a shell: quoted for Hydra's grammar and for the shell where they need it.

  >>> typed("run", "outputs/day/0-x"), typed("run", "my runs/lr=0.1")
  ('run=outputs/day/0-x', '\'run="my runs/lr=0.1"\'')
  """
  return shlex.quote(f"{key}={_plain_or_quoted(value)}")


def typed_list(key: str, values: Sequence[str]) -> str:
  """The override `key=[value,…]` as typed in a shell."""
  return shlex.quote(f"{key}=[{','.join(map(_plain_or_quoted, values))}]")


def _plain_or_quoted(value: str) -> str:
  plain = re.fullmatch(r"[A-Za-z/.][\w/.+@-]*", value) and value.lower() not in WORDS
  return value if plain else quoted(value)


def escaped(key: str) -> str:
  r"""`key` as a key of a mapping, which the grammar does not allow to be quoted: re\:\(q|v\)."""
  return re.sub(r"([][(){}:=, ])", r"\\\1", key)


def quoted(value: str) -> str:
  """`value` in double quotes, which the grammar parses back to `value`."""
  value = re.sub(r'(\\*)"', r'\1\1\\"', value)
  return '"' + re.sub(r"(\\+)$", r"\1\1", value) + '"'
