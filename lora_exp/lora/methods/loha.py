"""LoHa: ΔW is the Hadamard product of two low-rank products (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

With as many parameters as two LoRAs of rank R, the update has a rank of up to R².
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods.base import Array, InitSettings, Leaf, Leaves, Method, per_kernel
from lora_exp.lora.peft_format import PeftFormat


class LoHa(Method):
  """ΔW = s·(A₁·B₁) ⊙ (A₂·B₂)."""

  name = "loha"
  title = "LoHa"
  paper = "2108.06098"
  cost = "2·R·(I + O) parameters; ΔW (I, O) is formed in every step"
  leaves = {
    "hada_w1_a": Leaf("RO"),  # names as in PEFT, which stores B₁ᵀ (out, rank) as w1_a
    "hada_w1_b": Leaf("IR"),
    "hada_w2_a": Leaf("RO"),
    "hada_w2_b": Leaf("IR"),
  }
  peft = PeftFormat(
    "LOHA",
    keys={name: name for name in leaves},
    alpha_key="alpha",
    adapts_conv1d=False,
    harmless=frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d"}),
  )

  def init(self, key: jax.Array, kernel: Array, module: AdaptedModule, settings: InitSettings) -> dict[str, Array]:
    """Draws all factors but A₂ from U(±1/√fan), and sets A₂ to zero, as PEFT does. `lora.init` has no effect."""
    initialized = {"hada_w2_b": jnp.zeros(self.shape("hada_w2_b", kernel, module))}
    fans = {"hada_w1_a": module.rank, "hada_w1_b": module.fan_in, "hada_w2_a": module.rank}
    for i, (name, fan) in enumerate(fans.items()):
      shape = self.shape(name, kernel, module)
      initialized[name] = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -1, 1) / math.sqrt(fan)
    return initialized

  def delta(self, kernel: Any, leaves: Leaves, scale: Any) -> Array:
    """Returns ΔW (…, I, O)."""
    first = leaves["hada_w1_b"] @ leaves["hada_w1_a"]
    second = leaves["hada_w2_b"] @ leaves["hada_w2_a"]
    return per_kernel(scale) * first * second
