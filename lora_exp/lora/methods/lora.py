"""LoRA: y = x·W + s·(x·A)·B, A and B are trained (arXiv 2106.09685).

rsLoRA (lora.scaling=rslora), LoRA+ (lora.lr_ratio) and QLoRA (lora.quant) are settings of it.
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
  constants={"init_lora_weights": True},
  dropout_key="lora_dropout",
  bias_word="lora_only",
  rslora=True,
  adapts_tied_head=True,
  harmless=frozenset({"megatron_core", "qalora_group_size", "eva_config", "runtime_config"}),
)


class LoRA(Method):
  """A product of two thin factors."""

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
    """A is drawn, B is zero."""
    leads = {path: tuple(w.shape[:-2]) for path, w in modules.kernels.items()}
    drawn = draw_all(modules.rows, modules.fans, leads, key, settings.init, settings.std)
    started = {}
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      started[row.path] = {"lora_a": drawn[row.path], "lora_b": jnp.zeros(self.shape("lora_b", kernel, row))}
    return started

  def factors(self, leaves: Leaves) -> Factors:
    """A and B."""
    return leaves["lora_a"], leaves["lora_b"]

  def update_factors(self, trial: Any) -> optax.GradientTransformation:
    """B's whole update is `lr_ratio` times what A's would be (LoRA+, arXiv 2402.12354)."""

    def scale(path: tuple, update: jax.Array) -> jax.Array:
      return update * trial.lr_ratio if getattr(path[-1], "key", None) == "lora_b" else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))

