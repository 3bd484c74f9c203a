"""Compares the JAX tutorial's `generate_text` with our cached decoding: seconds per token on this machine.

    python tests/bench/decode.py

Both draw from a MiniGPT of 4 blocks at V 50,257 with 256 positions, at top-k 10 as the tutorial does. For each token
the tutorial runs all 256 positions through the model, as published without jit; the same under jit stands beside it.
They take turns in one process, so that whatever else the machine does slows all alike. Exit code 1 where ours needs
more than 1/50 of the time.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.cli.compose import composer, conf_directory
from lora_exp.config import LoraConfig, to_config
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.train.base import random_base
from lora_exp.train.job import make_job
from lora_exp.train.plan import make_plan
from lora_exp.train.sampling.sampler import Sampler

LENGTH, VOCAB, WIDTH, HEADS, BLOCKS, TOP_K = 256, 50_257, 256, 8, 4, 10
PROMPT = "Once upon a time there was a little dog"
FROZEN = LoraConfig(method="frozen")
SHARE = 50  # required: at most 1/SHARE of the tutorial's time per token


class Block(nnx.Module):
  """A block in the tutorial's idiom."""

  def __init__(self, rngs: nnx.Rngs):
    init = nnx.initializers.xavier_uniform()
    self.mha = nnx.MultiHeadAttention(num_heads=HEADS, in_features=WIDTH, kernel_init=init, decode=False, rngs=rngs)
    self.linear1, self.linear2 = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)

  def __call__(self, x, mask):
    x = self.norm1(x + self.mha(x, mask=mask))
    return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))


class Tutorial(nnx.Module):
  """The tutorial's model."""

  def __init__(self, rngs: nnx.Rngs):
    self.tokens, self.positions = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
    self.output = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

  def __call__(self, ids):
    x = self.tokens(ids) + self.positions(jnp.arange(LENGTH))[None]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH)))
    for block in self.blocks:
      x = block(x, mask)
    return self.output(x)

  def step(self, padded, last):
    """The next token of one padded row."""
    logits, indices = jax.lax.top_k(self(padded)[0][last], TOP_K)
    return jax.random.choice(jax.random.key(0), indices, p=nnx.softmax(logits))


def generate(model: Tutorial, step, ids: list[int], count: int) -> list[int]:
  """The tutorial's loop: returns `ids` and `count` further tokens."""
  for _ in range(count):
    padded = jnp.array(ids + [0] * (LENGTH - len(ids)))[None]
    ids = [*ids, int(step(model, padded, len(ids) - 1))]
  return ids


def ours(count: int, *typed: str, adapted: bool = False):
  """A function that draws `count` tokens after the prompt, with the tutorial's adapter or by the base alone."""
  with composer(conf_directory()) as composing:
    cfg = to_config(composing.compose(["experiment=jax_tutorial", "data.path=unread", "mesh.data=1", *typed]))
  cfg = replace(cfg, sample=replace(cfg.sample, max_tokens=count), lora=cfg.lora if adapted else FROZEN)
  plan = make_plan(cfg)
  job = make_job(plan, random_base(plan), steps=0)
  sampler = Sampler(job.program, cfg.sample, plan.tokenizer, cfg.model.max_len)
  sampler.decoder.stops = ()  # a random model may say anything: so that all tokens are drawn
  params, trial = jax.tree.map(lambda x: x[0], (job.state.params, job.trials))
  return lambda: sampler(params, trial, job.frozen, [PROMPT])


def seconds(draw, count: int) -> float:
  """Seconds per token of a call that draws `count` tokens."""
  began = time.perf_counter()
  draw()
  return (time.perf_counter() - began) / count


def main() -> int:
  """Prints the times; returns 1 if the required ratio is missed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--turns", type=int, default=9, help="turns of each, of which the median counts")
  parser.add_argument("--tokens", type=int, default=128, help="tokens in a turn of ours; the tutorial draws 2")
  args = parser.parse_args()
  model, ids, n = Tutorial(nnx.Rngs(0)), get_tokenizer("gpt2").encode(PROMPT), args.tokens
  jitted = nnx.jit(Tutorial.step)
  sides = {
    "the tutorial": (lambda: generate(model, Tutorial.step, ids, 2), 2),
    "the tutorial under jit": (lambda: generate(model, jitted, ids, 2), 2),
    "ours": (ours(n), n),
    "ours, temperature 0": (ours(n, "sample.temperature=0"), n),
    "ours, no top-k": (ours(n, "sample.top_k=null"), n),
    "ours, top-p 0.9": (ours(n, "sample.top_k=null", "sample.top_p=0.9"), n),
    "ours, adapter of rank 128": (ours(n, adapted=True), n),
  }
  for draw, _ in sides.values():  # compile
    draw()
  turns = [{name: seconds(*side) for name, side in sides.items()} for _ in range(args.turns)]
  medians = {name: statistics.median(turn[name] for turn in turns) for name in sides}
  theirs = medians["the tutorial"]
  print(f"{'':28}{'ms a token':>12}{'ratio':>8}")
  for name, took in medians.items():
    print(f"{name:28}{1000 * took:12.2f}{theirs / took:8.1f}")
  ratios = sorted(turn["the tutorial"] / turn["ours"] for turn in turns)
  print(f"ours in single turns: {ratios[0]:.1f} to {ratios[-1]:.1f}; promised: {SHARE}")
  return int(theirs / medians["ours"] < SHARE)


if __name__ == "__main__":
  sys.exit(main())
