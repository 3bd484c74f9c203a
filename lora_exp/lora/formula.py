"""What an adapter adds to a kernel W (in, out), whatever its method: one formula over the leaves that the adapter has.

    y = g ⊙ (x·W + s·(x·A)·B − s·(x·A₀)·B₀)

| leaves an adapter has                    | method        | what they mean                                          |
| ---------------------------------------- | ------------- | ------------------------------------------------------- |
| `lora_a`, `lora_b`                       | LoRA          | A and B; g is 1 and A₀, B₀ are not there                 |
| and `start_a`, `start_b`                 | PiSSA, OLoRA  | A₀ and B₀, what A and B started as: frozen, W untouched  |
| and `magnitude`, `kernel_norm2`          | DoRA          | g = m / ‖W + s·A·B‖, a norm for each output              |
| and `lora_e`                             | AdaLoRA       | A is `lora_a`·diag(e)                                    |
| `vera_a`, `vera_b`, `lambda_d`, `lambda_b` | VeRA        | A is `vera_a`·diag(d), B is `vera_b`·diag(b)             |

Leaves are arrays by name, jax's or numpy's; leading axes (of stacked kernels) stay in front.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any
Leaves = Mapping[str, Array]


class Leaf(NamedTuple):
  """One kind of array that an adapter may have."""

  axes: str  # I: in, O: out, R: rank
  trained: bool


LEAVES: dict[str, Leaf] = {
  "lora_a": Leaf("IR", True),
  "lora_b": Leaf("RO", True),
  "lora_e": Leaf("R", True),
  "magnitude": Leaf("O", True),
  "lambda_d": Leaf("R", True),
  "lambda_b": Leaf("O", True),
  "start_a": Leaf("IR", False),
  "start_b": Leaf("RO", False),
  "kernel_norm2": Leaf("O", False),
  "vera_a": Leaf("IR", False),
  "vera_b": Leaf("RO", False),
}
METHODS: dict[str, tuple[str, ...]] = {  # the leaves of each method; `init=pissa` and `olora` add A₀ and B₀
  "lora": ("lora_a", "lora_b"),
  "dora": ("lora_a", "lora_b", "magnitude", "kernel_norm2"),
  "adalora": ("lora_a", "lora_b", "lora_e"),
  "vera": ("vera_a", "vera_b", "lambda_d", "lambda_b"),
}
TINY = 1e-30  # below any squared norm of a kernel's column that is not zero


def trainable(method: str, fan_in: int, fan_out: int, rank: int) -> int:
  """Trained parameters of one adapted kernel."""
  sizes = {"I": fan_in, "O": fan_out, "R": rank}
  total = 0
  for name in METHODS[method]:
    size = 1
    for axis in LEAVES[name].axes:
      size *= sizes[axis]
    total += size * LEAVES[name].trained
  return total


def factors(leaves: Leaves) -> tuple[Array, Array]:
  """(A, B) of the update, what is trained of them folded in."""
  if "vera_a" in leaves:
    return leaves["vera_a"] * leaves["lambda_d"][..., None, :], leaves["vera_b"] * leaves["lambda_b"][..., None, :]
  a, b = leaves["lora_a"], leaves["lora_b"]
  return (a * leaves["lora_e"][..., None, :] if "lora_e" in leaves else a), b


def start(leaves: Leaves) -> tuple[Array, Array] | None:
  """(A₀, B₀), or None."""
  return (leaves["start_a"], leaves["start_b"]) if "start_a" in leaves else None


def update(leaves: Leaves, scale: Array) -> Array:
  """ΔW (…, I, O) = s·(A·B − A₀·B₀), without DoRA's factor."""
  return low_rank(*factors(leaves), jnp.asarray(scale)[..., None, None], start(leaves))


def low_rank(a_IR: Array, b_RO: Array, scale: Array, start: tuple[Array, Array] | None = None) -> Array:
  """s·A·B − s·A₀·B₀; exactly zero while A and B are A₀ and B₀."""
  product = (scale * a_IR) @ b_RO
  return product if start is None else product - (scale * start[0]) @ start[1]


def gate(leaves: Leaves, w_IO: Array, scale: Array) -> Array | None:
  """DoRA's g (…, O), without forming A·B; None for other methods. The norm is detached (arXiv 2402.09353, section 4.3).

  ‖W + s·A·B‖² = ‖W‖² + 2s·Σ (AᵀW) ⊙ B + s²·Σ (AᵀA·B) ⊙ B, sums over the rank. With B = 0 it is the kept ‖W‖² to the
  last bit, so that g is 1. Where a trial does not adapt the module (scale 0) g is 1 too.
  """
  if "magnitude" not in leaves:
    return None
  a, b, s = leaves["lora_a"], leaves["lora_b"], jnp.asarray(scale)[..., None]
  w = w_IO.astype(a.dtype)
  at = jnp.swapaxes(a, -1, -2)
  cross, own = ((at @ w) * b).sum(-2), ((at @ a @ b) * b).sum(-2)
  norm2 = jnp.maximum(leaves["kernel_norm2"] + 2 * s * cross + s * s * own, TINY)
  active = jnp.broadcast_to(s != 0, norm2.shape)
  norm = jax.lax.stop_gradient(jnp.sqrt(jnp.where(active, norm2, 1)))
  # Not m/norm, which XLA may turn into a product that is 1 only almost while nothing has moved.
  return jnp.where(active, 1 + (leaves["magnitude"] - norm) / norm, 1)


def merged_kernel(w_IO: Array, leaves: Leaves, scale: Array) -> Array:
  """g ⊙ (W + ΔW) in W's dtype, formed in the adapter's."""
  kernel = w_IO + update(leaves, scale)
  g = gate(leaves, w_IO, scale)
  return (kernel if g is None else kernel * g[..., None, :]).astype(w_IO.dtype)


def squared_norm(w_IO: Array) -> Array:
  """‖W‖² of each column (…, O), in float32 at least."""
  wide = jnp.asarray(w_IO).astype(jnp.promote_types(jnp.asarray(w_IO).dtype, jnp.float32))
  return jnp.maximum(jnp.square(wide).sum(-2), TINY)
