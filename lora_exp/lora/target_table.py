"""The table of adapted modules from the shapes of kernels: patterns resolved to modules, with rank, alpha and scale.

Nothing here imports jax, so that a run can be planned from shapes alone.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_exp.config import InputError, LoraConfig
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.method_declaration import MethodDeclaration
from lora_exp.lora.targets import matches, select_paths

Presets = Mapping[str, Sequence[str]]  # name -> the patterns that it stands for


@dataclass(frozen=True)
class KernelShape:
  """The shape of a module's kernel (…, I, O), or of an embedding (V, D)."""

  fan_in: int  # I
  fan_out: int  # O
  lead: tuple[int, ...] = ()  # axes before I and O, such as experts
  has_bias: bool = False


@dataclass(frozen=True)
class TargetSettings:
  """Which modules are adapted, with which rank and alpha: the settings of `resolve`."""

  targets: str | Sequence[str] = "re:.*"
  rank: int = 8
  alpha: float | None = 16.0  # None: twice the rank of each module
  scaling: str = "standard"
  exclude: str | Sequence[str] | None = None
  blocks: Sequence[int] | None = None
  rank_pattern: Mapping[str, int] | None = None
  alpha_pattern: Mapping[str, float] | None = None
  options: Mapping[str, Any] | None = None  # of the method


def target_settings(lora: LoraConfig) -> TargetSettings:
  """The settings of the config group `lora` that choose modules and ranks."""
  return TargetSettings(
    targets=lora.targets,
    rank=lora.rank,
    alpha=lora.alpha,
    scaling=lora.scaling,
    exclude=lora.exclude,
    blocks=lora.layers,
    rank_pattern=lora.rank_pattern,
    alpha_pattern=lora.alpha_pattern,
    options=lora.options,
  )


def kernels_of_parameters(shapes: Mapping[str, Sequence[int]]) -> dict[str, KernelShape]:
  """The kernels and embeddings among the parameters of a model, by module path in natural order."""
  kernels = {}
  for path, shape in shapes.items():
    owner, _, leaf = path.rpartition(".")
    if leaf in ("kernel", "embedding"):
      kernels[owner] = KernelShape(shape[-2], shape[-1], tuple(shape[:-2]), f"{owner}.bias" in shapes)
  return dict(sorted(kernels.items(), key=_natural_order))


def _natural_order(item: tuple[str, KernelShape]) -> list[tuple[bool, Any]]:
  """Sort key of (path, kernel): indices sort as numbers and before names."""
  return [(False, int(part)) if part.isdigit() else (True, part) for part in item[0].split(".")]


def scale_of(alpha: float, rank: int, scaling: str = "standard") -> float:
  """Returns alpha/rank, or alpha/sqrt(rank) if `scaling` is "rslora" (arXiv 2312.03732)."""
  return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def target_table(
  kernels: Mapping[str, KernelShape], kind: MethodDeclaration, settings: TargetSettings, presets: Presets
) -> list[AdaptedModule]:
  """Returns the table of the modules of `kernels` (dotted paths in order) that `settings` adapt by the method `kind`.

  Raises InputError that lists every pattern without a matching module, with the nearest paths, and every pattern that
  an earlier one makes ineffective.
  """
  kernel_paths = {path: _kernel_paths(path, shape) for path, shape in kernels.items()}
  selected = set(select_paths(
    list(kernels), settings.targets, settings.exclude, settings.blocks, presets, kernel_paths
  ))  # fmt: skip
  targeted = [path for path in kernels if not selected.isdisjoint(kernel_paths[path])]
  chosen = {path: _chosen(kernel_paths[path], selected) for path in targeted}
  problems = [
    *_ineffective_patterns("rank_pattern", settings.rank_pattern, targeted, list(kernels), presets),
    *_ineffective_patterns("alpha_pattern", settings.alpha_pattern, targeted, list(kernels), presets),
    *_unsupported(kind, {path: kernels[path] for path in targeted}, chosen, settings.rank_pattern),
  ]
  if problems:
    raise InputError(problems)
  return [_row(path, kernels[path], chosen[path], kind, settings, presets) for path in targeted]


