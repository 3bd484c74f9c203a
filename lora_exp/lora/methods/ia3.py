"""IA³: vectors that rescale the outputs of modules, or their inputs (arXiv 2205.05638).

The paper rescales keys, values, and the features inside the feed-forward block. `lora.options.feedforward` names the
modules whose inputs are rescaled: the second layer of each feed-forward block. Biases are not rescaled.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.config import LoraConfig
from lora_exp.config.lora_checks import pattern_problems
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods.base import Array, InitSettings, Leaf, Leaves, Method
from lora_exp.lora.peft_format import PeftFormat
from lora_exp.lora.quantization import dense
from lora_exp.lora.targets import as_list, matches


class IA3(Method):
  """W·diag(l), or diag(l)·W where inputs are rescaled."""

  name = "ia3"
  title = "IA³"
  paper = "2205.05638"
  cost = "O parameters, or I where inputs are rescaled"
  leaves = {"ia3_out": Leaf("O"), "ia3_in": Leaf("I")}
  additive = False
  uses_alpha = False
  drops_input = False
  options = {"feedforward": ["linear2", "mlp.c_proj", "down_proj"]}
  peft = PeftFormat(
    "IA3",
    keys={"ia3_out": "ia3_l", "ia3_in": "ia3_l"},
    alpha_key=None,
    has_ranks=False,
    constants={"init_ia3_weights": True},
    column_axes={"ia3_out": 0, "ia3_in": 1},
    harmless=frozenset({"feedforward_modules"}),
  )

  def leaf_names(self, path: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """One vector: of the inputs for feed-forward modules, else of the outputs."""
    patterns = as_list(options.get("feedforward", self.options["feedforward"]))
    return ("ia3_in",) if any(matches(pattern, path) for pattern in patterns) else ("ia3_out",)

  def init(self, key: jax.Array, kernel: Array, module: AdaptedModule, settings: InitSettings) -> dict[str, Array]:
    """Ones."""
    names = self.leaf_names(module.path, settings.options)
    return {name: jnp.ones(self.shape(name, kernel, module)) for name in names}

  def adapted(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """W with rescaled columns or rows; W itself where the scale is 0."""
    out, vector = _vector(leaves, jnp.asarray(scale)[..., None])
    return (kernel * (vector[..., None, :] if out else vector[..., :, None])).astype(kernel.dtype)

  def apply(
    self, x: Array, kernel: Array, leaves: Leaves, scale: Array, *, dropped: Array | None = None, compute: str = "auto"
  ) -> Array:
    """Rescales x or y, without forming the adapted kernel."""
    out, vector = _vector(leaves, scale)
    vector, w = vector.astype(x.dtype), dense(kernel, x.dtype)
    return (x @ w) * vector if out else (x * vector) @ w

  def peft_fields(self, names: Mapping[str, str], leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """The modules whose inputs are rescaled."""
    return {"feedforward_modules": [names[path] for path, x in leaves.items() if "ia3_in" in x]}

  def peft_leaf_names(self, name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """From `feedforward_modules`, which PEFT takes for ends of names."""
    ends = values.get("feedforward_modules") or []
    ends = [ends] if isinstance(ends, str) else ends
    return ("ia3_in",) if any(isinstance(end, str) and name.endswith(end) for end in ends) else ("ia3_out",)

  def peft_reason(self, modules: tuple[AdaptedModule, ...], leaves: Mapping[str, Leaves]) -> str | None:
    """PEFT rescales biases with the outputs."""
    biased = next((m.path for m in modules if m.has_bias and "ia3_out" in leaves[m.path]), None)
    return None if biased is None else f"PEFT's IA³ rescales the bias of {biased} as well"

  def check(self, config: LoraConfig) -> list[str]:
    """The patterns are patterns."""
    return list(pattern_problems("lora.options.feedforward", (config.options or {}).get("feedforward")))


def _vector(leaves: Leaves, scale: Array) -> tuple[bool, Array]:
  """Whether outputs are rescaled, and the vector; ones where the scale is 0."""
  out = "ia3_out" in leaves
  return out, jnp.where(jnp.asarray(scale) != 0, leaves["ia3_out" if out else "ia3_in"], 1)
