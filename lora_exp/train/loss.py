"""Vocabulary projection and cross-entropy as one function that never holds the logits of all tokens.

Chunks go along T and keep B as the sharded axis; inside a chunk rows are flat. The forward scan already forms dx and
the gradients of the head, so the backward pass only multiplies: logits are made once, and freed.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.lora import matmul
from lora_exp.lora.layers import AdapterLayer, Trained
from lora_exp.lora.quantization import dense
from lora_exp.models.modules.attention import softcap
from lora_exp.runtime.dropout import dropout

Array = jax.Array
CHUNK_LOGITS = 2**25  # logits in one chunk at most: 128 MiB in float32; half as many cost 7 % of the step more


class Head(NamedTuple):
  """What the projection is made of; None where the head has no such part.

  A tied head is the table transposed: for E + s·A·B with A (V, R) and B (R, D), kernel is Eᵀ, a is Bᵀ and b is Aᵀ.
  """

  kernel: Any  # (D, V)
  bias: Any = None  # (V,)
  a: Any = None  # (D, R)
  b: Any = None  # (R, V)
  scale: Any = None


class TeacherTargets(NamedTuple):
  """What a teacher says instead of the text's own words: its features, and the head that makes them logits."""

  x_BTD: Any
  head: Head


class Sums(NamedTuple):
  """Sums over the tokens that count."""

  loss: Array  # nats; of a regression the squared error, its mean over the outputs
  correct: Array | None  # tokens (or examples) whose target, or the teacher's likeliest, is likeliest; or None


class Static(NamedTuple):
  """What a compiled loss is specialised to."""

  train_kernel: bool  # the kernel is trained too
  train_bias: bool
  softcap: float | None  # logits are cap·tanh(logit/cap)


def head_loss(
  module,
  x_BTD: Array,
  targets: Array | TeacherTargets,
  weights_BT: Array,
  *,
  train_all=False,
  softcap: float | None = None,
) -> Sums:
  """`Sums` of the next-token loss of features `x_BTD` under the head `module`: a Linear or a tied Embed.

  `targets` are words (B, T), or what a teacher says: the loss is then KL(teacher ‖ model).

  `train_all`: every parameter is trained; else those that the module itself says. Reverse mode only; `correct` has no
  gradient.
  """
  head = head_of(module, x_BTD)
  kernel, bias = trains(module)
  static = Static(train_all or kernel, train_all or bias, softcap)
  if head.a is None:
    return _vocab_loss(static, x_BTD, None, head, targets, weights_BT)
  if not module.deterministic and not isinstance(module, nnx.Embed):  # as in PEFT, nothing is dropped before a table
    dropped = dropout(x_BTD, module.rate[...], module.key[...])
    return _vocab_loss(static, x_BTD, dropped, head, targets, weights_BT)
  if not matmul.merges(module.compute, weights_BT.size, head.kernel, head.a):
    return _vocab_loss(static, x_BTD, x_BTD, head, targets, weights_BT)
  return _merged_loss(static, x_BTD, head, targets, weights_BT)


def trains(module) -> tuple[bool, bool]:
  """Whether a gradient is due to the kernel of a head (or to a kernel formed for it), and to its bias."""
  kernel = module.embedding if isinstance(module, nnx.Embed) else module.kernel
  bias = getattr(module, "bias", None)
  return isinstance(kernel, Trained) or forms_kernel(module), isinstance(bias, Trained)


def forms_kernel(module) -> bool:
  """Whether the update of an adapted head is more than one product of two thin factors (DoRA, PiSSA, LoHa).

  Its kernel is then formed, and autodiff takes the kernel's gradient on to the adapter.
  """
  return isinstance(module, AdapterLayer) and module.kind.thin_product(module.leaves()) is None


def head_of(module, x_BTD: Array) -> Head:
  """The parts of `module`, its kernel in the dtype that it computes in."""
  tied, dtype = isinstance(module, nnx.Embed), module.dtype or x_BTD.dtype
  table = dense((module.embedding if tied else module.kernel).get_value(), dtype).astype(dtype)
  bias = None if tied or module.bias is None else module.bias[...]
  if forms_kernel(module):
    table = module.adapted_kernel(table)
  if forms_kernel(module) or not isinstance(module, AdapterLayer):
    return Head(table.T if tied else table, bias)
  product, scale = module.kind.thin_product(module.leaves()), module.scale[...]
  assert product is not None
  a, b = product
  return Head(table.T, None, b.T, a.T, scale) if tied else Head(table, bias, a, b, scale)