def _row(
  path: str,
  shape: KernelShape,
  chosen: tuple[int, ...] | None,
  kind: MethodDeclaration,
  settings: TargetSettings,
  presets: Presets,
) -> AdaptedModule:
  """The row of one module. A method without alpha (VeRA) has scale 1."""
  r = _first_match(settings.rank_pattern, path, presets, settings.rank) if kind.uses_rank else 1
  default_alpha = 2 * r if settings.alpha is None else settings.alpha
  a = float(_first_match(settings.alpha_pattern, path, presets, default_alpha)) if kind.uses_alpha else float(r)
  scale = scale_of(a, r, settings.scaling) if kind.uses_alpha else 1.0
  row = AdaptedModule(path, shape.fan_in, shape.fan_out, r, a, scale, kernels=chosen, has_bias=shape.has_bias)
  per_kernel = kind.trained_size(kind.leaf_names(path, settings.options or {}), row)
  count = math.prod(shape.lead) if row.kernels is None else len(row.kernels)
  return replace(row, parameters=count * per_kernel)


def _kernel_paths(path: str, shape: KernelShape) -> list[str]:
  """The paths of the single kernels of a stack with one axis; [path] for any other module."""
  lead = shape.lead
  parent, _, name = path.rpartition(".")
  return [f"{parent}.{i}.{name}" for i in range(lead[0])] if len(lead) == 1 and parent else [path]


def _chosen(kernel_paths: Sequence[str], selected: Collection[str]) -> tuple[int, ...] | None:
  """The numbers of the selected kernels of a module; None for all."""
  numbers = tuple(i for i, path in enumerate(kernel_paths) if path in selected)
  return None if len(numbers) == len(kernel_paths) else numbers


def _unsupported(
  kind: MethodDeclaration,
  targeted: Mapping[str, KernelShape],
  chosen: Mapping[str, Sequence[int] | None],
  rank_pattern: Mapping | None,
) -> list[str]:
  """Problems with settings and modules that the method does not support."""
  problems = []
  if kind.one_rank and rank_pattern:
    problems.append(f"lora.rank_pattern: {kind.title} shares its matrices between all modules, which need one rank")
  stacked = [path for path, shape in targeted.items() if shape.lead]
  if not kind.stackable and stacked:
    problems.append(f"lora.method={kind.name}: {stacked[0]} is a stack of kernels, which {kind.title} cannot adapt")
  single = [path for path in targeted if chosen[path] is not None]
  if not kind.zeros_stay_zero and single:
    problems.append(f"lora.method={kind.name}: lora.targets selects some of the kernels of {single[0]}, which only "
                    f"methods with low-rank factors support; adapt all of them, or use lora=lora")
  return problems


def _ineffective_patterns(
  name: str, patterns: Mapping | None, targeted: Sequence[str], candidates: Sequence[str], presets: Presets
) -> list[str]:
  """Problems with patterns that match no targeted module, or only modules that earlier patterns match already."""
  problems: list[str] = []
  matched_before: set[str] = set()
  for pattern in patterns or {}:
    matching_paths = {path for path in candidates if _matches_preset(pattern, path, presets)}
    if not matching_paths & set(targeted):
      examples = ", ".join(targeted[:4])
      problems.append(f"lora.{name}={{{pattern}: …}} matches none of the adapted modules: {examples}, …")
    elif matching_paths <= matched_before:
      problems.append(
        f"lora.{name}={{{pattern}: …}} has no effect: earlier patterns match all of its modules; "
        "move it to the front or remove it"
      )
    matched_before |= matching_paths
  return problems


def _matches_preset(pattern: str, path: str, presets: Presets) -> bool:
  """Whether `pattern`, or a pattern of the preset with this name, matches `path`."""
  return any(matches(p, path) for p in presets.get(pattern, [pattern]))


def _first_match(patterns: Mapping | None, path: str, presets: Presets, default: Any) -> Any:
  """The value of the first pattern that matches `path`."""
  for pattern, value in (patterns or {}).items():
    if _matches_preset(pattern, path, presets):
      return value
  return default
