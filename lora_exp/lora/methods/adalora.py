"""AdaLoRA: LoRA with a diagonal matrix e, whose values are pruned to a budget in training (arXiv 2303.10512).

The update is s·A·diag(e)·B. `rank_allocation` chooses the values of e that are set to zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_exp.config import LoraConfig
from lora_exp.lora.methods.base import Array, Factors, InitSettings, Leaf, Leaves, Modules
from lora_exp.lora.methods.lora import FORMAT, LoRA
from lora_exp.lora.methods.rank_allocation import allocate
from lora_exp.lora.peft_format import PeftFormat
from lora_exp.runtime.dropout import path_key

STD = 0.02  # initial standard deviation of A and B (section 3.1 of the paper), as in PEFT
PEFT = PeftFormat(
  "ADALORA",
  keys={"lora_a": "lora_A", "lora_b": "lora_B", "lora_e": "lora_E"},
  rank_key="init_r",
  mask_suffix="lora_E",
  dropout_key="lora_dropout",
  bias_word="lora_only",
  column_axes={"lora_e": 0},
  harmless=frozenset({"beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit",
                      "total_step", *FORMAT.harmless}),
)  # fmt: skip


class AdaLoRA(LoRA):
  """ΔW = s·A·diag(e)·B, with e pruned to a budget of ranks."""

  name = "adalora"
  title = "AdaLoRA"
  paper = "2303.10512"
  cost = "R·(I + O + 1) parameters, and two running averages of each in addition to the optimizer's state"
  leaves = LoRA.leaves | {"lora_e": Leaf("R")}
  uses_budget = True
  elementwise_update = False
  peft = None
  peft_reads = PEFT

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """Draws A and B from N(0, STD²) and sets e to zero; lora.init has no effect."""
    initialized = super().init_all(modules, key, InitSettings("normal", STD), done)
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      shape = self.shape("lora_b", kernel, row)
      b = STD * jax.random.normal(jax.random.fold_in(path_key(key, row.path), 1), shape)
      initialized[row.path] |= {"lora_b": b, "lora_e": jnp.zeros(self.shape("lora_e", kernel, row))}
    return initialized

  def factors(self, leaves: Leaves) -> Factors:
    """Returns A·diag(e) and B."""
    return leaves["lora_a"] * leaves["lora_e"][..., None, :], leaves["lora_b"]

  def peft_leaves(self, leaves: Leaves, needed: bool) -> dict[str, Array]:
    """Returns A·diag(e) and B without the pruned ranks; a `needed` module retains at least one rank."""
    a, b, e = leaves["lora_a"], leaves["lora_b"], leaves["lora_e"]
    retained = (e != 0).reshape(-1, a.shape[-1]).any(axis=0)
    retained[0] |= needed and not retained.any()
    return {"lora_a": (a * e[..., None, :])[..., retained], "lora_b": b[..., retained, :]}

  def wrap_optimizer(self, rule: optax.GradientTransformation, trial: Any) -> optax.GradientTransformation:
    """Wraps `rule` in `allocate`."""
    return allocate(rule, steps=trial.steps, budget=trial.budget)

  def summary(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """Returns the number of remaining ranks of each module."""
    if not leaves:
      return {}
    ranks = {path: int(np.count_nonzero(arrays["lora_e"])) for path, arrays in leaves.items()}
    return {"kept_ranks": ranks}

  def check(self, config: LoraConfig) -> list[str]:
    """The budget is required and is at most the rank; no other setting may choose the ranks."""
    problems = []
    if config.budget is None:
      problems.append("lora.budget=null: AdaLoRA needs the average rank per module at the end, such as lora.budget=8")
    elif config.budget > config.rank:
      problems.append(
        f"lora.budget={config.budget:g}: must be at most the initial rank, lora.rank={config.rank}"
      )
    if config.parameters is not None:
      problems.append(
        f"lora.parameters={config.parameters:g}: AdaLoRA chooses the ranks by lora.budget; remove lora.parameters"
      )
    return problems
