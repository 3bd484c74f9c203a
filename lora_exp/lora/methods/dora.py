"""DoRA: the magnitude and the direction of each kernel column are trained separately (arXiv 2402.09353).

y = m/‖W + s·A·B‖ ⊙ (x·W + s·(x·A)·B), with the norm of each column.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.initialization import is_abstract
from lora_exp.lora.methods.base import Array, InitSettings, Leaf, Leaves, Modules
from lora_exp.lora.methods.lora import FORMAT, LoRA
from lora_exp.lora.peft_format import LORA_KEYS, LORA_TABLE_KEYS
from lora_exp.lora.quantization import dense

TINY = 1e-30  # smaller than any nonzero squared norm of a kernel column


class DoRA(LoRA):
  """LoRA for the direction, and a trained magnitude m for each output."""

  name = "dora"
  title = "DoRA"
  paper = "2402.09353"
  cost = "R·(I + O) + O parameters; the norms of W + s·A·B are computed in every step"
  leaves = LoRA.leaves | {"magnitude": Leaf("O"), "kernel_norm2": Leaf("O", trained=False)}
  additive = False
  peft = replace(
    FORMAT,
    keys=LORA_KEYS | {"magnitude": "lora_magnitude_vector"},
    table_keys=LORA_TABLE_KEYS | {"magnitude": "lora_magnitude_vector"},
    select={"use_dora": True},
    adapts_tied_head=False,
    output_bias=False,
    adapts_experts=False,
  )
  inspect_note = "DoRA's ΔW is s·A·B; the effect of its norm on W shows only in the intruders."

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """Initializes A and B as LoRA does, and the magnitude as the norm of each column of W."""
    initialized = super().init_all(modules, key, settings, done)
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      norm2 = jnp.zeros(self.shape("magnitude", kernel, row)) if is_abstract(kernel) else squared_norm(dense(kernel))
      initialized[row.path] |= {"magnitude": jnp.sqrt(norm2), "kernel_norm2": norm2}
    return initialized

  def complete(self, leaves: Leaves, kernel: Array, module: AdaptedModule) -> dict[str, Array]:
    """Adds ‖W‖², which files do not contain."""
    if "kernel_norm2" in leaves:
      return dict(leaves)
    norm2 = jnp.zeros(leaves["magnitude"].shape) if is_abstract(kernel) else squared_norm(dense(kernel))
    return {**leaves, "kernel_norm2": norm2}

  def gate(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """Returns m/‖W + s·A·B‖ (…, O) without forming A·B. The norm gets no gradient (section 4.3 of the paper).

    ‖W + s·A·B‖² = ‖W‖² + 2s·Σ (AᵀW) ⊙ B + s²·Σ (AᵀA·B) ⊙ B, with sums over the rank. With B = 0 this is the stored
    ‖W‖² bit for bit, so that g is exactly 1. Where the scale is 0, g is 1 too.
    """
    a, b, s = leaves["lora_a"], leaves["lora_b"], jnp.asarray(scale)[..., None]
    w = kernel.astype(a.dtype)
    at = jnp.swapaxes(a, -1, -2)
    cross, square = ((at @ w) * b).sum(-2), ((at @ a @ b) * b).sum(-2)
    norm2 = jnp.maximum(leaves["kernel_norm2"] + 2 * s * cross + s * s * square, TINY)
    active = jnp.broadcast_to(s != 0, norm2.shape)
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.where(active, norm2, 1)))
    # XLA may compile m/norm to a product with 1/norm, which would not be exactly 1 before the first step.
    return jnp.where(active, 1 + (leaves["magnitude"] - norm) / norm, 1)

  def resize_problem(self, module: AdaptedModule, leaves: Leaves) -> str | None:
    """The norm depends on s·A·B, so the scale must not be 0."""
    if module.scale == 0:
      return "this DoRA cannot be resized, as its scale is 0; merge it and extract a LoRA instead"
    return None

  def resized(self, product: Leaves, leaves: Leaves) -> tuple[str, dict[str, Array]]:
    """Returns a DoRA with the same magnitude, so that each column of the kernel keeps its norm."""
    norms = {name: leaves[name] for name in ("magnitude", "kernel_norm2") if name in leaves}
    return self.name, {**product, **norms}


def squared_norm(w_IO: Array) -> jax.Array:
  """Returns the squared norm of each column of W, (…, O), in float32 or wider."""
  wide = jnp.asarray(w_IO).astype(jnp.promote_types(jnp.asarray(w_IO).dtype, jnp.float32))
  return jnp.maximum(jnp.square(wide).sum(-2), TINY)
