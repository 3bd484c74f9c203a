"""Vocabulary projection and cross-entropy in one function, which never holds the logits of all tokens at once.

The function scans over chunks along T, so that B remains the sharded axis. The forward scan also computes dx and the
gradients of the head. The backward pass only multiplies them by the cotangent, so logits are computed once and freed.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.lora import matmul
from lora_exp.models.modules.attention import softcap
from lora_exp.runtime.dropout import dropout
from lora_exp.train.compute.chunk_size import CHUNK_LOGITS, chunk_positions
from lora_exp.train.compute.vocabulary_head import (
  Head,
  head_of,
  kernel_gradient,
  logits_of,
  merged_kernel,
  merges,
  project,
  project_back,
  trains,
  vocabulary,
)

Array = jax.Array


class TeacherTargets(NamedTuple):
  """Targets of distillation: the teacher's final features (B, T, D), and the head that projects them to logits."""

  x_BTD: Any
  head: Head


class Sums(NamedTuple):
  """Weighted sums over tokens or examples, float32 scalars; or the weighted values of which they are the sums."""

  loss: Array  # nats; for regression, the squared error averaged over the outputs
  correct: Array | None  # number whose target (or the teacher's most likely token) is most likely; None for regression


class Static(NamedTuple):
  """Static arguments of the compiled loss."""

  train_kernel: bool  # the kernel needs a gradient
  train_bias: bool
  softcap: float | None  # logits become cap·tanh(logit/cap)


def head_loss(
  module,
  x_BTD: Array,
  targets: Array | TeacherTargets,
  weights_BT: Array,
  *,
  train_all=False,
  softcap: float | None = None,
) -> Sums:
  """Computes the sums of the next-token loss.

  Only reverse-mode differentiation is supported; `correct` has no gradient.

  Args:
    module: the output head, an adapted or plain nnx.Linear, or an nnx.Embed for a tied head.
    x_BTD: the final features.
    targets: token ids, int (B, T), with cross-entropy as the loss; or a teacher's outputs, with KL(teacher ‖ model).
    weights_BT: weight of each position; 0 for positions that do not count.
    train_all: compute gradients for every parameter, not only for those that the module's variable types select.
    softcap: cap of the logits, cap·tanh(logit/cap).
  """
  head = head_of(module, x_BTD)
  kernel, bias = trains(module)
  static = Static(train_all or kernel, train_all or bias, softcap)
  if head.a is None:
    return _vocab_loss(static, x_BTD, None, head, targets, weights_BT)
  if not module.deterministic and not isinstance(module, nnx.Embed):  # as in PEFT, embeddings have no dropout
    dropped = dropout(x_BTD, module.rate[...], module.key[...])
    return _vocab_loss(static, x_BTD, dropped, head, targets, weights_BT)
  if not merges(module, weights_BT, head):
    return _vocab_loss(static, x_BTD, x_BTD, head, targets, weights_BT)
  return _merged_loss(static, x_BTD, head, targets, weights_BT)


def head_losses(
  module, x_BTD: Array, targets: Array | TeacherTargets, weights_BT: Array, softcap: float | None = None
) -> tuple[Sums, Sums]:
  """The sums of `head_loss` without dropout, and the values (B, T) of which they are the sums. It has no gradient."""
  head = head_of(module, x_BTD)
  kernel, x_lora = head.kernel, None if head.a is None else x_BTD
  if head.a is not None and merges(module, weights_BT, head):
    kernel, x_lora = merged_kernel(head), None
  static = Static(train_kernel=False, train_bias=False, softcap=softcap)
  sums, _, by_token = _scan(static, x_BTD, x_lora, head, kernel, targets, weights_BT, gradients=False, by_token=True)
  return sums, Sums(*by_token)


def example_losses(z_BO: Array, y: Array, weights_B: Array) -> Sums:
  """The values of each example (B,): cross-entropy for integer classes y (B,), squared error for floats y (B, O)."""
  z_BO = z_BO.astype(jnp.float32)
  if not jnp.issubdtype(y.dtype, jnp.integer):
    return Sums(jnp.square(z_BO - y).mean(-1) * weights_B, None)
  label = jnp.take_along_axis(z_BO, y[:, None], axis=1)[:, 0]
  nats = jax.nn.logsumexp(z_BO, axis=-1) - label
  return Sums(nats * weights_B, (label >= z_BO.max(-1)) * weights_B)