def example_loss(z_BO: Array, y: Array, weights_B: Array) -> Sums:
  """`Sums` over examples: cross-entropy of the logits `z_BO` for classes y (B,), squared error for numbers y (B, O)."""
  z_BO = z_BO.astype(jnp.float32)
  if not jnp.issubdtype(y.dtype, jnp.integer):
    return Sums((jnp.square(z_BO - y).mean(-1) * weights_B).sum(), None)
  label = jnp.take_along_axis(z_BO, y[:, None], axis=1)[:, 0]
  nats = jax.nn.logsumexp(z_BO, axis=-1) - label
  return Sums((nats * weights_B).sum(), ((label >= z_BO.max(-1)) * weights_B).sum())


def _chunks(x: Array, count: int) -> Array:
  """(B, T, …) to (chunks, B, T/chunks, …), T padded with zeros."""
  B, T, *rest = x.shape
  size = math.ceil(T / count)
  x = jnp.pad(x, [(0, 0), (0, size * count - T)] + [(0, 0)] * len(rest))
  return jnp.moveaxis(x.reshape(B, count, size, *rest), 1, 0)


def _unchunk(x: Array, length: int) -> Array:
  """The inverse of `_chunks`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _chunk_count(weights_BT: Array, vocab: int) -> int:
  """Chunks of a power of two positions: common lengths then need no padding."""
  rows, length = weights_BT.shape
  size = max(1, CHUNK_LOGITS // (vocab * rows))
  return math.ceil(length / min(length, 2 ** (size.bit_length() - 1)))


def _cross_entropy(z_MV: Array, targets_M: Array, weights_M: Array, cap: float | None) -> tuple[Sums, Array]:
  """The sums over M rows, and d(loss)/dz."""
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
  return Sums((nats * weights_M).sum(), ((label >= top[:, 0]) * weights_M).sum()), dz


def _divergence(z_MV: Array, taught_MV: Array, weights_M: Array, cap: float | None) -> tuple[Sums, Array]:
  """KL(p ‖ q) summed over M rows, p and q the distributions of the logits `taught_MV` and z; and d(loss)/dz."""
  z_MV, taught_MV = softcap(z_MV, cap), softcap(taught_MV, cap)
  log_q, log_p = jax.nn.log_softmax(z_MV), jax.nn.log_softmax(taught_MV)
  p = jnp.exp(log_p)
  nats = (p * (log_p - log_q)).sum(-1)
  label = jnp.take_along_axis(z_MV, taught_MV.argmax(-1)[:, None], axis=1)[:, 0]
  dz = (jnp.exp(log_q) - p) * weights_M[:, None]
  if cap is not None:
    dz *= 1 - (z_MV / cap) ** 2
  return Sums((nats * weights_M).sum(), ((label >= z_MV.max(-1)) * weights_M).sum()), dz


def _scan(static: Static, x, x_lora, head: Head, kernel, targets, weights, gradients: bool):
  """One pass over the chunks: sums, and (dx, g, dhead) if `gradients`. `kernel` is W, or W + s·A·B with `x_lora` None.

  g = s·dz·Bᵀ (B, T, R) is what the adapter's A needs; dA = xᵀ·g is formed once, outside.
  """
  length, wide = weights.shape[1], jnp.float32
  count = _chunk_count(weights, kernel.shape[1])
  taught = targets.head if isinstance(targets, TeacherTargets) else None
  said = targets.x_BTD if isinstance(targets, TeacherTargets) else targets
  adapted = head.a is not None
  zero = Head(
    kernel=jnp.zeros(kernel.shape, wide) if static.train_kernel else None,
    bias=jnp.zeros(head.bias.shape, wide) if static.train_bias and head.bias is not None else None,
    b=jnp.zeros(head.b.shape, wide) if adapted else None,
  )

  def body(carry, chunk):
    sums, grads = carry
    xs, said_c, weights_c = chunk[0], chunk[-2], chunk[-1].reshape(-1)
    rows = xs.reshape(-1, xs.shape[-1])
    lora_rows = chunk[1].reshape(rows.shape) if x_lora is not None else rows
    z = jax.lax.dot(rows, kernel, preferred_element_type=wide)
    h: Any = lora_rows @ head.a.astype(rows.dtype) if adapted and (gradients or x_lora is not None) else None
    if x_lora is not None:
      z += head.scale * jax.lax.dot(h, head.b.astype(rows.dtype), preferred_element_type=wide)
    if head.bias is not None:
      z += head.bias
    if taught is None:
      new, dz = _cross_entropy(z, said_c.reshape(-1), weights_c, static.softcap)
    else:
      new, dz = _divergence(z, _logits(said_c.reshape(-1, said_c.shape[-1]), taught), weights_c, static.softcap)
    sums = Sums(sums.loss + new.loss, sums.correct + new.correct)
    if not gradients:
      return (sums, grads), None
    dz = dz.astype(rows.dtype)
    out = [(dz @ kernel.T).reshape(xs.shape)]
    if adapted:
      out.append((head.scale * (dz @ head.b.astype(dz.dtype).T)).reshape(*xs.shape[:2], -1))
      grads = grads._replace(b=grads.b + head.scale * jax.lax.dot(h.T, dz, preferred_element_type=wide))
    if static.train_kernel:
      grads = grads._replace(kernel=grads.kernel + jax.lax.dot(rows.T, dz, preferred_element_type=wide))
    if grads.bias is not None:
      grads = grads._replace(bias=grads.bias + dz.sum(0, dtype=wide))
    return (sums, grads), out

  parts = [x, said, weights] if x_lora is None else [x, x_lora, said, weights]
  start = (Sums(jnp.zeros((), wide), jnp.zeros((), wide)), zero)
  (sums, grads), out = jax.lax.scan(body, start, [_chunks(p, count) for p in parts])
  return sums, grads, [_unchunk(o, length) for o in out] if gradients else None


def _logits(rows: Array, head: Head) -> Array:
  """Of a head without an adapter, in float32."""
  z = jax.lax.dot(rows, head.kernel, preferred_element_type=jnp.float32)
  return z if head.bias is None else z + head.bias


def _grad_a(x, g, head: Head) -> Array:
  flat = lambda y: y.reshape(-1, y.shape[-1])
  return jax.lax.dot(flat(x).T, flat(g).astype(x.dtype), preferred_element_type=head.a.dtype)


def _times(tree, factor: Array):
  return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vocab_loss(static: Static, x, x_lora, head: Head, targets, weights) -> Sums:
  return _scan(static, x, x_lora, head, head.kernel, targets, weights, gradients=False)[0]


def _vocab_loss_fwd(static, x, x_lora, head, targets, weights):
  sums, grads, out = _scan(static, x, x_lora, head, head.kernel, targets, weights, gradients=True)
  dx_lora = None
  if x_lora is not None:
    g = out[1]
    grads = grads._replace(a=_grad_a(x_lora, g, head))
    dx_lora = (g.reshape(-1, g.shape[-1]).astype(x.dtype) @ head.a.astype(x.dtype).T).reshape(x.shape)
  return sums, (out[0], dx_lora, grads)


def _vocab_loss_bwd(static, kept, cotangent: Sums):
  dx, dx_lora, grads = _times(kept, cotangent.loss)
  return dx, dx_lora, grads, None, None


_vocab_loss.defvjp(_vocab_loss_fwd, _vocab_loss_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged_loss(static: Static, x, head: Head, targets, weights) -> Sums:
  return _merged_scan(static, x, head, targets, weights, gradients=False)[0]


def _merged_scan(static, x, head, targets, weights, gradients):
  kernel = matmul.merge_kernel(head.kernel, head.a, head.b, head.scale)
  return _scan(static, x, None, head, kernel, targets, weights, gradients)


def _merged_loss_fwd(static, x, head, targets, weights):
  sums, grads, (dx, g) = _merged_scan(static, x, head, targets, weights, gradients=True)
  return sums, (dx, grads._replace(a=_grad_a(x, g, head)))


def _merged_loss_bwd(static, kept, cotangent: Sums):
  dx, grads = _times(kept, cotangent.loss)
  return dx, grads, None, None


_merged_loss.defvjp(_merged_loss_fwd, _merged_loss_bwd)
