"""A teacher for adapters with a known solution: the base plus an update of rank k on given modules (`data=planted`).

Students learn the teacher's next-token distribution instead of the tokens of the text, so sampling noise does not hide
the effect of rank and targets. All k directions of the update have the same singular value, so a student of rank k - 1
cannot represent the update.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp import lora
from lora_exp.config import Config, InputError, TeacherConfig
from lora_exp.lora import kernels
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.models.registry import get_family
from lora_exp.runtime.dropout import path_key, stream_key
from lora_exp.runtime.mesh import Layout, dotted
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.step import Batch, features
from lora_exp.train.compute.vocabulary_head import Head, head_of

Values = Mapping[str, Any]  # a model's parameters by dotted path


@dataclass
class Teacher:
  """The teacher's model on the mesh. A call adds its features `teacher` (B, T, D) and `teacher_head` to a batch."""

  model: Callable[[Tree], LanguageModel]  # builds the model from its parameters
  params: Tree
  head: Head
  layout: Layout

  @cached_property
  def _features(self) -> Callable[[Tree, Batch], jax.Array]:
    """The compiled function (params, batch) -> features (B, T, D)."""

    def teacher_features(params: Tree, batch: Batch) -> jax.Array:
      return features(self.model(self.layout.gather_fsdp(params)), batch)

    return jax.jit(teacher_features)

  def __call__(self, batch: Batch) -> Batch:
    return batch | {"teacher": self._features(self.params, batch), "teacher_head": self.head}

  def of_orders(self, batches: Batch) -> Batch:
    """The result for batches with a leading axis K of orders of the rows; the head has no such axis."""
    count = len(batches["tokens"])
    batch_features = [self._features(self.params, {name: x[k] for name, x in batches.items()}) for k in range(count)]
    return batches | {"teacher": jnp.stack(batch_features), "teacher_head": self.head}

  def abstract(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a call, or of `of_orders`, for a batch of ShapeDtypeStructs."""
    lead = batch["tokens"].shape[:-2]  # (K,) for several orders
    one_order = {name: jax.ShapeDtypeStruct(x.shape[len(lead) :], x.dtype) for name, x in batch.items()}
    x = jax.eval_shape(self._features, self.params, one_order)
    sharding = self.layout.order_batch if lead else self.layout.batch
    x = jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=sharding)
    return {**batch, "teacher": x, "teacher_head": self.head}


def table_of(model: nnx.Module, cfg: Config) -> list[lora.AdaptedModule]:
  """The modules whose kernels the teacher of `cfg.data` changes. Raises InputError for invalid targets or ranks."""
  teacher_cfg = cfg.data.teacher
  assert teacher_cfg is not None
  family = get_family(cfg.model.family)
  try:
    table = lora.resolve(model, teacher_cfg.targets, rank=teacher_cfg.rank, presets=family.presets)
  except InputError as error:
    raise InputError([problem.replace("lora.targets", "data.teacher.targets") for problem in error.problems]) from None
  heads = {path for path, module in lora.modules(model).items() if module is getattr(model, "head", None)}
  problems = []
  for row in table:
    most = min(row.fan_in, row.fan_out)
    if row.path in heads:
      problems.append(f"data.teacher.targets: {row.path} is the head, which teacher and students share; remove it")
    if row.rank > most:
      problems.append(f"data.teacher.rank={row.rank}: {row.path} is {row.fan_in}×{row.fan_out}; at most {most}")
  if problems:
    raise InputError(problems)
  return table


def make_teacher(cfg: Config, model: nnx.Module, base: Values, layout: Layout) -> Teacher | None:
  """The teacher of `cfg.data`, or None without one.

  `model` is the abstract base, `base` its arrays by dotted path. If they are abstract, so is the teacher.
  """
  teacher_cfg = cfg.data.teacher
  if teacher_cfg is None:
    return None
  table = table_of(model, cfg)
  values = {**base, **planted(model, table, teacher_cfg, base)}
  parts: Any = nnx.split(model, nnx.Param, ...)
  graph, state, dropout_keys = parts
  unused_keys = jax.tree.map(_unused_key, nnx.to_pure_dict(dropout_keys))

  def parameter(key_path: tuple, _: Any) -> Any:
    return values[dotted(key_path)]

  def build(params: Tree) -> Any:
    return nnx.merge(graph, params, unused_keys)

  def make_head(params: Tree) -> Head:
    return head_of(build(params).head, jnp.zeros((), cfg.model.dtype))

  params = jax.tree_util.tree_map_with_path(parameter, nnx.to_pure_dict(state))
  abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
  head = jax.eval_shape(make_head, params) if abstract else make_head(params)
  return Teacher(build, params, head, layout)


def _unused_key(_: Any) -> jax.Array:
  """A placeholder for a dropout key; the teacher has no dropout."""
  return jax.random.key(0)


def planted(
  model: nnx.Module, table: list[lora.AdaptedModule], teacher_cfg: TeacherConfig, base: Values
) -> dict[str, jax.Array]:
  """The teacher's kernels W + ΔW by dotted path, with ΔW = strength·‖W‖/√k · U·Vᵀ.

  U (I, k) and V (O, k) have orthonormal columns. Abstract kernels are left out.
  """
  root, kernels_by_path = stream_key(teacher_cfg.seed, "teacher"), {}
  for row in table:
    module = lora.modules(model)[row.path]
    w = lora.kernels_of(model, [row], base)[row.path]
    name = f"{row.path}.{'embedding' if isinstance(module, nnx.Embed) else 'kernel'}"
    if isinstance(w, jax.ShapeDtypeStruct):
      continue
    sides = jax.random.split(path_key(root, row.path))
    u, v = (_orthonormal(key, (*w.shape[:-2], size, row.rank)) for key, size in zip(sides, w.shape[-2:], strict=True))
    norm = jnp.linalg.norm(w.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    update = teacher_cfg.strength / math.sqrt(row.rank) * norm * (u @ jnp.swapaxes(v, -1, -2))
    kernels_by_path[name] = kernels.from_IO(module, (w + update).astype(w.dtype))
  return kernels_by_path


def _orthonormal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A random array (…, size, k) with orthonormal columns. It is finished before the next one starts.

  On CPU, jaxlib's QR waits in a thread of a pool for other threads of that pool. Two at once can wait for ever.
  """
  return jax.block_until_ready(jnp.linalg.qr(jax.random.normal(key, shape))[0])
