"""LoRA: y = x·W + s·(x·A)·B with trained A and B (arXiv 2106.09685).

rsLoRA (lora.scaling=rslora), LoRA+ (lora.lr_ratio) and QLoRA (lora.quant) are settings of this method.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from lora_exp.lora.initialization import draw_all
from lora_exp.lora.methods.base import Factors, InitSettings, Leaf, Leaves, Method, Modules
from lora_exp.lora.peft_format import LORA_KEYS, LORA_TABLE_KEYS, PeftFormat

FORMAT = PeftFormat(
  "LORA",
  keys=LORA_KEYS,
  table_keys=LORA_TABLE_KEYS,
  select={"use_dora": False},
  dropout_key="lora_dropout",
  bias_word="lora_only",
  rslora=True,
  adapts_tied_head=True,
  output_bias=True,
  adapts_experts=True,
  harmless=frozenset({"megatron_core", "qalora_group_size", "eva_config", "runtime_config"}),
)


class LoRA(Method):
  """ΔW = s·A·B."""

  name = "lora"
  title = "LoRA"
  paper = "2106.09685"
  cost = "R·(I + O) parameters"
  leaves = {"lora_a": Leaf("IR"), "lora_b": Leaf("RO")}
  has_lr_ratio = True
  peft: ClassVar[PeftFormat | None] = FORMAT

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """Draws A from the distribution lora.init and sets B to zero."""
    leads = {path: tuple(w.shape[:-2]) for path, w in modules.kernels.items()}
    drawn = draw_all(modules.rows, modules.fans, leads, key, settings.init, settings.std)
    initialized = {}
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      initialized[row.path] = {"lora_a": drawn[row.path], "lora_b": jnp.zeros(self.shape("lora_b", kernel, row))}
    return initialized

  def factors(self, leaves: Leaves) -> Factors:
    """Returns A and B."""
    return leaves["lora_a"], leaves["lora_b"]

  def update_factors(self, trial: Any) -> optax.GradientTransformation:
    """Multiplies the updates of B by `lr_ratio` (LoRA+, arXiv 2402.12354)."""

    def scale(path: tuple, update: jax.Array) -> jax.Array:
      """The update of one leaf."""
      return update * trial.lr_ratio if getattr(path[-1], "key", None) == "lora_b" else update

    def scale_all(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
      return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(scale_all)

