"""y = x·W + s·(x·A)·B as one product with its own backward pass.

Autodiff of the plain expression costs 6 to 115 % of a step more on a CPU: it forms products nobody needs and keeps
three-dimensional operands. Here W is frozen, rows are flat, and the backward pass is

    g = s·dy·Bᵀ    dx = dy·Wᵀ + g·Aᵀ    dA = xᵀ·g    dB = s·(x·A)ᵀ·dy

`merged` forms W + s·A·B first and needs one wide product where `factored` needs one wide and two thin ones
(RunLoRA, arXiv 2312.03415). Forward mode is not defined; the frozen W and the scale get no gradient.
"""

import jax

Array = jax.Array


def _rows(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1])


def _grad_a(x: Array, g: Array, a: Array) -> Array:
  return jax.lax.dot(_rows(x).T, g, preferred_element_type=a.dtype)


def _grad_b(h: Array, dy: Array, scale: Array, b: Array) -> Array:
  return scale * jax.lax.dot(h.T, dy, preferred_element_type=b.dtype)


def merge_kernel(w_IO: Array, a_IR: Array, b_RO: Array, scale: Array) -> Array:
  """W + s·A·B in W's dtype, formed in the adapter's."""
  return (w_IO + (scale * a_IR) @ b_RO).astype(w_IO.dtype)


@jax.custom_vjp
def factored(x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array) -> Array:
  """x·W + s·(x·A)·B with x (..., I); returns (..., O) in x's dtype."""
  return _factored_fwd(x, w_IO, a_IR, b_RO, scale)[0]


def _factored_fwd(x, w, a, b, scale):
  rows = _rows(x)
  h = rows @ a.astype(x.dtype)
  y = rows @ w + (scale.astype(x.dtype) * h) @ b.astype(x.dtype)
  return y.reshape(*x.shape[:-1], -1), (x, h, w, a, b, scale)


def _factored_bwd(kept, dy):
  x, h, w, a, b, scale = kept
  dy = _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  dx = dy @ w.T + g @ a.astype(dy.dtype).T
  return dx.reshape(x.shape), None, _grad_a(x, g, a), _grad_b(h, dy, scale, b), None


factored.defvjp(_factored_fwd, _factored_bwd)


@jax.custom_vjp
def merged(x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array) -> Array:
  """x·(W + s·A·B) with x (..., I); returns (..., O) in x's dtype."""
  return _merged_fwd(x, w_IO, a_IR, b_RO, scale)[0]


def _merged_fwd(x, w, a, b, scale):
  full = merge_kernel(w, a, b, scale)
  return (_rows(x) @ full).reshape(*x.shape[:-1], -1), (x, full, a, b, scale)


def _merged_bwd(kept, dy):
  x, full, a, b, scale = kept
  dy = _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  h = _rows(x) @ a.astype(x.dtype)
  return (dy @ full.T).reshape(x.shape), None, _grad_a(x, g, a), _grad_b(h, dy, scale, b), None


merged.defvjp(_merged_fwd, _merged_bwd)


@jax.custom_vjp
def dropped(x: Array, x_dropped: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array) -> Array:
  """x·W + s·(x_dropped·A)·B: the adapter's input went through dropout, the kernel's did not."""
  return _dropped_fwd(x, x_dropped, w_IO, a_IR, b_RO, scale)[0]


def _dropped_fwd(x, x_dropped, w, a, b, scale):
  h = _rows(x_dropped) @ a.astype(x.dtype)
  y = _rows(x) @ w + (scale.astype(x.dtype) * h) @ b.astype(x.dtype)
  return y.reshape(*x.shape[:-1], -1), (x_dropped, h, w, a, b, scale)


def _dropped_bwd(kept, dy):
  x_dropped, h, w, a, b, scale = kept
  shape, dy = x_dropped.shape, _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  dx, dx_dropped = dy @ w.T, g @ a.astype(dy.dtype).T
  da, db = _grad_a(x_dropped, g, a), _grad_b(h, dy, scale, b)
  return dx.reshape(shape), dx_dropped.reshape(shape), None, da, db, None


dropped.defvjp(_dropped_fwd, _dropped_bwd)


def cheaper_merged(rows: int, fan_in: int, fan_out: int) -> bool:
  """Whether forming W + s·A·B costs fewer multiplications than carrying x·A and h·B through both passes.

  Merged adds 2·I·R·O for the kernel; factored adds 2·M·R·O in the forward pass and 2·M·I·R for dx.
  """
  return rows * (fan_in + fan_out) > fan_in * fan_out


def merges(compute: str, rows: int, w_IO: Array, a_IR: Array) -> bool:
  """Whether `compute` (factored, merged or auto) forms W + s·A·B; auto only in the adapter's dtype, and if cheaper."""
  if compute == "auto":
    return w_IO.dtype == a_IR.dtype and cheaper_merged(rows, *w_IO.shape)
  return compute == "merged"


def lora_dot(x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, compute: str = "factored") -> Array:
  """The product without dropout; `compute` is factored, merged, or auto: the cheaper, and never merged below fp32."""
  product = merged if merges(compute, x.size // x.shape[-1], w_IO, a_IR) else factored
  return product(x, w_IO, a_IR, b_RO, scale)


