"""From target patterns to adapters on a model: `resolve` the table, `inject` it, `eject` it again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import InputError
from lora_exp.dropout import path_key
from lora_exp.lora import layers
from lora_exp.lora.targets import matches, select

Presets = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Adapted:
  """One adapted module: a row of the table that every run prints."""

  path: str
  fan_in: int  # I
  fan_out: int  # O
  rank: int  # R
  alpha: float
  scale: float

  @property
  def parameters(self) -> int:
    """Trainable parameters: R·(I + O)."""
    return self.rank * (self.fan_in + self.fan_out)


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
  """Every module that can carry an adapter (or does), by dotted path, in reading order."""
  kinds = tuple(layers.ADAPTED)
  found = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, kinds)]
  found.sort(key=lambda item: [(isinstance(s, str), s) for s in item[0]])
  return {".".join(map(str, path)): m for path, m in found}


def scale_of(alpha: float, rank: int, scaling: str = "standard") -> float:
  """alpha/rank, or alpha/sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
  return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def resolve(
  model: nnx.Module,
  targets: str | Sequence[str] = "re:.*",
  *,
  rank: int = 8,
  alpha: float | None = None,
  scaling: str = "standard",
  exclude: str | Sequence[str] | None = None,
  layers_: Sequence[int] | None = None,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  presets: Presets | None = None,
) -> list[Adapted]:
  """The table of modules that these settings adapt; alpha defaults to twice the module's rank.

  The first matching pattern of `rank_pattern` and of `alpha_pattern` wins. Raises InputError naming every pattern
  that matches no target, with the nearest paths.
  """
  presets = presets or {}
  known = {path: m for path, m in modules(model).items() if layers.adaptable(m)}
  chosen = select(list(known), targets, exclude, layers_, presets)
  problems = [
    f"lora.{name}={{{pattern}: …}} matches none of the adapted modules: {', '.join(chosen[:4])}, …"
    for name, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern))
    for pattern in patterns or {}
    if not any(_hits(pattern, path, presets) for path in chosen)
  ]
  if problems:
    raise InputError(problems)
  table = []
  for path in chosen:
    r = _first(rank_pattern, path, presets, rank)
    a = float(_first(alpha_pattern, path, presets, 2 * r if alpha is None else alpha))
    table.append(Adapted(path, *layers.kernel_shape(known[path]), r, a, scale_of(a, r, scaling)))
  return table


def _hits(pattern: str, path: str, presets: Presets) -> bool:
  return any(matches(p, path) for p in presets.get(pattern, [pattern]))


def _first(patterns: Mapping | None, path: str, presets: Presets, default):
  return next((value for pattern, value in (patterns or {}).items() if _hits(pattern, path, presets)), default)


def draw(
  model: nnx.Module, table: Sequence[Adapted], key: jax.Array, init: str = "kaiming", std: float | None = None
) -> dict[str, jax.Array]:
  """A (I, R) of every row of `table`, from `key` folded with the module's path; one compiled program."""
  known = modules(model)
  fans = [layers.fan_in(known[row.path]) for row in table]

  def all_of_them(key):
    pairs = zip(table, fans, strict=True)
    return {t.path: layers.draw_a(path_key(key, t.path), init, fan, t.fan_in, t.rank, std) for t, fan in pairs}

  return jax.jit(all_of_them)(key)


def place(model: nnx.Module, table: Sequence[Adapted], a: Mapping[str, jax.Array], compute: str = "auto") -> None:
  """Puts an adapter with the A given and B = 0 on every module of `table`."""
  known = modules(model)
  for row in table:
    layers.attach(known[row.path], a[row.path], jnp.zeros((row.rank, row.fan_out), jnp.float32), row.scale, compute)


def inject(
  model: nnx.Module,
  targets: str | Sequence[str] = "re:.*",
  *,
  key: jax.Array | None = None,
  init: str = "kaiming",
  init_std: float | None = None,
  compute: str = "auto",
  **settings,
) -> list[Adapted]:
  """Adapts `model` in place and returns the table of what it adapted; outputs do not change until B does.

  `settings` are those of `resolve`: rank, alpha, scaling, exclude, layers_, rank_pattern, alpha_pattern, presets.
  The base may be abstract (`nnx.eval_shape`); the adapters are real arrays.

  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
  >>> [(row.path, row.parameters) for row in inject(model, "layers.2", rank=2)]
  [('layers.2', 20)]
  """
  table = resolve(model, targets, **settings)
  key = jax.random.key(0) if key is None else key
  place(model, table, draw(model, table, key, init, init_std), compute)
  return table


def eject(model: nnx.Module) -> None:
  """Takes every adapter off `model`; its graph and state equal the base's again."""
  for module in modules(model).values():
    if isinstance(module, layers.Adapter):
      layers.detach(module)
