"""IA³: trained vectors that rescale the outputs or the inputs of modules (arXiv 2205.05638).

The paper rescales keys, values, and the hidden features of feed-forward blocks. The patterns in
`lora.options.feedforward` select the modules whose inputs are rescaled: the second layer of each feed-forward block.
Biases are not rescaled.
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
  """The adapted kernel is W·diag(l), or diag(l)·W if inputs are rescaled."""

  name = "ia3"
  title = "IA³"
  paper = "2205.05638"
  cost = "O parameters, or I if inputs are rescaled"
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
    column_axes={"ia3_out": 0, "ia3_in": 1},
    harmless=frozenset({"feedforward_modules"}),
  )

  def leaf_names(self, path: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the vector of inputs for feed-forward modules, else the vector of outputs."""
    patterns = as_list(options.get("feedforward", self.options["feedforward"]))
    return ("ia3_in",) if any(matches(pattern, path) for pattern in patterns) else ("ia3_out",)

  def init(self, key: jax.Array, kernel: Array, module: AdaptedModule, settings: InitSettings) -> dict[str, Array]:
    """Initializes the vector with ones."""
    names = self.leaf_names(module.path, settings.options)
    return {name: jnp.ones(self.shape(name, kernel, module)) for name in names}

  def adapted(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """Returns W with rescaled columns or rows; W itself where the scale is 0."""
    rescales_outputs, vector = _vector(leaves, jnp.asarray(scale)[..., None])
    factor = vector[..., None, :] if rescales_outputs else vector[..., :, None]
    return (kernel * factor).astype(kernel.dtype)

  def apply(
    self, x: Array, kernel: Array, leaves: Leaves, scale: Array, *, dropped: Array | None = None, compute: str = "auto"
  ) -> Array:
    """Rescales x or y, without forming the adapted kernel."""
    rescales_outputs, vector = _vector(leaves, scale)
    vector, w = vector.astype(x.dtype), dense(kernel, x.dtype)
    return (x @ w) * vector if rescales_outputs else (x * vector) @ w

  def peft_fields(self, names: Mapping[str, str], leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """Returns `feedforward_modules`, the modules whose inputs are rescaled."""
    return {"feedforward_modules": [names[path] for path, arrays in leaves.items() if "ia3_in" in arrays]}

  def peft_leaf_names(self, name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the vector of inputs if `name` ends with one of `feedforward_modules`, as PEFT compares them."""
    suffixes = values.get("feedforward_modules") or []
    suffixes = [suffixes] if isinstance(suffixes, str) else suffixes
    is_feedforward = any(isinstance(suffix, str) and name.endswith(suffix) for suffix in suffixes)
    return ("ia3_in",) if is_feedforward else ("ia3_out",)

  def peft_reason(self, modules: tuple[AdaptedModule, ...], leaves: Mapping[str, Leaves]) -> str | None:
    """PEFT rescales the biases of modules whose outputs are rescaled."""
    for module in modules:
      if module.has_bias and "ia3_out" in leaves[module.path]:
        return f"PEFT's IA³ rescales the bias of {module.path} as well"
    return None

  def check(self, config: LoraConfig) -> list[str]:
    """The patterns of lora.options.feedforward must be valid."""
    return list(pattern_problems("lora.options.feedforward", (config.options or {}).get("feedforward")))


def _vector(leaves: Leaves, scale: Array) -> tuple[bool, Array]:
  """Returns whether outputs are rescaled, and the vector, which is 1 where the scale is 0."""
  rescales_outputs = "ia3_out" in leaves
  vector = leaves["ia3_out" if rescales_outputs else "ia3_in"]
  return rescales_outputs, jnp.where(jnp.asarray(scale) != 0, vector, 1)
