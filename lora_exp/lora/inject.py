"""From target patterns to adapters on a model: `resolve` the table, `inject` it, `eject` it again."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import InputError
from lora_exp.lora import kernels, layers, methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.initialization import DISTRIBUTIONS
from lora_exp.lora.methods import InitSettings, Leaves, Modules
from lora_exp.lora.quantization import is_quantised
from lora_exp.lora.targets import advice, as_list, matches, select_paths

Presets = Mapping[str, Sequence[str]]
BIASES = ("none", "all", "lora_only")  # which biases are trained besides, as in PEFT


def modules(model: nnx.Module) -> dict[str, Any]:
  """Every module that can carry an adapter (or does), by dotted path, in reading order."""
  kinds = tuple(layers.LORA_CLASSES)
  found = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, kinds)]
  found.sort(key=lambda item: [(isinstance(s, str), s) for s in item[0]])
  return {".".join(map(str, path)): m for path, m in found}


def adapted_modules(model: nnx.Module) -> dict[str, Any]:
  """The modules that carry an adapter, by dotted path."""
  return {path: m for path, m in modules(model).items() if isinstance(m, layers.AdapterLayer)}


def scale_of(alpha: float, rank: int, scaling: str = "standard") -> float:
  """alpha/rank, or alpha/sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
  return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def resolve(
  model: nnx.Module,
  targets: str | Sequence[str] = "re:.*",
  *,
  method: str = "lora",
  rank: int = 8,
  alpha: float | None = None,
  scaling: str = "standard",
  exclude: str | Sequence[str] | None = None,
  layers_: Sequence[int] | None = None,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  presets: Presets | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[AdaptedModule]:
  """The table of modules that these settings adapt; alpha defaults to twice the module's rank.

  The first matching pattern of `rank_pattern` and of `alpha_pattern` wins. The scale of a method without alpha (VeRA)
  is 1. `options` are the method's own settings. Raises InputError naming every pattern that matches no target, with the
  nearest paths, and every pattern that never wins.
  """
  presets = presets or {}
  known = {path: m for path, m in modules(model).items() if layers.adaptable(m)}
  chosen = select_paths(list(known), targets, exclude, layers_, presets)
  problems = [
    *_idle("rank_pattern", rank_pattern, chosen, list(known), presets),
    *_idle("alpha_pattern", alpha_pattern, chosen, list(known), presets),
  ]
  kind = methods.get(method)
  if kind.one_rank and rank_pattern:
    problems.append(f"lora.rank_pattern: {kind.title} has one pair of matrices for all modules, and so one rank")
  if not kind.stackable and (stacked := [path for path in chosen if kernels.lead(known[path])]):
    problems.append(f"lora.method={kind.name}: {stacked[0]} is a stack of kernels, which {kind.title} cannot adapt")
  if problems:
    raise InputError(problems)
  table = []
  for path in chosen:
    r = _first(rank_pattern, path, presets, rank) if kind.uses_rank else 1
    a = float(_first(alpha_pattern, path, presets, 2 * r if alpha is None else alpha)) if kind.uses_alpha else float(r)
    scale = scale_of(a, r, scaling) if kind.uses_alpha else 1.0
    has_bias = getattr(known[path], "bias", None) is not None
    row = AdaptedModule(path, *kernels.shape(known[path]), r, a, scale, has_bias=has_bias)
    count = kind.trained_size(kind.leaf_names(path, options or {}), row)
    table.append(replace(row, parameters=math.prod(kernels.lead(known[path])) * count))
  return table


def _idle(
  name: str, patterns: Mapping | None, chosen: Sequence[str], known: Sequence[str], presets: Presets
) -> list[str]:
  """Patterns that match none of the `chosen`, or whose every module in the model a pattern before them takes."""
  problems: list[str] = []
  taken: set[str] = set()
  for pattern in patterns or {}:
    hits = {path for path in known if _hits(pattern, path, presets)}
    if not hits & set(chosen):
      few = ", ".join(chosen[:4])
      problems.append(f"lora.{name}={{{pattern}: …}} matches none of the adapted modules: {few}, …")
    elif hits <= taken:
      problems.append(
        f"lora.{name}={{{pattern}: …}} has no effect: patterns before it take every module that it matches; "
        "put it first, or remove it"
      )
    taken |= hits
  return problems


def _hits(pattern: str, path: str, presets: Presets) -> bool:
  return any(matches(p, path) for p in presets.get(pattern, [pattern]))


def _first(patterns: Mapping | None, path: str, presets: Presets, default):
  return next((value for pattern, value in (patterns or {}).items() if _hits(pattern, path, presets)), default)


def full_paths(
  model: nnx.Module,
  table: Sequence[AdaptedModule],
  bias: str = "none",
  train_modules: str | Sequence[str] | None = None,
) -> list[str]:
  """Dotted paths of the parameters that are trained in full: biases, and all that lies below `train_modules`.

  `bias`: none, all of the model's, or lora_only: those of the adapted modules. Raises InputError for a pattern that
  matches no module, a module that would be adapted as well, and a model without the biases asked for.
  """
  parameters = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  adapted = {row.path for row in table}
  owners = {p: p.rpartition(".")[0] for p in parameters}
  problems: list[str] = []
  wanted: set[str] = set()
  above = sorted({".".join(o.split(".")[: n + 1]) for o in owners.values() for n in range(o.count(".") + 1)})
  for pattern in as_list(train_modules):
    named = [m for m in above if matches(pattern, m)]
    below = [p for p, o in owners.items() if any(o == m or o.startswith(f"{m}.") for m in named)]
    if not below:
      problems.append(f"lora.train_modules={pattern} matches no module; {advice(pattern, above, {})}")
    both = sorted({owners[p] for p in below} & adapted)
    if both:
      problems.append(
        f"lora.train_modules={pattern}: {both[0]} is adapted as well; take it out with lora.exclude, or off this list"
      )
    wanted |= set(below)
  if bias != "none":
    biases = [p for p, o in owners.items() if p.endswith(".bias") and (bias == "all" or o in adapted)]
    if not biases:
      whose = "the model has" if bias == "all" else "the adapted modules have"
      problems.append(f"lora.bias={bias}: {whose} no bias to train; set lora.bias=none")
    wanted |= set(biases)
  if problems:
    raise InputError(problems)
  return [p for p in parameters if p in wanted]


def train_in_full(model: nnx.Module, paths: Sequence[str]) -> None:
  """Makes the parameters at `paths` trained ones, in float32; the base's own stay beside them under `frozen_…`."""
  for path in paths:
    owner, name = _owner(model, path)
    base = getattr(owner, name)
    value = base.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
      value = jnp.zeros(value.shape, jnp.float32)  # filled in with the base's weights, once there are any
    setattr(owner, layers.FROZEN_PREFIX + name, base)
    setattr(owner, name, layers.Trained(value.astype(jnp.promote_types(value.dtype, jnp.float32))))


def trained_in_full(model: nnx.Module) -> dict[str, tuple[Any, str]]:
  """The parameters that are: path -> the module that has it, and its name there."""
  found = {}
  for path, _ in nnx.to_flat_state(nnx.state(model, layers.Trained)):
    dotted = ".".join(map(str, path))
    found[dotted] = _owner(model, dotted)
  return found


def _owner(model: nnx.Module, path: str) -> tuple[Any, str]:
  *parents, name = path.split(".")
  node: Any = model
  for part in parents:
    node = node[int(part)] if part.isdigit() else getattr(node, part)
  return node, name


def place(
  model: nnx.Module,
  table: Sequence[AdaptedModule],
  method: str,
  leaves: Mapping[str, Leaves],
  compute: str = "auto",
) -> None:
  """Puts an adapter with the leaves given on every module of `table`; a shared leaf is one Variable for all of them."""
  known = modules(model)
  shared = {name: layers.Constant(jnp.asarray(x)) for name, x in shared_arrays(method, leaves.values()).items()}
  for row in table:
    layers.attach(known[row.path], method, {**leaves[row.path], **shared}, row.scale, compute)


def shared_arrays(method: str, leaves: Iterable[Leaves]) -> dict[str, Any]:
  """The leaves that all modules share, out of those that were cut to a module's size; {} for most methods."""
  names = methods.get(method).shared_leaves
  having = [x for x in leaves if names and names[0] in x]
  return {name: max((x[name] for x in having), key=_size) for name in names if having}


def _size(x: Any) -> int:
  return x.size


def kernels_of(
  model: nnx.Module, table: Sequence[AdaptedModule], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """W (…, I, O) of every row, quantised as it is held, or its shape.

  Of an abstract model W is taken out of `base`, its parameters by dotted path.
  """
  known = modules(model)
  return {row.path: _kernel_of(known[row.path], row.path, base) for row in table}


def _kernel_of(module: Any, path: str, base: Mapping[str, Any] | None) -> Any:
  w = kernels.of(module).get_value()
  if base is not None:
    w = base[f"{path}.{'embedding' if isinstance(module, nnx.Embed) else 'kernel'}"]
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w)):
    return jax.ShapeDtypeStruct((*kernels.lead(module), *kernels.shape(module)), w.dtype)
  return w if is_quantised(w) else kernels.to_IO(module, w)


