"""y = x·W + s·(x·A)·B − s·(x·A₀)·B₀ as one product with its own backward pass.

Autodiff of the plain expression costs 6 to 115 % of a step more on a CPU: it forms products nobody needs and keeps
three-dimensional operands. Here W, A₀ and B₀ are frozen, rows are flat, and the backward pass is

    g = s·dy·Bᵀ    dx = dy·Wᵀ + g·Aᵀ − s·dy·B₀ᵀ·A₀ᵀ    dA = xᵀ·g    dB = s·(x·A)ᵀ·dy

`merged` forms W + s·A·B first and needs one wide product where `factored` needs one wide and two thin ones
(RunLoRA, arXiv 2312.03415). A quantised W is made whole in each pass and not kept. Forward mode is not defined; W, A₀,
B₀ and the scale get no gradient.
"""

import jax

from lora_exp.lora.quantization import dense, is_quantised

Array = jax.Array
Start = tuple[Array, Array] | None  # A₀ and B₀ of PiSSA and OLoRA


def low_rank(a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """s·A·B − s·A₀·B₀; exactly zero while A and B are A₀ and B₀. The scale is broadcast against A."""
  product = (scale * a_IR) @ b_RO
  return product if start is None else product - (scale * start[0]) @ start[1]


def _rows(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1])


def _grad_a(x: Array, g: Array, a: Array) -> Array:
  return jax.lax.dot(_rows(x).T, g, preferred_element_type=a.dtype)


def _grad_b(h: Array, dy: Array, scale: Array, b: Array) -> Array:
  return scale * jax.lax.dot(h.T, dy, preferred_element_type=b.dtype)


def _thin(rows: Array, a: Array, b: Array, scale: Array) -> tuple[Array, Array]:
  """rows·A, and s·(rows·A)·B."""
  h = rows @ a.astype(rows.dtype)
  return h, (scale.astype(rows.dtype) * h) @ b.astype(rows.dtype)


def _low_rank(rows: Array, a: Array, b: Array, scale: Array, start: Start) -> tuple[Array, Array]:
  """rows·A, and the whole update of the output; exactly zero while A and B are what they started as."""
  h, y = _thin(rows, a, b, scale)
  return (h, y) if start is None else (h, y - _thin(rows, start[0], start[1], scale)[1])


def _into_x(dy: Array, w: Array, scale: Array, start: Start) -> Array:
  """dy·Wᵀ − s·dy·B₀ᵀ·A₀ᵀ."""
  dx = dy @ w.T
  if start is None:
    return dx
  a, b = (leaf.astype(dy.dtype) for leaf in start)
  return dx - ((scale.astype(dy.dtype) * dy) @ b.T) @ a.T


def merge_kernel(w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """W + s·A·B − s·A₀·B₀ in W's dtype, formed in the adapter's."""
  return (w_IO + low_rank(a_IR, b_RO, scale, start)).astype(w_IO.dtype)


@jax.custom_vjp
def factored(x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """x·W + s·(x·A)·B − s·(x·A₀)·B₀ with x (..., I); returns (..., O) in x's dtype."""
  return _factored_fwd(x, w_IO, a_IR, b_RO, scale, start)[0]


def _factored_fwd(x, w, a, b, scale, start):
  rows = _rows(x)
  h, low = _low_rank(rows, a, b, scale, start)
  y = rows @ dense(w, x.dtype) + low
  return y.reshape(*x.shape[:-1], -1), (x, h, w, a, b, scale, start)


def _factored_bwd(kept, dy):
  x, h, w, a, b, scale, start = kept
  dy = _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  dx = _into_x(dy, dense(w, dy.dtype), scale, start) + g @ a.astype(dy.dtype).T
  return dx.reshape(x.shape), None, _grad_a(x, g, a), _grad_b(h, dy, scale, b), None, None


factored.defvjp(_factored_fwd, _factored_bwd)


@jax.custom_vjp
def merged(x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None) -> Array:
  """x·(W + s·A·B − s·A₀·B₀) with x (..., I); returns (..., O) in x's dtype."""
  return _merged_fwd(x, w_IO, a_IR, b_RO, scale, start)[0]


def _merged_fwd(x, w, a, b, scale, start):
  full = merge_kernel(dense(w, x.dtype), a, b, scale, start)
  return (_rows(x) @ full).reshape(*x.shape[:-1], -1), (x, full, a, b, scale)


def _merged_bwd(kept, dy):
  x, full, a, b, scale = kept
  dy = _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  h = _rows(x) @ a.astype(x.dtype)
  return (dy @ full.T).reshape(x.shape), None, _grad_a(x, g, a), _grad_b(h, dy, scale, b), None, None


merged.defvjp(_merged_fwd, _merged_bwd)


@jax.custom_vjp
def dropped(
  x: Array, x_dropped: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None
) -> Array:
  """`factored` where A's input went through dropout, and that of the kernel and of A₀ did not."""
  return _dropped_fwd(x, x_dropped, w_IO, a_IR, b_RO, scale, start)[0]


def _dropped_fwd(x, x_dropped, w, a, b, scale, start):
  rows = _rows(x)
  h, low = _thin(_rows(x_dropped), a, b, scale)
  y = rows @ dense(w, x.dtype) + low
  if start is not None:
    y = y - _thin(rows, start[0], start[1], scale)[1]
  return y.reshape(*x.shape[:-1], -1), (x_dropped, h, w, a, b, scale, start)


def _dropped_bwd(kept, dy):
  x_dropped, h, w, a, b, scale, start = kept
  shape, dy = x_dropped.shape, _rows(dy)
  g = (scale.astype(dy.dtype) * dy) @ b.astype(dy.dtype).T
  dx, dx_dropped = _into_x(dy, dense(w, dy.dtype), scale, start), g @ a.astype(dy.dtype).T
  da, db = _grad_a(x_dropped, g, a), _grad_b(h, dy, scale, b)
  return dx.reshape(shape), dx_dropped.reshape(shape), None, da, db, None, None


dropped.defvjp(_dropped_fwd, _dropped_bwd)


def cheaper_merged(rows: int, fan_in: int, fan_out: int) -> bool:
  """Whether forming W + s·A·B costs fewer multiplications than carrying x·A and h·B through both passes.

  Merged adds 2·I·R·O for the kernel; factored adds 2·M·R·O in the forward pass and 2·M·I·R for dx.
  """
  return rows * (fan_in + fan_out) > fan_in * fan_out


def merges(compute: str, rows: int, w_IO: Array, a_IR: Array) -> bool:
  """Whether `compute` (factored, merged or auto) forms W + s·A·B; auto only in the adapter's dtype, and if cheaper."""
  if compute == "auto":
    return not is_quantised(w_IO) and w_IO.dtype == a_IR.dtype and cheaper_merged(rows, *w_IO.shape)
  return compute == "merged"


def lora_dot(
  x: Array, w_IO: Array, a_IR: Array, b_RO: Array, scale: Array, start: Start = None, compute: str = "factored"
) -> Array:
  """The product without dropout; `compute` is factored, merged, or auto: the cheaper, and never merged below fp32."""
  product = merged if merges(compute, x.size // x.shape[-1], w_IO, a_IR) else factored
  return product(x, w_IO, a_IR, b_RO, scale, start)
