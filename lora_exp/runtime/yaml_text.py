"""Parsing of YAML without Python objects, by libyaml if it is there."""

import re
from typing import Any

import yaml

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of libyaml is ten times as fast
LONGEST = 2**24  # characters of a document
DEEPEST = 50  # collections inside one another
MOST_VALUES = 10**5  # of a document, with those of its aliases
SUSPICIOUS = re.compile(r"(?<!\S)&\S|- - - |\? \? ")  # anchors, and collections nested in one line
MOST_BRACKETS, PLAIN_LENGTH = 100, 2**20  # of a document that need not be measured


def safe_load(text: str) -> Any:
  """Parses a YAML document of plain values. Raises yaml.YAMLError, also for one that `check_size` refuses."""
  check_size(text)
  try:
    return yaml.load(text, Loader=SAFE_LOADER)  # noqa: S506 - both loaders are safe
  except (RecursionError, TypeError, ValueError) as error:  # such as a mapping as a key, and the day 2024-02-31
    raise yaml.YAMLError(str(error)) from error


def check_size(text: str) -> None:
  """Raises yaml.YAMLError for a document that is nested too deeply or, with its aliases expanded, is too large.

  Nine lines of aliases can stand for a billion values.
  """
  if len(text) > LONGEST:
    raise yaml.YAMLError(f"it has {len(text):,} characters, but at most {LONGEST:,} are allowed")
  brackets = text.count("[") + text.count("{")
  if brackets > MOST_BRACKETS or len(text) > PLAIN_LENGTH or SUSPICIOUS.search(text):
    _measure(text)


def _measure(text: str) -> None:
  """`check_size` by the events of the parser, which needs no recursion."""
  sizes: dict[str, int] = {}  # by anchor
  open_nodes: list[tuple[str | None, int]] = []  # (anchor, values before it) of the collections around an event
  total = 0
  for event in yaml.parse(text, Loader=SAFE_LOADER):
    if isinstance(event, yaml.CollectionStartEvent):
      open_nodes.append((event.anchor, total))
      total += 1
    elif isinstance(event, yaml.CollectionEndEvent):
      anchor, before = open_nodes.pop()
      if anchor is not None:
        sizes[anchor] = total - before
    elif isinstance(event, yaml.ScalarEvent):
      total += 1
      if event.anchor is not None:
        sizes[event.anchor] = 1 + len(event.value)
    elif isinstance(event, yaml.AliasEvent):
      total += sizes.get(event.anchor, MOST_VALUES)  # the alias of a collection inside itself has no end
    if len(open_nodes) > DEEPEST:
      raise yaml.YAMLError(f"it is nested too deeply: at most {DEEPEST} collections inside one another are read")
    if total > MOST_VALUES:
      raise yaml.YAMLError(f"it is too large: at most {MOST_VALUES:,} values, with those of aliases, are read")
