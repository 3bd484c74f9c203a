"""Adapters put on a model and taken off again: `inject`, `attach`, `eject`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_exp.config import InputError
from lora_exp.lora import kernels, layers, methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.full_parameters import full_paths, train_in_full, trained_in_full
from lora_exp.lora.initialization import DISTRIBUTIONS
from lora_exp.lora.methods import InitSettings, Leaves, Modules
from lora_exp.lora.module_table import adapted_modules, modules, resolve
from lora_exp.lora.quantization import is_quantised
from lora_exp.lora.target_table import Presets


def attach_leaves(
  model: nnx.Module,
  table: Sequence[AdaptedModule],
  method: str,
  leaves: Mapping[str, Leaves],
  compute: str = "auto",
) -> None:
  """Adapts every module of `table` in place with the given leaves, by module path.

  A leaf that modules share becomes one Variable, which all of them hold.
  """
  by_path = modules(model)
  shared = {name: layers.Constant(jnp.asarray(x)) for name, x in shared_arrays(method, leaves.values()).items()}
  for row in table:
    layers.attach(by_path[row.path], method, {**leaves[row.path], **shared}, row.scale, compute)


def shared_arrays(method: str, leaves: Iterable[Leaves]) -> dict[str, Any]:
  """Returns the full arrays of shared leaves, from the modules' leaves, which may be cut to each module's size.

  The result is empty if the method shares no leaf.
  """
  names = methods.get(method).shared_leaves
  with_shared = [arrays for arrays in leaves if names and names[0] in arrays]
  return {name: max((arrays[name] for arrays in with_shared), key=_size) for name in names if with_shared}


def _size(x: Any) -> int:
  """The number of values in an array."""
  return x.size


def kernels_of(
  model: nnx.Module, table: Sequence[AdaptedModule], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns the kernel (…, I, O) of every module in `table`, by path.

  A quantised kernel stays quantised. An abstract kernel gives its shape and dtype. `base` maps dotted paths to
  parameters, which are used instead of the model's if given.
  """
  by_path = modules(model)
  return {row.path: _kernel_of(by_path[row.path], row.path, base) for row in table}


def _kernel_of(module: Any, path: str, base: Mapping[str, Any] | None) -> Any:
  """The kernel of one module as (…, I, O)."""
  w = kernels.of(module).get_value()
  if base is not None:
    w = base[f"{path}.{'embedding' if isinstance(module, nnx.Embed) else 'kernel'}"]
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w)):
    return jax.ShapeDtypeStruct((*kernels.lead(module), *kernels.shape(module)), w.dtype)
  return w if is_quantised(w) else kernels.to_IO(module, w)


def fans_of(model: nnx.Module, table: Sequence[AdaptedModule]) -> dict[str, int]:
  """Returns the fan-in of A for every module in `table`, by path: I, or 1 for an embedding."""
  by_path = modules(model)
  return {row.path: kernels.fan_in(by_path[row.path]) for row in table}


def _ignore() -> None:
  """The default progress callback."""


def draw(
  table: Sequence[AdaptedModule],
  fans: Mapping[str, int],
  kernels_IO: Mapping[str, Any],
  key: jax.Array,
  *,
  method: str = "lora",
  init: str = "kaiming",
  std: float | None = None,
  options: Mapping[str, Any] | None = None,
  done: Callable[[], Any] = _ignore,
) -> dict[str, dict[str, jax.Array]]:
  """Initializes the leaves of every module in `table`, by path; with them the model computes the same as its base.

  `fans` are the fan-ins of A (see `fans_of`). `kernels_IO` are the kernels (…, I, O) by path, or their abstract shapes;
  leaves that are computed from an abstract kernel are zeros. `done` is called after each kernel that is decomposed.

  Raises InputError for an unknown `init`, or one that the method does not support.
  """
  kind = methods.variant(method, init)
  if kind.init_of is None and init not in DISTRIBUTIONS:
    raise InputError(f"lora.init={init}: choose {', '.join(DISTRIBUTIONS)}")
  settings = InitSettings(init, std, dict(options or {}))
  leaves = kind.init_all(Modules(table, fans, kernels_IO), key, settings, done)
  return {row.path: _of_kernels(leaves[row.path], row.kernels) for row in table}


def _of_kernels(leaves: Mapping[str, jax.Array], numbers: Sequence[int] | None) -> dict[str, jax.Array]:
  """The leaves of a stack with zeros for the kernels that are not adapted, which then stay zero in training."""
  if numbers is None:
    return dict(leaves)
  index = jnp.asarray(numbers)
  return {name: jnp.zeros_like(x).at[index].set(x[index]) for name, x in leaves.items()}