def fans_of(model: nnx.Module, table: Sequence[AdaptedModule]) -> dict[str, int]:
  """Inputs that add up in one output of A, for every row."""
  known = modules(model)
  return {row.path: kernels.fan_in(known[row.path]) for row in table}


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
  done: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, jax.Array]]:
  """The leaves of every row of `table` before the first step, by path; the adapted model then computes as its base.

  `fans` says how many inputs add up in an output of A (1 for a look-up, else I), `kernels_IO` holds W (…, I, O) or its
  shape alone: what is taken from an abstract W is zeros, right in shape. `done` is called after each module whose
  kernel was decomposed. Raises InputError for an unknown init, or one that does not go with the method.
  """
  kind = methods.variant(method, init)
  if kind.init_of is None and init not in DISTRIBUTIONS:
    raise InputError(f"lora.init={init}: choose {', '.join(DISTRIBUTIONS)}")
  return kind.init_all(Modules(table, fans, kernels_IO), key, InitSettings(init, std, dict(options or {})), done)


def inject(
  model: nnx.Module,
  targets: str | Sequence[str] = "re:.*",
  *,
  key: jax.Array | None = None,
  method: str = "lora",
  init: str = "kaiming",
  init_std: float | None = None,
  compute: str = "auto",
  bias: str = "none",
  train_modules: str | Sequence[str] | None = None,
  options: Mapping[str, Any] | None = None,
  **settings,
) -> list[AdaptedModule]:
  """Adapts `model` in place and returns the table of what it adapted; outputs do not change until a step was taken.

  `settings` are those of `resolve`: rank, alpha, scaling, exclude, layers_, rank_pattern, alpha_pattern, presets. The
  base may be abstract (`nnx.eval_shape`); the adapters are real arrays.

  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
  >>> [(row.path, row.parameters) for row in inject(model, "layers.2", rank=2)]
  [('layers.2', 20)]
  """
  method = methods.variant(method, init).name
  table = resolve(model, targets, method=method, options=options, **settings)
  full = full_paths(model, table, bias, train_modules)
  key = jax.random.key(0) if key is None else key
  leaves = draw(
    table, fans_of(model, table), kernels_of(model, table), key, method=method, init=init, std=init_std, options=options
  )
  place(model, table, method, leaves, compute)
  train_in_full(model, full)
  return table


