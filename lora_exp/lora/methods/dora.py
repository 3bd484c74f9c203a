"""DoRA: each output's size is trained apart from its direction, y = m/‖W + s·A·B‖ ⊙ (x·W + s·(x·A)·B) (2402.09353)."""

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

TINY = 1e-30  # below any squared norm of a kernel's column that is not zero


class DoRA(LoRA):
  """LoRA for the direction, and a magnitude for each output."""

  name = "dora"
  title = "DoRA"
  paper = "2402.09353"
  cost = "R·(I + O) + O parameters, and the norms of W + s·A·B in every step"
  leaves = LoRA.leaves | {"magnitude": Leaf("O"), "kernel_norm2": Leaf("O", trained=False)}
  additive = False
  peft = replace(
    FORMAT,
    keys=LORA_KEYS | {"magnitude": "lora_magnitude_vector"},
    table_keys=LORA_TABLE_KEYS | {"magnitude": "lora_magnitude_vector"},
    select={"use_dora": True},
    adapts_tied_head=False,
  )
  inspect_note = "DoRA's ΔW is s·A·B; what its norm does to W is in the intruders alone."

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """As LoRA; the magnitude starts as the norm of W's columns."""
    started = super().init_all(modules, key, settings, done)
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      norm2 = jnp.zeros(self.shape("magnitude", kernel, row)) if is_abstract(kernel) else squared_norm(dense(kernel))
      started[row.path] |= {"magnitude": jnp.sqrt(norm2), "kernel_norm2": norm2}
    return started

  def complete(self, leaves: Leaves, kernel: Array) -> dict[str, Array]:
    """With ‖W‖², which is the base's and not in a file."""
    if "kernel_norm2" in leaves:
      return dict(leaves)
    norm2 = jnp.zeros(leaves["magnitude"].shape) if is_abstract(kernel) else squared_norm(dense(kernel))
    return {**leaves, "kernel_norm2": norm2}

  def gate(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """m/‖W + s·A·B‖ (…, O) without forming A·B. The norm gets no gradient (section 4.3 of the paper).

    ‖W + s·A·B‖² = ‖W‖² + 2s·Σ (AᵀW) ⊙ B + s²·Σ (AᵀA·B) ⊙ B, sums over the rank. With B = 0 it is the kept ‖W‖² to the
    last bit, so that g is 1. Where a trial does not adapt the module (scale 0) g is 1 too.
    """
    a, b, s = leaves["lora_a"], leaves["lora_b"], jnp.asarray(scale)[..., None]
    w = kernel.astype(a.dtype)
    at = jnp.swapaxes(a, -1, -2)
    cross, square = ((at @ w) * b).sum(-2), ((at @ a @ b) * b).sum(-2)
    norm2 = jnp.maximum(leaves["kernel_norm2"] + 2 * s * cross + s * s * square, TINY)
    active = jnp.broadcast_to(s != 0, norm2.shape)
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.where(active, norm2, 1)))
    # Not m/norm, which XLA may turn into a product that is 1 only almost while nothing has moved.
    return jnp.where(active, 1 + (leaves["magnitude"] - norm) / norm, 1)

  def resize_problem(self, module: AdaptedModule, leaves: Leaves) -> str | None:
    """The norm that divides follows from A·B, so that the scale must not be 0."""
    if module.scale == 0:
      return "this DoRA cannot be resized, as its scale is 0; merge it and extract a LoRA instead"
    return None

  def resized(self, product: Leaves, leaves: Leaves) -> tuple[str, dict[str, Array]]:
    """The magnitude stays: each output's kernel keeps its length."""
    return self.name, {**product, **{name: leaves[name] for name in ("magnitude", "kernel_norm2") if name in leaves}}


def squared_norm(w_IO: Array) -> jax.Array:
  """‖W‖² of each column (…, O), in float32 at least."""
  wide = jnp.asarray(w_IO).astype(jnp.promote_types(jnp.asarray(w_IO).dtype, jnp.float32))
  return jnp.maximum(jnp.square(wide).sum(-2), TINY)
