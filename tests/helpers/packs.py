"""Small packs for tests of training: a MiniGPT of 2 layers on random rows of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import Config
from lora_exp.train.base import random_base
from lora_exp.train.compiled_step import compile_step
from lora_exp.train.job import Job, make_job
from lora_exp.train.plan import Plan, make_plan

SIZES = {"base": "random", "layers": 2, "width": 32, "heads": 4, "ff": 48, "max_len": 16, "dropout": 0.1}


def small(**settings) -> Config:
  """The small config with `settings`, whose names have `__` instead of dots: `lora__rank=4`."""
  cfg = Config()
  sizes = {f"model__{k}": v for k, v in SIZES.items()}
  for name, value in (sizes | {"optim__warmup": 0, "optim__schedule": "constant"} | settings).items():
    group, key = name.split("__")
    assert hasattr(getattr(cfg, group), key), name
    setattr(getattr(cfg, group), key, value)
  return cfg


def rows(seed: int = 0, batch: int = 4, length: int = 16, vocab: int = 257) -> dict[str, np.ndarray]:
  """A batch of packed rows, each with two documents and padding; a few targets have no loss."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab, (batch, length + 1), dtype=np.int32)
  cut, end = rng.integers(2, length - 4, batch), rng.integers(length - 3, length + 1, batch)
  at = np.broadcast_to(np.arange(length), (batch, length))
  second, real = at >= cut[:, None], at < end[:, None]
  counted = real & (rng.random((batch, length)) < 0.8)
  return {
    "tokens": tokens[:, :-1] * real,
    "targets": tokens[:, 1:] * real,
    "segments": ((1 + second) * real).astype(np.int32),
    "positions": ((at - second * cut[:, None]) * real).astype(np.int32),
    "weights": counted.astype(np.float32),
  }


@contextmanager
def quickly() -> Iterator[None]:
  """Context in which programs compile faster and run slower."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", before)


_plans: dict[str, Plan] = {}


@cache
def _base(model: str):
  with quickly():
    return random_base(_plans[model])


def job_of(*cfgs: Config, steps: int = 20, mapping: str | None = None) -> Job:
  """A job over the trials `cfgs` on the random base of the first; `mapping` of the trials as given (map, vmap)."""
  plan = make_plan(cfgs[0])
  name = repr((cfgs[0].model, cfgs[0].mesh))
  _plans[name] = plan
  with quickly():
    job = make_job(plan, _base(name), steps, [make_plan(cfg) for cfg in cfgs])
  if mapping is not None:
    job = replace(job, program=replace(job.program, mapping=mapping))
  return job


def kept(tree):
  """A copy of `tree` that outlives the donation of its arrays to a step."""
  return jax.tree.map(np.array, tree)


class Training:
  """A job in training: its compiled step and its current state."""

  def __init__(self, job: Job, **shape):
    self.job, self.state, self.shape = job, job.state, shape
    self.step = compile_step(job, job.program.layout.put_batch(rows(**shape)))

  def run(self, steps: int) -> np.ndarray:
    """Trains for `steps` more batches; losses (steps, trials)."""
    losses = []
    for i in range(int(self.state.step), int(self.state.step) + steps):
      batch = self.job.program.layout.put_batch(rows(i, **self.shape))
      self.state, metrics = self.step(self.state, batch)
      losses.append(np.asarray(metrics["loss"]))
    return np.array(losses)


def bent(tree):
  """`tree` with every leaf changed a little, as if trained, so that B is not 0; equally for all trials."""
  wave = lambda x: 0.05 * jnp.sin(1 + 3.0 * jnp.arange(x[0].size)).reshape(x.shape[1:])
  return jax.tree.map(lambda x: x + wave(x), tree)


def trial(tree, n: int):
  """One trial of a tree whose leaves have a leading axis of trials."""
  return jax.tree.map(lambda x: x[n], tree)
