"""Parameters of the base that are trained in full, in addition to the adapters: biases and complete modules."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import InputError
from lora_exp.lora import layers
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.targets import advice, as_list, matches


def full_paths(
  model: nnx.Module,
  table: Sequence[AdaptedModule],
  bias: str = "none",
  train_modules: str | Sequence[str] | None = None,
) -> list[str]:
  """Returns the dotted paths of the parameters to train in full.

  `train_modules` are patterns of modules; every parameter in a matching module is trained. `bias` is "none", "all"
  (every bias of the model) or "lora_only" (the biases of the modules in `table`), as in PEFT.

  Raises InputError if a pattern matches no module, if a matching module is adapted, or if there is no bias to train.
  """
  parameters = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  owners = {path: path.rpartition(".")[0] for path in parameters}
  adapted = {row.path for row in table}
  problems: list[str] = []
  selected: set[str] = set()
  containers = _containers(owners)
  for pattern in as_list(train_modules):
    matching_modules = [module for module in containers if matches(pattern, module)]
    inside = [path for path, owner in owners.items() if any(_is_inside(owner, m) for m in matching_modules)]
    if not inside:
      problems.append(f"lora.train_modules={pattern} matches no module; {advice(pattern, containers, {})}")
    adapted_inside = sorted({owners[path] for path in inside} & adapted)
    if adapted_inside:
      problems.append(
        f"lora.train_modules={pattern}: {adapted_inside[0]} is adapted as well; exclude it with lora.exclude, or "
        "remove the pattern"
      )
    selected |= set(inside)
  if bias != "none":
    biases = [p for p, owner in owners.items() if p.endswith(".bias") and (bias == "all" or owner in adapted)]
    if not biases:
      scope = "the model has" if bias == "all" else "the adapted modules have"
      problems.append(f"lora.bias={bias}: {scope} no bias to train; set lora.bias=none")
    selected |= set(biases)
  if problems:
    raise InputError(problems)
  return [path for path in parameters if path in selected]


def _containers(owners: Mapping[str, str]) -> list[str]:
  """The paths of all modules that hold a parameter, directly or in a submodule."""
  paths: set[str] = set()
  for owner in owners.values():
    segments = owner.split(".")
    paths |= {".".join(segments[: n + 1]) for n in range(len(segments))}
  return sorted(paths)


def _is_inside(path: str, module: str) -> bool:
  """Whether the module `path` is `module` or a submodule of it."""
  return path == module or path.startswith(f"{module}.")


def train_in_full(model: nnx.Module, paths: Sequence[str]) -> None:
  """Makes the parameters at `paths` trainable, in float32 or wider.

  The base's parameter stays in the same module, under its name with the prefix `frozen_`. An abstract parameter becomes
  zeros, which the caller replaces once the base is loaded.
  """
  for path in paths:
    owner, name = _owner(model, path)
    base = getattr(owner, name)
    value = base.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
      value = jnp.zeros(value.shape, jnp.float32)
    setattr(owner, layers.FROZEN_PREFIX + name, base)
    setattr(owner, name, layers.Trained(value.astype(jnp.promote_types(value.dtype, jnp.float32))))


def trained_in_full(model: nnx.Module) -> dict[str, tuple[Any, str]]:
  """Returns {dotted path: (module, attribute)} of the parameters that `train_in_full` made trainable."""
  owners = {}
  for path, _ in nnx.to_flat_state(nnx.state(model, layers.Trained)):
    dotted = ".".join(map(str, path))
    owners[dotted] = _owner(model, dotted)
  return owners


def module_at(model: nnx.Module, path: str) -> Any:
  """Returns the module at a dotted path; the model itself for the empty path."""
  node: Any = model
  for segment in path.split(".") if path else []:
    node = node[int(segment)] if segment.isdigit() else getattr(node, segment)
  return node


def _owner(model: nnx.Module, path: str) -> tuple[Any, str]:
  """The module that holds the parameter at `path`, and the name of its attribute."""
  owner, _, name = path.rpartition(".")
  return module_at(model, owner), name
