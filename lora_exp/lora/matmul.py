"""y = x·W + s·(x·A)·B − s·(x·A₀)·B₀ as one product with its own backward pass.

Automatic differentiation of the plain expression makes a training step 6 to 115 % slower on a CPU: it computes
products that are not needed and stores three-dimensional operands. Here W, A₀ and B₀ are frozen, inputs are flattened
to rows, and the backward pass is

    g = s·dy·Bᵀ    dx = dy·Wᵀ + g·Aᵀ − s·dy·B₀ᵀ·A₀ᵀ    dA = xᵀ·g    dB = s·(x·A)ᵀ·dy

`merged` forms W + s·A·B first and needs one wide product, where `factored` needs one wide and two thin products
(RunLoRA, arXiv 2312.03415). A quantised W is dequantised in each pass and not stored. Only reverse-mode differentiation
is supported. W, A₀, B₀ and the scale get no gradient.
"""

import jax

from lora_exp.lora.quantization import dense, is_quantised
from lora_exp.runtime.fusion import apart

Array = jax.Array
Start = tuple[Array, Array] | None  # A₀ and B₀ of PiSSA and OLoRA


def low_rank(a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """Returns s·A·B − s·A₀·B₀ (…, I, O); exactly zero while A = A₀ and B = B₀. The scale broadcasts against A."""
  product = (scale * a_IR) @ b_RO
  return product if start is None else product - (scale * start[0]) @ start[1]


def _rows(x: Array) -> Array:
  """(..., I) flattened to (M, I)."""
  return x.reshape(-1, x.shape[-1])


def grad_a(x: Array, g: Array, a: Array) -> Array:
  """dA = xᵀ·g, in the dtype of A.

  It is computed as (gᵀ·x)ᵀ: on a CPU, transposing the thin operand takes 0.2 to 0.4 of the time. `apart` keeps XLA from
  undoing this.
  """
  return apart(jax.lax.dot(g.T, _rows(x), preferred_element_type=a.dtype)).T


def _grad_b(h: Array, dy: Array, scale: Array, b: Array) -> Array:
  """dB = s·hᵀ·dy with h = x·A, in the dtype of B."""
  return scale * jax.lax.dot(h.T, dy, preferred_element_type=b.dtype)


def _thin(rows: Array, a: Array, b: Array, scale: Array) -> tuple[Array, Array]:
  """Returns h = rows·A and s·h·B."""
  h = rows @ a.astype(rows.dtype)
  return h, (scale.astype(rows.dtype) * h) @ b.astype(rows.dtype)


def _low_rank(rows: Array, a: Array, b: Array, scale: Array, start: Start) -> tuple[Array, Array]:
  """Returns h = rows·A and s·h·B − s·(rows·A₀)·B₀; the latter is exactly zero while A = A₀ and B = B₀."""
  h, y = _thin(rows, a, b, scale)
  return (h, y) if start is None else (h, y - _thin(rows, start[0], start[1], scale)[1])


def _frozen_dx(dy: Array, w: Array, scale: Array, start: Start) -> Array:
  """Returns dy·Wᵀ − s·dy·B₀ᵀ·A₀ᵀ, the gradient that reaches x through the frozen arrays."""
  dx = dy @ w.T
  if start is None:
    return dx
  a, b = (leaf.astype(dy.dtype) for leaf in start)
  return dx - ((scale.astype(dy.dtype) * dy) @ b.T) @ a.T


def merge_kernel(w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """Returns W + s·A·B − s·A₀·B₀ (…, I, O), summed in the wider dtype and rounded to that of W."""
  return (w_IO + low_rank(a_IR, b_RO, scale, start)).astype(w_IO.dtype)


@jax.custom_vjp
def factored(x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """Returns x·W + s·(x·A)·B − s·(x·A₀)·B₀ (..., O) for x (..., I), in the dtype of x. W may be quantised."""
  return _factored_fwd(x, w_IO, a_IR, b_RO, scale, start)[0]


def _factored_fwd(x, w, a, b, scale, start):
  rows = _rows(x)
  h, low = _low_rank(rows, a, b, scale, start)
  y = rows @ dense(w, x.dtype) + low
  return y.reshape(*x.shape[:-1], -1), (x, h, w, a, b, scale, start)


def _factored_bwd(residuals, dy):
  x, h, w, a, b, scale, start = residuals
  dy = _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  dx = _frozen_dx(dy, dense(w, dy.dtype), scale, start) + g @ a.astype(dy.dtype).T
  return dx.reshape(x.shape), None, grad_a(x, g, a), _grad_b(h, dy, scale, b), None, None


factored.defvjp(_factored_fwd, _factored_bwd)


@jax.custom_vjp
def merged(x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """Returns x·(W + s·A·B − s·A₀·B₀) (..., O) for x (..., I), in the dtype of x. W may be quantised."""
  return _merged_fwd(x, w_IO, a_IR, b_RO, scale, start)[0]


def _merged_fwd(x, w, a, b, scale, start):
  full = merge_kernel(dense(w, x.dtype), a, b, scale, start)
  return (_rows(x) @ full).reshape(*x.shape[:-1], -1), (x, full, a, b, scale)


def _merged_bwd(residuals, dy):
  x, full, a, b, scale = residuals
  dy = _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  h = _rows(x) @ a.astype(x.dtype)
  return (dy @ full.T).reshape(x.shape), None, grad_a(x, g, a), _grad_b(h, dy, scale, b), None, None


merged.defvjp(_merged_fwd, _merged_bwd)


@jax.custom_vjp
def dropped(
  x: Array, x_dropped: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None
) -> Array:
  """Like `factored`, but A takes `x_dropped`, which is x after dropout; W and A₀ take x."""
  return _dropped_fwd(x, x_dropped, w_IO, a_IR, b_RO, scale, start)[0]


def _dropped_fwd(x, x_dropped, w, a, b, scale, start):
  rows = _rows(x)
  h, low = _thin(_rows(x_dropped), a, b, scale)
  y = rows @ dense(w, x.dtype) + low
  if start is not None:
    y = y - _thin(rows, start[0], start[1], scale)[1]
  return y.reshape(*x.shape[:-1], -1), (x_dropped, h, w, a, b, scale, start)


def _dropped_bwd(residuals, dy):
  x_dropped, h, w, a, b, scale, start = residuals
  shape, dy = x_dropped.shape, _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  dx, dx_dropped = _frozen_dx(dy, dense(w, dy.dtype), scale, start), g @ a.astype(dy.dtype).T
  da, db = grad_a(x_dropped, g, a), _grad_b(h, dy, scale, b)
  return dx.reshape(shape), dx_dropped.reshape(shape), None, da, db, None, None


dropped.defvjp(_dropped_fwd, _dropped_bwd)


def cheaper_merged(rows: int, fan_in: int, fan_out: int) -> bool:
  """Whether `merged` needs fewer multiplications than `factored` for M rows.

  `merged` adds 2·I·R·O to form the kernel; `factored` adds 2·M·R·O in the forward pass and 2·M·I·R for dx.
  """
  return rows * (fan_in + fan_out) > fan_in * fan_out


def merges(compute: str, rows: int, w_IO: Array, a_IR: Array, kept: bool = True) -> bool:
  """Whether `compute` ("factored", "merged" or "auto") uses `merged`.

  "auto" does if it is cheaper, W is not quantised, and W has the dtype of A, so that merging does not round ΔW. A
  merged kernel that is `kept` for the backward pass is a second copy of W, so it must save half of the multiplications.
  """
  if compute == "auto":
    cost = rows // 2 if kept else rows
    return not is_quantised(w_IO) and w_IO.dtype == a_IR.dtype and cheaper_merged(cost, *w_IO.shape)
  return compute == "merged"


def lora_dot(
  x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None, compute: str = "factored"
) -> Array:
  """Returns `factored` or `merged` as `compute` ("factored", "merged" or "auto") selects; see `merges`."""
  product = merged if merges(compute, x.size // x.shape[-1], w_IO, a_IR) else factored
  return product(x, w_IO, a_IR, b_RO, scale, start)
