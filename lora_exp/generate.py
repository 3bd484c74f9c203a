"""Text from a model: one prefill of the prompts, then decoding with a key/value cache, in one compiled program."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp import screen
from lora_exp.base import make_base
from lora_exp.build import check_built, make_job
from lora_exp.config import Config, InputError, SampleConfig
from lora_exp.data.tokenizers import Tokenizer
from lora_exp.dropout import stream_key
from lora_exp.mesh import keep_programs
from lora_exp.outputs import load_export
from lora_exp.pack import Arms
from lora_exp.step import Program, Tree, assemble

PROMPT_BUCKET = 16  # prompts are padded to a multiple of it, so that few lengths are compiled
Sampler = Callable[[Tree, Arms, Tree, Sequence[str]], list[str]]


def run(cfg: Config) -> None:
  """Prints a completion of each prompt by the adapter of the run directory `run`."""
  prompts = prompts_of(cfg)
  keep_programs(cfg.cache)
  plan = check_built(cfg)
  base, _ = make_base(plan)
  job = make_job(plan, base, 0)
  params = load_export(Path(str(cfg.run)), plan, job)
  one = lambda tree: jax.tree.map(lambda x: x[0], tree)
  sample = make_sampler(job.program, cfg.sample, plan.tokenizer, cfg.model.max_len)
  for prompt, text in zip(prompts, sample(one(params), one(job.arms), job.frozen, prompts), strict=True):
    screen.show(f"{prompt}{text}")


def prompts_of(cfg: Config) -> list[str]:
  """What was asked: `prompt`, or the lines of `prompt_file` or of standard input, or the run's own sample prompts."""
  if cfg.prompt is not None:
    return [cfg.prompt]
  if cfg.prompt_file is not None:
    text, where = Path(cfg.prompt_file).expanduser().read_text(encoding="utf-8"), f"prompt_file={cfg.prompt_file}"
  elif not sys.stdin.isatty() and (text := sys.stdin.read()).strip():
    where = "standard input"
  else:
    text, where = "\n".join(cfg.sample.prompts), "sample.prompts"
  prompts = [line for line in text.splitlines() if line.strip()]
  if not prompts:
    raise InputError(f"{where} holds no prompt; give prompt='\"Once upon a time\"', prompt_file= or standard input")
  return prompts


def draw_token(logits_BV: jax.Array, key: jax.Array, cfg: SampleConfig) -> jax.Array:
  """A token (B,) a row: the likeliest at temperature 0, else drawn after top-k and top-p."""
  logits = logits_BV.astype(jnp.float32)
  if cfg.temperature == 0:
    return logits.argmax(-1).astype(jnp.int32)
  logits = logits / cfg.temperature
  if cfg.top_k is not None:
    least = jax.lax.top_k(logits, min(cfg.top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if cfg.top_p is not None:
    ordered = -jnp.sort(-logits, axis=-1)
    chance = jax.nn.softmax(ordered)
    # A token stays while those before it hold less than top_p: the first always does.
    least = jnp.where(jnp.cumsum(chance, -1) - chance < cfg.top_p, ordered, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def make_sampler(program: Program, cfg: SampleConfig, tokenizer: Tokenizer, max_len: int) -> Sampler:
  """A function (params, arm, frozen, prompts) -> completions without their prompts, up to the end of text.

  Prompts may differ in length; one that leaves no room for `max_tokens` loses its beginning.
  """

  @partial(jax.jit, static_argnames="slots")
  def decode(params, arm, frozen, prompts_BP, start_B, key, slots):
    """New tokens (B, slots - P). Prompts are padded on the left; row b begins at slot `start_B[b]`."""
    model = assemble(program, params, arm, frozen, None)
    batch, width = prompts_BP.shape
    slot_S = jnp.arange(slots)

    def forward(tokens_BT, first, cache):
      slot_T = first + jnp.arange(tokens_BT.shape[1])
      seen_BTS = (slot_S <= slot_T[:, None]) & (slot_S >= start_B[:, None, None])
      positions_BT = jnp.maximum(slot_T - start_B[:, None], 0)
      x_BTD, cache = model.hidden(tokens_BT, positions_BT, seen_BTS, cache, first)
      return model.logits(x_BTD[:, -1]), cache

    def one(carry, i):
      logits, cache, done = carry
      token = jnp.where(done, tokenizer.eot, draw_token(logits, jax.random.fold_in(key, i), cfg))
      logits, cache = forward(token[:, None], width + i, cache)
      return (logits, cache, done | (token == tokenizer.eot)), token

    logits, cache = forward(prompts_BP, 0, model.empty_cache(batch, slots))
    start = (logits, cache, jnp.zeros(batch, bool))
    return jax.lax.scan(one, start, jnp.arange(slots - width))[1].T

  def sample(params: Tree, arm: Arms, frozen: Tree, prompts: Sequence[str]) -> list[str]:
    room = max(1, max_len - cfg.max_tokens)
    ids = [(tokenizer.encode(p) or [tokenizer.eot])[-room:] for p in prompts]
    width = min(-(-max(map(len, ids)) // PROMPT_BUCKET) * PROMPT_BUCKET, room)
    tokens = np.zeros((len(ids), width), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
      row[width - len(prompt) :] = prompt
    start = np.array([width - len(prompt) for prompt in ids], np.int32)
    key = stream_key(cfg.seed, "sample")
    new = decode(params, arm, frozen, tokens, start, key, slots=min(width + cfg.max_tokens, max_len))
    return [tokenizer.decode(_until(row, tokenizer.eot)) for row in np.asarray(new).tolist()]

  return sample


def _until(ids: list[int], stop: int) -> list[int]:
  return ids[: ids.index(stop)] if stop in ids else ids
