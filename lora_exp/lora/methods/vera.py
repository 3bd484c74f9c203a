"""VeRA: A and B are random, frozen, and shared by all modules; a vector of each side is trained (arXiv 2310.11454)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.lora.initialization import draw_a, he_uniform
from lora_exp.lora.methods.base import Factors, InitSettings, Leaf, Leaves, Method, Modules
from lora_exp.lora.peft_format import PeftFormat
from lora_exp.runtime.dropout import path_key

LAMBDA_D = 0.1  # what d starts as, in the paper and in PEFT


class VeRA(Method):
  """ΔW = A·diag(d)·B·diag(b)."""

  name = "vera"
  title = "VeRA"
  paper = "2310.11454"
  cost = "R + O parameters; one random pair of R·(I + O) constants for the whole model"
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
    constants={"save_projection": True, "projection_prng_key": 0, "d_initial": LAMBDA_D, "init_weights": True},
    alpha_key=None,
    dropout_key="vera_dropout",
    bias_word="vera_only",
  )

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """One random pair for all modules, as large as the largest, and vectors for each: d at 0.1 and b at zero."""
    ins, outs = max(row.fan_in for row in modules.rows), max(row.fan_out for row in modules.rows)
    rank = max(row.rank for row in modules.rows)
    shared_a = draw_a(path_key(key, "vera_a"), "he_uniform", ins, ins, rank)
    # PEFT draws B as (out, rank) with a fan-in of the rank; row by row, so that padding changes no row.
    shared_b = he_uniform(path_key(key, "vera_b"), (rank, outs), rank, rank, None)
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
    """A·diag(d) and B·diag(b)."""
    return leaves["vera_a"] * leaves["lambda_d"][..., None, :], leaves["vera_b"] * leaves["lambda_b"][..., None, :]
