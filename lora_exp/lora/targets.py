"""Patterns that select modules by dotted path.

A pattern of plain segments matches whole consecutive segments anywhere in a path: `q_proj`, `attn.c_attn`,
`layers.0.*`, where `*` stands for one segment. A pattern with the prefix `re:` is a regular expression that must match
the full path. A preset (`attention`, `mlp`, …) is a name for several patterns.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from lora_exp.config import InputError, nearest


def matches(pattern: str, path: str) -> bool:
  """Whether `pattern` matches consecutive segments of `path`, or with the prefix `re:` the full path."""
  if pattern.startswith("re:"):
    return re.fullmatch(pattern[3:], path) is not None
  wanted, segments = pattern.split("."), path.split(".")
  return any(_matches_at(wanted, segments[i:]) for i in range(len(segments) - len(wanted) + 1))


def _matches_at(wanted: Sequence[str], segments: Sequence[str]) -> bool:
  """Whether `segments` start with the segments of a pattern."""
  return all(w in ("*", segment) for w, segment in zip(wanted, segments, strict=False))


def as_list(value: str | Sequence[str] | None) -> list[str]:
  """Returns one pattern, several patterns or None as a list."""
  if value is None:
    return []
  return [value] if isinstance(value, str) else list(value)


def select_paths(
  paths: Sequence[str],
  targets: str | Sequence[str],
  exclude: str | Sequence[str] | None = None,
  layers: Sequence[int] | None = None,
  presets: Mapping[str, Sequence[str]] | None = None,
  parts: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
  """Returns the `paths` that match `targets`, are in one of `layers` and do not match `exclude`, in the given order.

  `targets` and `exclude` are patterns or names of `presets`. The layer of a path is its first number. A path with
  `parts` (paths of its single kernels) is replaced by those that are selected; a pattern that matches it selects all.

  Raises InputError that lists every pattern without a match, with the nearest paths.
  """
  presets, parts = presets or {}, parts or {}
  problems: list[str] = []
  selectable = {path: parts.get(path, [path]) for path in paths}
  leaves = [leaf for path in paths for leaf in selectable[path]]
  selectable |= {leaf: [leaf] for leaf in leaves}

  def matching(field: str, patterns: list[str]) -> set[str]:
    """The paths that match any of `patterns`; a pattern without a match is a problem."""
    selected: set[str] = set()
    for pattern in patterns:
      expanded = presets.get(pattern, [pattern])
      matching_paths = [path for path in selectable if any(matches(p, path) for p in expanded)]
      if not matching_paths:
        problems.append(f"{field}={pattern} matches no module; {advice(pattern, list(selectable), presets)}")
      selected.update(leaf for path in matching_paths for leaf in selectable[path])
    return selected

  selected = matching("lora.targets", as_list(targets))
  if not as_list(targets):
    problems.append("lora.targets is empty: name a preset or a path, or set lora=frozen to train nothing")
  if layers is not None:
    numbers = {leaf: _layer(leaf) for leaf in leaves}
    problems += [
      f"lora.layers={n}: the model's blocks are numbered {_span(numbers.values())}"
      for n in layers
      if n not in numbers.values()
    ]
    selected = {path for path in selected if numbers[path] in layers}
  selected -= matching("lora.exclude", as_list(exclude))
  if not problems and not selected:
    problems.append(f"lora.targets={targets} with exclude={exclude} and layers={layers} leaves no module to adapt")
  if problems:
    raise InputError(problems)
  return [leaf for leaf in leaves if leaf in selected]


def _layer(path: str) -> int | None:
  """The first number in `path`; None if there is none."""
  return next((int(segment) for segment in path.split(".") if segment.isdigit()), None)


def _span(numbers: Iterable[int | None]) -> str:
  """The range of the layers' numbers, for a message."""
  present = sorted(n for n in set(numbers) if n is not None)
  return f"{present[0]} to {present[-1]}" if present else "none"


def advice(pattern: str, paths: Sequence[str], presets: Mapping[str, Sequence[str]]) -> str:
  """Returns a hint for a pattern without a match: the nearest presets and paths, or the kinds of modules there are.

  A pattern of n segments is compared with the last n segments of each path.
  """
  text = pattern.removeprefix("re:")
  depth = text.count(".") + 1
  path_of_ending = {".".join(path.split(".")[-depth:]): path for path in reversed(paths)}
  near = nearest(text, [*presets, *path_of_ending], n=3)
  if not near:
    names = list(dict.fromkeys(path.split(".")[-1] for path in paths))
    return f"its modules are {', '.join(names)}; presets: {', '.join(presets)}"
  return "nearest: " + ", ".join(name if name in presets else path_of_ending[name] for name in near)
