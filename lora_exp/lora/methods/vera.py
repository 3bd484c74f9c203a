"""VeRA: random frozen A and B, shared by all modules, with two trained vectors per module (arXiv 2310.11454)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.lora.initialization import draw_a, he_uniform
from lora_exp.lora.methods.base import Factors, InitSettings, Leaf, Leaves, Method, Modules
from lora_exp.lora.peft_format import PeftFormat
from lora_exp.runtime.dropout import path_key

LAMBDA_D = 0.1  # initial value of d, as in the paper and in PEFT


class VeRA(Method):
  """ΔW = A·diag(d)·B·diag(b)."""

  name = "vera"
  title = "VeRA"
  paper = "2310.11454"
  cost = "R + O parameters; R·(I + O) random constants for the whole model"
  leaves = {
    "vera_a": Leaf("IR", trained=False, shared=True),
    "vera_b": Leaf("RO", trained=False, shared=True),
    "lambda_d": Leaf("R"),
    "lambda_b": Leaf("O"),
  }
  uses_alpha = False
  one_rank = True
  stackable = False
  peft = PeftFormat(
    "VERA",
    keys={"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"},
    shared_keys={"vera_a": "base_model.vera_A", "vera_b": "base_model.vera_B"},
    alpha_key=None,
    dropout_key="vera_dropout",
    bias_word="vera_only",
  )

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """Draws A and B for all modules, sized for the largest, and sets d to 0.1 and b to zero in each module."""
    fan_in, fan_out = max(row.fan_in for row in modules.rows), max(row.fan_out for row in modules.rows)
    rank = max(row.rank for row in modules.rows)
    shared_a = draw_a(path_key(key, "vera_a"), "he_uniform", fan_in, fan_in, rank)
    # PEFT draws B as (out, rank) with fan-in R. Drawn as (R, O), a padded rank does not change the other rows.
    shared_b = he_uniform(path_key(key, "vera_b"), (rank, fan_out), rank, rank, None)
    return {
      row.path: {
        "vera_a": shared_a,
        "vera_b": shared_b,
        "lambda_d": jnp.full((row.rank,), LAMBDA_D),
        "lambda_b": jnp.zeros((row.fan_out,)),
      }
      for row in modules.rows
    }

  def factors(self, leaves: Leaves) -> Factors:
    """Returns A·diag(d) and B·diag(b)."""
    return leaves["vera_a"] * leaves["lambda_d"][..., None, :], leaves["vera_b"] * leaves["lambda_b"][..., None, :]
