"""One checkpoint, loaded by transformers and here, and the logits of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers_models import LENGTH

from lora_exp.cli.command_line import check_command_line
from lora_exp.models.weights.locate import find_weights
from lora_exp.train.base import loaded_base
from lora_exp.train.compute.program import assemble
from lora_exp.train.job import Job, make_job
from lora_exp.train.plan import make_plan

OURS = ["model=hf", "model.tokenizer=bytes", "logger=none", "sample=none", "data@retain=none", "lora=frozen"]


@dataclass
class ModelPair:
  """One checkpoint, in transformers and here."""

  theirs: Any
  job: Job

  def model(self, frozen) -> Any:
    """Our model with the arrays `frozen`, inside a trace."""
    trial = jax.tree.map(lambda x: x[0], self.job.trials)
    return assemble(self.job.program, {}, trial, frozen, None)


def loaded(directory: Path, *overrides: str) -> Job:
  """The job of `model=hf model.weights=DIR`."""
  cfg = check_command_line([*OURS, f"model.weights={directory}", "data.seq_len=16", *overrides]).jobs[0]
  plan = make_plan(cfg)
  return make_job(plan, loaded_base(plan, find_weights(str(cfg.model.weights))), 0)


def our_logits(models: ModelPair, tokens: np.ndarray):
  """Logits of whole rows, and those with a cache: of a prompt first, then of one token after another."""

  @jax.jit
  def both(frozen, tokens):
    model = models.model(frozen)
    prompt, slots = 7, jnp.arange(LENGTH)

    def step(store, at):
      now = jax.lax.dynamic_slice_in_dim(tokens, at[0], len(at), axis=1)
      seen = jnp.broadcast_to(slots <= at[:, None], (len(tokens), len(at), LENGTH))
      x, store = model.hidden(now, jnp.broadcast_to(at, now.shape), seen, store, at[0])
      return store, model.logits(x)

    store, first = step(model.empty_cache(len(tokens), LENGTH), jnp.arange(prompt))
    _, rest = jax.lax.scan(step, store, jnp.arange(prompt, LENGTH)[:, None])
    return model(tokens), jnp.concatenate([first, rest[:, :, 0].swapaxes(0, 1)], axis=1)

  return both(models.job.frozen, tokens)
