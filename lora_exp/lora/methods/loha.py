"""LoHa: ΔW is the Hadamard product of two low-rank products (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

With the parameters of two LoRAs of rank R its update has a rank of up to R².
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
    "hada_w1_a": Leaf("RO"),  # named as in PEFT, whose w1_a (out, rank) is our B₁ transposed
    "hada_w1_b": Leaf("IR"),
    "hada_w2_a": Leaf("RO"),
    "hada_w2_b": Leaf("IR"),
  }
  peft = PeftFormat(
    "LOHA",
    keys={name: name for name in leaves},
    alpha_key="alpha",
    adapts_conv1d=False,
    constants={"init_weights": True},
    harmless=frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d"}),
  )

  def init(self, key: jax.Array, kernel: Array, module: AdaptedModule, settings: InitSettings) -> dict[str, Array]:
    """As in PEFT: Kaiming uniform for all factors but A₂, which is zero. `lora.init` has no say."""
    started = {"hada_w2_b": jnp.zeros(self.shape("hada_w2_b", kernel, module))}
    fans = {"hada_w1_a": module.rank, "hada_w1_b": module.fan_in, "hada_w2_a": module.rank}
    for i, (name, fan) in enumerate(fans.items()):
      shape = self.shape(name, kernel, module)
      started[name] = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -1, 1) / math.sqrt(fan)
    return started

  def delta(self, kernel: Any, leaves: Leaves, scale: Any) -> Array:
    """ΔW (…, I, O)."""
    first = leaves["hada_w1_b"] @ leaves["hada_w1_a"]
    second = leaves["hada_w2_b"] @ leaves["hada_w2_a"]
    return per_kernel(scale) * first * second
