"""Which modules are adapted: patterns over dotted paths.

A pattern of plain segments matches whole path segments anywhere in a path: `q_proj`, `attn.c_attn`, `layers.0.*`
(`*` is one segment). `re:` before it makes it a regular expression that must match the full path. A preset
(`attention`, `mlp`, …) is a name for several patterns. A pattern that matches nothing is an error.
"""

import re
from collections.abc import Mapping, Sequence

from lora_exp.config import InputError, nearest


def matches(pattern: str, path: str) -> bool:
  """Whether `pattern` matches whole segments of the dotted `path` (or all of it, after `re:`)."""
  if pattern.startswith("re:"):
    return re.fullmatch(pattern[3:], path) is not None
  wanted, found = pattern.split("."), path.split(".")
  starts = range(len(found) - len(wanted) + 1)
  return any(all(w in ("*", f) for w, f in zip(wanted, found[i:], strict=False)) for i in starts)


def as_list(value: str | Sequence[str] | None) -> list[str]:
  """One pattern, several or none, as a list."""
  if value is None:
    return []
  return [value] if isinstance(value, str) else list(value)


def select_paths(
  paths: Sequence[str],
  targets: str | Sequence[str],
  exclude: str | Sequence[str] | None = None,
  layers: Sequence[int] | None = None,
  presets: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
  """The `paths` that `targets` name and `exclude` and `layers` leave, in the order given.

  Raises InputError that lists every pattern without a match, with the nearest paths.
  """
  presets = presets or {}
  problems: list[str] = []

  def named(field: str, patterns: list[str], among: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
      hits = {p for p in among for q in presets.get(pattern, [pattern]) if matches(q, p)}
      if not hits:
        problems.append(f"{field}={pattern} matches no module; {advice(pattern, paths, presets)}")
      found |= hits
    return found

  chosen = named("lora.targets", as_list(targets), paths)
  if not as_list(targets):
    problems.append("lora.targets is empty: name a preset or a path, or set lora=frozen to train nothing")
  if layers is not None:
    numbers = {p: _layer(p) for p in paths}
    problems += [
      f"lora.layers={n}: the model's blocks are numbered {_span(numbers.values())}"
      for n in layers
      if n not in numbers.values()
    ]
    chosen = {p for p in chosen if numbers[p] in layers}
  excluded = named("lora.exclude", as_list(exclude), paths)
  if not problems and not chosen - excluded:
    problems.append(f"lora.targets={targets} with exclude={exclude} and layers={layers} leaves no module to adapt")
  if problems:
    raise InputError(problems)
  return [p for p in paths if p in chosen - excluded]


def _layer(path: str) -> int | None:
  return next((int(s) for s in path.split(".") if s.isdigit()), None)


def _span(numbers) -> str:
  known = sorted(n for n in set(numbers) if n is not None)
  return f"{known[0]} to {known[-1]}" if known else "none"


def advice(pattern: str, paths: Sequence[str], presets: Mapping[str, Sequence[str]]) -> str:
  """The nearest presets and paths; a pattern of few segments is held against the ends of the paths."""
  word = pattern.removeprefix("re:")
  depth = word.count(".") + 1
  ends = {".".join(p.split(".")[-depth:]): p for p in reversed(paths)}
  near = nearest(word, [*presets, *ends], n=3)
  if not near:
    kinds = list(dict.fromkeys(p.split(".")[-1] for p in paths))
    return f"its modules are {', '.join(kinds)}; presets: {', '.join(presets)}"
  return "nearest: " + ", ".join(n if n in presets else ends[n] for n in near)