def extract_adapter(model: nnx.Module) -> Adapter:
  """The adapter on `model`, its arrays shared with it; the model stays as it is. Works under `jax.jit` too."""
  rows, leaves, method = [], {}, layers.LoRA.name
  for path, module in adapted_modules(model).items():
    arrays, kind = module.leaves(), module.kind
    leaves[path], method, rank = arrays, kind.name, kind.rank_of(arrays)
    first = module.scale[...].reshape(-1)[0]
    scale: Any = first if isinstance(first, jax.core.Tracer) else float(first)
    count = sum(x.size for name, x in arrays.items() if kind.leaves[name].trained)
    has_bias = getattr(module, "bias", None) is not None
    rows.append(AdaptedModule(path, *kernels.shape(module), rank, scale * rank, scale, count, has_bias))
  full = {path: getattr(owner, name)[...] for path, (owner, name) in trained_in_full(model).items()}
  return Adapter(method, tuple(rows), leaves, full)


def eject(model: nnx.Module) -> Adapter:
  """Takes every adapter off `model` and returns what it was; the model's graph and state equal the base's again."""
  adapter = extract_adapter(model)
  for module in adapted_modules(model).values():
    layers.detach(module)
  for owner, name in trained_in_full(model).values():
    setattr(owner, name, getattr(owner, layers.FROZEN_PREFIX + name))
    delattr(owner, layers.FROZEN_PREFIX + name)
  return adapter


def completed(adapter: Adapter, kernels_IO: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The leaves of `adapter` with what files leave out because it follows from the base's kernels (…, I, O)."""
  shared = shared_arrays(adapter.method, adapter.leaves.values())
  return {path: {**adapter.kind.complete(x, kernels_IO[path]), **shared} for path, x in adapter.leaves.items()}


def attach(model: nnx.Module, adapter: Adapter, compute: str = "auto") -> None:
  """Puts `adapter` on a base without one. Raises InputError for modules that the model lacks, or of another shape."""
  known = modules(model)
  problems = []
  for row in adapter.rows:
    if row.path not in known:
      problems.append(f"the adapter adapts {row.path}, which the model does not have")
    elif (found := kernels.shape(known[row.path])) != (row.fan_in, row.fan_out):
      problems.append(f"{row.path}: the adapter's kernel is {(row.fan_in, row.fan_out)}, the model's {found}")
    elif not layers.adaptable(known[row.path]):
      problems.append(f"{row.path} carries an adapter already: eject it first")
  parameters = {".".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  for path, value in adapter.full.items():
    shape = parameters[path].get_value().shape if path in parameters else None
    if shape != value.shape:
      problems.append(f"{path}: the adapter trained it in full with shape {value.shape}, the model's is {shape}")
  if problems:
    raise InputError(problems)
  place(model, adapter.rows, adapter.method, completed(adapter, kernels_of(model, adapter.rows)), compute)
  train_in_full(model, list(adapter.full))
  for path, (owner, name) in trained_in_full(model).items():
    getattr(owner, name).set_value(jnp.asarray(adapter.full[path]))