def inject(
  model: nnx.Module,
  targets: str | Sequence[str] = "re:.*",
  *,
  rank: int = 8,
  alpha: float | None = 16.0,
  method: str = "lora",
  scaling: str = "standard",
  exclude: str | Sequence[str] | None = None,
  blocks: Sequence[int] | None = None,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  presets: Presets | None = None,
  key: jax.Array | None = None,
  init: str = "kaiming",
  init_std: float | None = None,
  compute: str = "auto",
  bias: str = "none",
  train_modules: str | Sequence[str] | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[AdaptedModule]:
  """Adapts `model` in place and returns the table of adapted modules.

  The outputs of the model do not change until it is trained. `targets` and the arguments from `rank` to `presets` are
  those of `resolve`, `bias` and `train_modules` those of `full_paths`; `compute` is "factored", "merged" or "auto".
  `key` defaults to `jax.random.key(0)`. The base may be abstract (`nnx.eval_shape`); the adapters are real arrays.

  Raises InputError for settings that do not fit the model.

  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
  >>> [(row.path, row.parameters) for row in inject(model, "layers.2", rank=2)]
  [('layers.2', 20)]
  """
  method = methods.variant(method, init).name
  table = resolve(
    model, targets, method=method, rank=rank, alpha=alpha, scaling=scaling, exclude=exclude, blocks=blocks,
    rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, presets=presets, options=options,
  )  # fmt: skip
  full = full_paths(model, table, bias, train_modules)
  key = jax.random.key(0) if key is None else key
  leaves = draw(
    table, fans_of(model, table), kernels_of(model, table), key, method=method, init=init, std=init_std, options=options
  )
  attach_leaves(model, table, method, leaves, compute)
  train_in_full(model, full)
  return table


def extract_adapter(model: nnx.Module) -> Adapter:
  """Returns the adapter on `model` without changing the model, whose arrays it shares. Can be traced by `jax.jit`."""
  rows, leaves, method = [], {}, layers.LoRA.name
  for path, module in adapted_modules(model).items():
    arrays, kind = module.leaves(), module.kind
    leaves[path], method, rank = arrays, kind.name, kind.rank_of(arrays)
    first = module.scale[...].reshape(-1)[0]
    scale: Any = first if isinstance(first, jax.core.Tracer) else float(first)
    count = sum(x.size for name, x in arrays.items() if kind.leaves[name].trained)
    has_bias = getattr(module, "bias", None) is not None
    rows.append(AdaptedModule(path, *kernels.shape(module), rank, scale * rank, scale, count, has_bias=has_bias))
  full = {path: getattr(owner, name)[...] for path, (owner, name) in trained_in_full(model).items()}
  return Adapter(method, tuple(rows), leaves, full)


def eject(model: nnx.Module) -> Adapter:
  """Removes the adapter from `model` in place and returns it; graph and state are the base's again."""
  adapter = extract_adapter(model)
  for module in adapted_modules(model).values():
    layers.detach(module)
  for owner, name in trained_in_full(model).values():
    setattr(owner, name, getattr(owner, layers.FROZEN_PREFIX + name))
    delattr(owner, layers.FROZEN_PREFIX + name)
  return adapter


def completed(adapter: Adapter, kernels_IO: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the leaves of `adapter` with the constants that files omit, as they follow from the kernels (…, I, O)."""
  shared = shared_arrays(adapter.method, adapter.leaves.values())
  rows = {row.path: row for row in adapter.rows}
  return {
    path: {**adapter.kind.complete(x, kernels_IO[path], rows[path]), **shared} for path, x in adapter.leaves.items()
  }


def attach(model: nnx.Module, adapter: Adapter, compute: str = "auto") -> None:
  """Adapts `model`, which has no adapter, in place with `adapter`.

  Raises InputError that lists every module or parameter that the model lacks, or has in another shape.
  """
  problems = [*_module_problems(model, adapter), *_full_problems(model, adapter)]
  if _changes_base(model, adapter):
    problems.append("the adapter changes its base; apply adapter.base to the model's parameters, and replace it by "
                    "BaseChanges() first")
  if problems:
    raise InputError(problems)
  leaves = completed(adapter, kernels_of(model, adapter.rows))
  attach_leaves(model, adapter.rows, adapter.method, leaves, compute)
  train_in_full(model, list(adapter.full))
  for path, (owner, name) in trained_in_full(model).items():
    getattr(owner, name).set_value(jnp.asarray(adapter.full[path]))


def _changes_base(model: nnx.Module, adapter: Adapter) -> bool:
  """Whether `model` differs from the base that `adapter` was trained on."""
  if not adapter.base:
    return False
  parameters = {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  paths = adapter.base.paths()
  if not parameters.keys() >= set(paths):
    return True
  changed = adapter.base.apply(parameters)
  return any(not np.array_equal(changed[path], parameters[path]) for path in paths)


def _module_problems(model: nnx.Module, adapter: Adapter) -> list[str]:
  """Problems with the modules that `adapter` adapts."""
  problems = []
  by_path = modules(model)
  for row in adapter.rows:
    if row.path not in by_path:
      problems.append(f"the adapter adapts {row.path}, which the model does not have")
      continue
    shape = kernels.shape(by_path[row.path])
    if shape != (row.fan_in, row.fan_out):
      problems.append(f"{row.path}: the adapter's kernel is {(row.fan_in, row.fan_out)}, the model's {shape}")
    elif not layers.adaptable(by_path[row.path]):
      problems.append(f"{row.path} has an adapter already; eject it first")
  return problems


def _full_problems(model: nnx.Module, adapter: Adapter) -> list[str]:
  """Problems with the parameters that were trained in full."""
  problems = []
  parameters = {".".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  for path, value in adapter.full.items():
    shape = parameters[path].get_value().shape if path in parameters else None
    if shape != value.shape:
      problems.append(f"{path}: the adapter trained it in full with shape {value.shape}, the model's is {shape}")
  return problems
