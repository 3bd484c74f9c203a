"""Compares the JAX tutorial's training step with ours: tokens per second and peak memory on this machine.

    python tests/bench/tutorial.py

Both train A and B of rank 128 on linear1, linear2 and the output layer of MiniGPT (V 50,257) with 16 rows of 256
tokens. Each side lives in a process of its own; they take turns of a few steps, so that whatever else the machine does
slows both alike, and the medians are compared. Exit code 1 where ours is not 2.3 times as fast at 0.4 of the memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout

ROWS, LENGTH, VOCAB, RANK = 16, 256, 50_257, 128
FASTER, SMALLER = 2.3, 0.4  # required: the minimum ratio of speed and the maximum ratio of memory


def tokens_and_targets():
  """The same random rows for both sides, (B, T) each."""
  import numpy as np

  rows = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
  return rows[:, :-1], rows[:, 1:]


def tutorial():
  """(step, compiled): the tutorial's model and step in its own idiom; step() trains once and returns the loss."""
  import jax.numpy as jnp
  import optax
  from flax import nnx

  width, heads, blocks = 256, 8, 4

  class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
      init = nnx.initializers.xavier_uniform()
      self.mha = nnx.MultiHeadAttention(num_heads=heads, in_features=width, kernel_init=init, decode=False, rngs=rngs)
      self.linear1 = nnx.LoRALinear(width, width, lora_rank=RANK, kernel_init=init, rngs=rngs)
      self.linear2 = nnx.LoRALinear(width, width, lora_rank=RANK, kernel_init=init, rngs=rngs)
      self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x, mask):
      x = self.norm1(x + self.mha(x, mask=mask))
      return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))

  class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
      self.tokens = nnx.Embed(VOCAB, width, rngs=rngs)
      self.positions = nnx.Embed(LENGTH, width, rngs=rngs)
      self.blocks = nnx.List([Block(rngs) for _ in range(blocks)])
      init = nnx.initializers.xavier_uniform()
      self.output = nnx.LoRALinear(width, VOCAB, lora_rank=RANK, kernel_init=init, rngs=rngs)

    def __call__(self, ids):
      x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1]))[None]
      mask = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1])))
      for block in self.blocks:
        x = block(x, mask)
      return self.output(x)

  @nnx.jit
  def train(model, optimizer, ids, targets):
    mean = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(ids), targets).mean()
    loss, grads = nnx.value_and_grad(mean, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return loss

  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
  ids, targets = map(jnp.asarray, tokens_and_targets())
  return lambda: float(train(model, optimizer, ids, targets)), train.lower(model, optimizer, ids, targets).compile()


def ours():
  """(step, compiled): `experiment=jax_tutorial train.batch_size=16`."""
  import jax
  import numpy as np

  from lora_exp.cli.compose import composer, conf_directory
  from lora_exp.config import to_config
  from lora_exp.train.base import random_base
  from lora_exp.train.compiled_step import compile_step
  from lora_exp.train.job import make_job
  from lora_exp.train.plan import make_plan

  with composer(conf_directory()) as composing:
    typed = ["experiment=jax_tutorial", f"train.batch_size={ROWS}", "data.path=unread", "mesh.data=1"]
    plan = make_plan(to_config(composing.compose(typed)))
  job = make_job(plan, random_base(plan), steps=1000)
  tokens, targets = tokens_and_targets()
  batch = plan.layout.put_batch({
    "tokens": tokens,
    "targets": targets,
    "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
    "segments": np.ones_like(tokens),
    "weights": np.ones(tokens.shape, np.float32),
  })
  compiled, state = compile_step(job, batch), job.state

  def step() -> float:
    nonlocal state
    state, metrics = compiled(state, batch)
    jax.block_until_ready(state)
    return float(metrics["loss"][0])

  return step, compiled.compiled


def serve(side: str) -> None:
  """The process of one side: for each number of steps on standard input, a line of what they took."""
  with redirect_stdout(sys.stderr):  # the program tells how long it compiles
    step, compiled = {"tutorial": tutorial, "ours": ours}[side]()
  m = compiled.memory_analysis()
  planned = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
  for line in sys.stdin:
    began, worked = time.perf_counter(), time.process_time()
    losses = [step() for _ in range(int(line))]
    seconds, worked = ((now - then) / len(losses) for now, then in
                       ((time.perf_counter(), began), (time.process_time(), worked)))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    said = {"seconds": seconds, "worked": worked, "loss": losses[-1], "planned": planned, "resident": resident}
    print(json.dumps(said), flush=True)


class Side:
  """A process that runs steps on request."""

  def __init__(self, name: str):
    command = [sys.executable, __file__, "--side", name]
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.turns: list[dict] = []

  def run(self, steps: int) -> dict:
    """One turn; the first compiles and is not counted (`forget`)."""
    print(steps, file=self.process.stdin, flush=True)
    self.turns.append(json.loads(self.process.stdout.readline()))
    return self.turns[-1]

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()

  def median(self, key: str) -> float:
    """The median over all turns."""
    return statistics.median(turn[key] for turn in self.turns)


def main() -> int:
  """Runs both and prints the table; returns 1 if a required ratio is missed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--side", choices=("tutorial", "ours"), help=argparse.SUPPRESS)
  parser.add_argument("--turns", type=int, default=7, help="turns of each side, of which the median counts")
  args = parser.parse_args()
  if args.side:
    serve(args.side)
    return 0
  theirs, mine = sides = Side("tutorial"), Side("ours")
  for side in sides:
    side.run(1)
    side.turns.clear()
  for _ in range(args.turns):
    theirs.run(1)
    mine.run(2)
  for side in sides:
    side.close()
  speed = [ROWS * LENGTH / side.median("seconds") for side in sides]
  rows = [("tokens/s", *speed), ("tokens/s of processor", *(ROWS * LENGTH / side.median("worked") for side in sides))]
  for name, key in (("memory of the step, MB", "planned"), ("peak of the process, MB", "resident")):
    rows.append((name, *(side.turns[-1][key] / 1e6 for side in sides)))
  rows.append(("last loss", *(side.turns[-1]["loss"] for side in sides)))
  print(f"{'':24}{'tutorial':>10}{'ours':>10}{'ratio':>8}")
  for name, a, b in rows:
    print(f"{name:24}{a:10,.4g}{b:10,.4g}{b / a:8.2f}")
  turns = sorted(a["seconds"] / b["seconds"] for a, b in zip(theirs.turns, mine.turns, strict=True))
  print(f"speed in single turns: {turns[0]:.2f} to {turns[-1]:.2f}; promised: {FASTER} at {SMALLER} of the memory")
  return int(speed[1] / speed[0] < FASTER or max(b / a for _, a, b in rows[2:4]) > SMALLER)


if __name__ == "__main__":
  sys.exit(main())
