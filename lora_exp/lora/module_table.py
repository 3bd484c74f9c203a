"""The modules of a model that have or can have an adapter, and the table of those that settings select."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from lora_exp.lora import kernels, layers, methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.target_table import KernelShape, Presets, TargetSettings, target_table


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


def kernel_shapes(model: nnx.Module) -> dict[str, KernelShape]:
  """Returns the shapes of the kernels that have no adapter yet, by module path."""
  return {
    path: KernelShape(*kernels.shape(module), kernels.lead(module), getattr(module, "bias", None) is not None)
    for path, module in modules(model).items()
    if layers.adaptable(module)
  }


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
  settings = TargetSettings(
    targets=targets,
    rank=rank,
    alpha=alpha,
    scaling=scaling,
    exclude=exclude,
    blocks=blocks,
    rank_pattern=rank_pattern,
    alpha_pattern=alpha_pattern,
    options=options,
  )
  return target_table(kernel_shapes(model), methods.get(method), settings, presets or {})