def example_loss(z_BO: Array, y: Array, weights_B: Array) -> Sums:
  """The sums of `example_losses`."""
  return total(example_losses(z_BO, y, weights_B))


def total(values: Sums) -> Sums:
  """The sums of values of tokens or examples."""
  return Sums(values.loss.sum(), None if values.correct is None else values.correct.sum())


def _chunks(x: Array, count: int) -> Array:
  """Splits (B, T, …) into (chunks, B, T/chunks, …), with T zero-padded."""
  B, T, *rest = x.shape
  size = math.ceil(T / count)
  x = jnp.pad(x, [(0, 0), (0, size * count - T)] + [(0, 0)] * len(rest))
  return jnp.moveaxis(x.reshape(B, count, size, *rest), 1, 0)


def _unchunk(x: Array, length: int) -> Array:
  """The inverse of `_chunks`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _chunk_count(weights_BT: Array, vocab: int) -> int:
  """The number of chunks; see `chunk_positions`."""
  rows, length = weights_BT.shape
  return math.ceil(length / chunk_positions(rows, length, vocab, CHUNK_LOGITS))


def _cross_entropy(z_MV: Array, targets_M: Array, weights_M: Array, cap: float | None) -> tuple[Sums, Array]:
  """Returns the values of M rows, and d(loss)/dz (M, V)."""
  z_MV = softcap(z_MV, cap)
  top = z_MV.max(-1, keepdims=True)
  exp = jnp.exp(z_MV - top)
  total = exp.sum(-1, keepdims=True)
  label = jnp.take_along_axis(z_MV, targets_M[:, None], axis=1)[:, 0]
  hit = jax.lax.broadcasted_iota(jnp.int32, z_MV.shape, 1) == targets_M[:, None]
  nats = jnp.log(total[:, 0]) + top[:, 0] - label
  dz = (exp / total - hit) * weights_M[:, None]
  if cap is not None:
    dz *= 1 - (z_MV / cap) ** 2
  return Sums(nats * weights_M, (label >= top[:, 0]) * weights_M), dz


def _divergence(z_MV: Array, teacher_MV: Array, weights_M: Array, cap: float | None) -> tuple[Sums, Array]:
  """Returns the values of M rows, with KL(softmax(teacher_MV) ‖ softmax(z_MV)) as the loss, and d(loss)/dz (M, V)."""
  z_MV, teacher_MV = softcap(z_MV, cap), softcap(teacher_MV, cap)
  log_q, log_p = jax.nn.log_softmax(z_MV), jax.nn.log_softmax(teacher_MV)
  p = jnp.exp(log_p)
  nats = (p * (log_p - log_q)).sum(-1)
  label = jnp.take_along_axis(z_MV, teacher_MV.argmax(-1)[:, None], axis=1)[:, 0]
  dz = (jnp.exp(log_q) - p) * weights_M[:, None]
  if cap is not None:
    dz *= 1 - (z_MV / cap) ** 2
  return Sums(nats * weights_M, (label >= z_MV.max(-1)) * weights_M), dz


def _scan(static: Static, x, x_lora, head: Head, kernel, targets, weights, gradients: bool, by_token: bool = False):
  """Scans over the chunks and returns the sums, the gradients of the head, and [dx, g].

  `kernel` is W, with `x_lora` (B, T, D) as the input of A; or W + s·A·B, with `x_lora` None. g = s·dz·Bᵀ (B, T, R) is
  returned so that the caller computes dA = xᵀ·g once; it is missing for a head without an adapter. Without `gradients`,
  the gradients of the head are zeros and the last result is None; or, `by_token`, the values (B, T) of `Sums`.
  """
  length, wide = weights.shape[1], jnp.float32
  count = _chunk_count(weights, vocabulary(kernel))
  teacher_head = targets.head if isinstance(targets, TeacherTargets) else None
  target_values = targets.x_BTD if isinstance(targets, TeacherTargets) else targets  # teacher's features, or token ids
  adapted = head.a is not None
  zero = Head(
    kernel=jax.tree.map(partial(jnp.zeros_like, dtype=wide), kernel) if static.train_kernel else None,
    bias=jnp.zeros(head.bias.shape, wide) if static.train_bias and head.bias is not None else None,
    b=jnp.zeros(head.b.shape, wide) if adapted else None,
  )

  def body(carry, chunk):
    """Adds one chunk to the sums and gradients."""
    sums, grads = carry
    xs, target_chunk, chunk_weights = chunk[0], chunk[-2], chunk[-1].reshape(-1)
    rows = xs.reshape(-1, xs.shape[-1])
    lora_rows = chunk[1].reshape(rows.shape) if x_lora is not None else rows
    z = project(rows, kernel)
    h: Any = lora_rows @ head.a.astype(rows.dtype) if adapted and (gradients or x_lora is not None) else None
    if x_lora is not None:
      z += head.scale * jax.lax.dot(h, head.b.astype(rows.dtype), preferred_element_type=wide)
    if head.bias is not None:
      z += head.bias
    if teacher_head is None:
      values, dz = _cross_entropy(z, target_chunk.reshape(-1), chunk_weights, static.softcap)
    else:
      teacher_z = logits_of(target_chunk.reshape(-1, target_chunk.shape[-1]), teacher_head)
      values, dz = _divergence(z, teacher_z, chunk_weights, static.softcap)
    chunk_sums = total(values)
    sums = Sums(sums.loss + chunk_sums.loss, sums.correct + chunk_sums.correct)
    if not gradients:
      return (sums, grads), [x.reshape(xs.shape[:2]) for x in values if x is not None] if by_token else None
    dz = dz.astype(rows.dtype)
    out = [project_back(dz, kernel).reshape(xs.shape)]
    if adapted:
      out.append((head.scale * (dz @ head.b.astype(dz.dtype).T)).reshape(*xs.shape[:2], -1))
      grads = grads._replace(b=grads.b + head.scale * jax.lax.dot(h.T, dz, preferred_element_type=wide))
    if static.train_kernel:
      grads = grads._replace(kernel=jax.tree.map(jnp.add, grads.kernel, kernel_gradient(rows, dz, kernel)))
    if grads.bias is not None:
      grads = grads._replace(bias=grads.bias + dz.sum(0, dtype=wide))
    return (sums, grads), out

  parts = [x, target_values, weights] if x_lora is None else [x, x_lora, target_values, weights]
  start = (Sums(jnp.zeros((), wide), jnp.zeros((), wide)), zero)
  (sums, grads), out = jax.lax.scan(body, start, [_chunks(p, count) for p in parts])
  return sums, grads, [_unchunk(o, length) for o in out] if gradients or by_token else None


def _grad_a(x, g, head: Head) -> Array:
  """dA = xᵀ·g, in the dtype of A."""
  return matmul.grad_a(x, g.reshape(-1, g.shape[-1]).astype(x.dtype), head.a)


def _scale_tree(tree, factor: Array):
  """Multiplies every array of `tree` by `factor`, in the dtype of the array."""
  return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vocab_loss(static: Static, x, x_lora, head: Head, targets, weights) -> Sums:
  """The sums with separate products for W and for A·B; `x_lora` is the input of A, None without an adapter."""
  return _scan(static, x, x_lora, head, head.kernel, targets, weights, gradients=False)[0]


def _vocab_loss_fwd(static, x, x_lora, head, targets, weights):
  sums, grads, out = _scan(static, x, x_lora, head, head.kernel, targets, weights, gradients=True)
  dx_lora = None
  if x_lora is not None:
    g = out[1]
    grads = grads._replace(a=_grad_a(x_lora, g, head))
    dx_lora = (g.reshape(-1, g.shape[-1]).astype(x.dtype) @ head.a.astype(x.dtype).T).reshape(x.shape)
  return sums, (out[0], dx_lora, grads)


def _vocab_loss_bwd(static, gradients, cotangent: Sums):
  dx, dx_lora, grads = _scale_tree(gradients, cotangent.loss)
  return dx, dx_lora, grads, None, None


_vocab_loss.defvjp(_vocab_loss_fwd, _vocab_loss_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged_loss(static: Static, x, head: Head, targets, weights) -> Sums:
  """The sums with one product for W + s·A·B."""
  return _merged_scan(static, x, head, targets, weights, gradients=False)[0]


def _merged_scan(static, x, head, targets, weights, gradients):
  return _scan(static, x, None, head, merged_kernel(head), targets, weights, gradients)


def _merged_loss_fwd(static, x, head, targets, weights):
  sums, grads, (dx, g) = _merged_scan(static, x, head, targets, weights, gradients=True)
  return sums, (dx, grads._replace(a=_grad_a(x, g, head)))


def _merged_loss_bwd(static, gradients, cotangent: Sums):
  dx, grads = _scale_tree(gradients, cotangent.loss)
  return dx, grads, None, None


_merged_loss.defvjp(_merged_loss_fwd, _merged_loss_bwd)
