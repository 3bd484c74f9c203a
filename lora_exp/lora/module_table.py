"""The table of modules to adapt: target patterns resolved to modules, each with its rank, alpha and scale."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flax import nnx

from lora_exp.config import InputError
from lora_exp.lora import kernels, layers, methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods import Method
from lora_exp.lora.targets import matches, select_paths

Presets = Mapping[str, Sequence[str]]  # name -> the patterns that it stands for


def modules(model: nnx.Module) -> dict[str, Any]:
  """Returns every module that has or can have an adapter, by dotted path in natural order (layer 2 before layer 10)."""
  supported = tuple(layers.LORA_CLASSES)
  paths_and_modules = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, supported)]
  paths_and_modules.sort(key=_natural_order)
  return {".".join(map(str, path)): module for path, module in paths_and_modules}


def _natural_order(item: tuple[tuple, Any]) -> list[tuple[bool, Any]]:
  """Sort key of (path, module): indices sort as numbers and before names."""
  return [(isinstance(segment, str), segment) for segment in item[0]]


def adapted_modules(model: nnx.Module) -> dict[str, Any]:
  """Returns the modules that have an adapter, by dotted path."""
  return {path: module for path, module in modules(model).items() if isinstance(module, layers.AdapterLayer)}


def scale_of(alpha: float, rank: int, scaling: str = "standard") -> float:
  """Returns alpha/rank, or alpha/sqrt(rank) if `scaling` is "rslora" (arXiv 2312.03732)."""
  return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def resolve(
  model: nnx.Module,
  targets: str | Sequence[str] = "re:.*",
  *,
  method: str = "lora",
  rank: int = 8,
  alpha: float | None = 16.0,
  scaling: str = "standard",
  exclude: str | Sequence[str] | None = None,
  blocks: Sequence[int] | None = None,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  presets: Presets | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[AdaptedModule]:
  """Returns the table of modules that these settings adapt.

  A path of a stack of kernels with a number before its last segment, such as `mlp.experts.3.down_proj`, is that of a
  single kernel. `alpha=None` is twice the rank of each module. The first matching entry of `rank_pattern` and of
  `alpha_pattern` overrides the value for all modules. A method without alpha (VeRA) has scale 1. `options` are settings
  of the method.

  Raises InputError that lists every pattern without a matching module, with the nearest paths, and every pattern that
  an earlier one makes ineffective.
  """
  presets = presets or {}
  candidates = {path: module for path, module in modules(model).items() if layers.adaptable(module)}
  kernel_paths = {path: _kernel_paths(path, module) for path, module in candidates.items()}
  selected = set(select_paths(list(candidates), targets, exclude, blocks, presets, kernel_paths))
  targeted = [path for path in candidates if not selected.isdisjoint(kernel_paths[path])]
  chosen = {path: _chosen(kernel_paths[path], selected) for path in targeted}
  kind = methods.get(method)
  problems = [
    *_ineffective_patterns("rank_pattern", rank_pattern, targeted, list(candidates), presets),
    *_ineffective_patterns("alpha_pattern", alpha_pattern, targeted, list(candidates), presets),
    *_unsupported(kind, {path: candidates[path] for path in targeted}, chosen, rank_pattern),
  ]
  if problems:
    raise InputError(problems)
  table = []
  for path in targeted:
    module = candidates[path]
    r = _first_match(rank_pattern, path, presets, rank) if kind.uses_rank else 1
    default_alpha = 2 * r if alpha is None else alpha
    a = float(_first_match(alpha_pattern, path, presets, default_alpha)) if kind.uses_alpha else float(r)
    scale = scale_of(a, r, scaling) if kind.uses_alpha else 1.0
    has_bias = getattr(module, "bias", None) is not None
    row = AdaptedModule(path, *kernels.shape(module), r, a, scale, kernels=chosen[path], has_bias=has_bias)
    per_kernel = kind.trained_size(kind.leaf_names(path, options or {}), row)
    count = math.prod(kernels.lead(module)) if row.kernels is None else len(row.kernels)
    table.append(replace(row, parameters=count * per_kernel))
  return table


def _kernel_paths(path: str, module: Any) -> list[str]:
  """The paths of the single kernels of a stack with one axis; [path] for any other module."""
  lead = kernels.lead(module)
  parent, _, name = path.rpartition(".")
  return [f"{parent}.{i}.{name}" for i in range(lead[0])] if len(lead) == 1 and parent else [path]


def _chosen(kernel_paths: Sequence[str], selected: Collection[str]) -> tuple[int, ...] | None:
  """The numbers of the selected kernels of a module; None for all."""
  numbers = tuple(i for i, path in enumerate(kernel_paths) if path in selected)
  return None if len(numbers) == len(kernel_paths) else numbers


def _unsupported(
  kind: Method, targeted: Mapping[str, Any], chosen: Mapping[str, Sequence[int] | None], rank_pattern: Mapping | None
) -> list[str]:
  """Problems with settings and modules that the method does not support."""
  problems = []
  if kind.one_rank and rank_pattern:
    problems.append(f"lora.rank_pattern: {kind.title} shares its matrices between all modules, which need one rank")
  stacked = [path for path, module in targeted.items() if kernels.lead(module)]
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
