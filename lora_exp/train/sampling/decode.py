"""Compiled generation with a key/value cache: a prefill of the prompts, then blocks of new tokens.

Rows are padded on the left, so that all prompts end at the same cache slot. Row b starts at slot `start_B[b]`, and the
position of a token is its slot minus `start_B[b]`. Widths and numbers of slots are powers of two, so that few programs
are compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_exp.config import SampleConfig
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.axis_rules import BATCH
from lora_exp.runtime.mesh import Layout
from lora_exp.runtime.padded_sizes import power_of_two
from lora_exp.train.compute.program import Tree

Array = jax.Array
BLOCK = 16  # tokens decoded per call, by default; text is shown after each block
PREFILL = 256  # prompt positions processed per call
NOTHING = -1  # fills a row after its last token
NOT_FINITE = -2  # ends a row whose logits are NaN or infinite
BELOW_ONE = 1 - 1e-6  # keeps a sample below the sum of all probabilities, which is rounded


class DecodeState(NamedTuple):
  """The state that one block of tokens passes to the next."""

  token_B: Array  # the latest token of each row, int32
  done_B: Array  # bool
  drawn: Array  # number of tokens generated per row, int32
  cache: Any  # keys and values of all layers


class PromptRows(NamedTuple):
  """The constants of a batch of prompts."""

  start_B: np.ndarray  # slot of the first token of each row
  room_B: np.ndarray  # maximum number of tokens to generate
  key_B: Array  # sampling keys
  width: np.int32  # number of slots of the padded prompts


def pad_left(prompts: Sequence[Sequence[int]], longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the left. Returns token ids, int32 (B, P), and the slots (B,) at which the prompts start.

  P depends on `longest`, which is that of `prompts` by default.
  """
  longest = longest or max(map(len, prompts))
  width = max(16, power_of_two(longest)) if longest <= PREFILL else -(-longest // PREFILL) * PREFILL
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  return tokens, np.array([width - len(prompt) for prompt in prompts], np.int32)


def uniforms(key_B: Array, first, count: int) -> Array:
  """Uniform numbers (B, count) in [0, 1) for the samples `first`, `first` + 1, …

  Each number depends only on the key of its row and the index of its sample.
  """

  def draw(key: Array, index: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, index))

  return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(key_B, first + jnp.arange(count))


def draw_token(logits_BV: Array, uniform_B: Array, cfg: SampleConfig) -> Array:
  """The next token (B,) of each row: the most likely one at temperature 0, else a sample after top-k and then top-p.

  `uniform_B` in [0, 1) selects a token by the cumulative probabilities. Drawing a random number for every token of the
  vocabulary instead would cost more than all layers of a small model.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if cfg.temperature == 0:
    return jax.lax.top_k(logits_BV, 1)[1][:, 0]
  token_BV = None
  if cfg.top_k is not None:
    logits_BV, token_BV = jax.lax.top_k(logits_BV, min(cfg.top_k, logits_BV.shape[-1]))
  chance_BV = jax.nn.softmax(logits_BV / cfg.temperature)
  if cfg.top_p is not None:
    chance_BV = nucleus(chance_BV, cfg.top_p)
  sum_BV = jnp.cumsum(chance_BV, axis=-1)
  threshold_B = uniform_B * sum_BV[:, -1] * BELOW_ONE
  number_V = jnp.arange(sum_BV.shape[-1], dtype=jnp.int32)
  hit_BV = (sum_BV > threshold_B[:, None]) & (chance_BV > 0)
  pick_B = jnp.where(hit_BV, number_V, number_V[-1]).min(-1)
  return pick_B if token_BV is None else jnp.take_along_axis(token_BV, pick_B[:, None], axis=1)[:, 0]


def nucleus(chance_BV: Array, share: float) -> Array:
  """Sets all probabilities to 0 except those of the smallest set with total `share` (top-p, arXiv 1904.09751).

  Binary search finds the smallest probability in the set, one bit per step: non-negative floats have the same order as
  their bits. 31 sums are twenty times faster than sorting a large vocabulary.
  """

  def next_bit(i, least_B):
    higher_B = least_B | (1 << (30 - i))
    in_set_BV = chance_BV >= jax.lax.bitcast_convert_type(higher_B, jnp.float32)[:, None]
    return jnp.where(jnp.where(in_set_BV, chance_BV, 0).sum(-1) >= share, higher_B, least_B)

  least_B = jax.lax.fori_loop(0, 31, next_bit, jnp.zeros(len(chance_BV), jnp.int32))
  return jnp.where(chance_BV >= jax.lax.bitcast_convert_type(least_B, jnp.float32)[:, None], chance_BV, 0)


class Decoder:
  """Compiled prefill and decoding. `model_of(weights)` builds the model inside the trace."""

  def __init__(
    self,
    model_of: Callable[..., LanguageModel],
    cfg: SampleConfig,
    stops: Sequence[int],
    vocab_size: int,
    max_len: int,
    layout: Layout,
    block: int = BLOCK,
  ):
    self.block_tokens = block
    self.model_of, self.cfg, self.layout, self.max_len = model_of, cfg, layout, max_len
    self.stops, self.vocab_size = tuple(stops), vocab_size
    self._prefill = jax.jit(self._prefill_chunk, static_argnames="slots", donate_argnames="cache")
    self._decode = jax.jit(self._decode_block, donate_argnames="state")

  def start(self, weights: Tree, tokens_BP: np.ndarray, rows: PromptRows, slots: int) -> DecodeState:
    """Processes the prompts and draws the first token of each row. The cache has `slots` slots."""
    state: Any = None
    for first in range(0, tokens_BP.shape[1], PREFILL):
      chunk, cache = tokens_BP[:, first : first + PREFILL], state and state.cache
      state = self._prefill(weights, chunk, rows, np.int32(first), cache=cache, slots=slots)
    return state

  def block(
    self, weights: Tree, rows: PromptRows, state: DecodeState, ended_B: np.ndarray
  ) -> tuple[DecodeState, Array]:
    """Generates up to a block of tokens (B, block), fewer if every row is done, and none for rows in `ended_B`.

    Donates the arrays of `state`.
    """
    return self._decode(weights, rows, ended_B, state=state)

  def complete(self, weights: Tree, tokens_BP: Array, rows: PromptRows, slots: int, max_tokens: int) -> Array:
    """Up to `max_tokens` new tokens of each row, (B, max_tokens), NOTHING after the last one. Used inside a trace."""
    model, state = self.model_of(weights), None
    for first in range(0, tokens_BP.shape[1], PREFILL):
      cache = None if state is None else state.cache
      state = self._prefill_state(model, tokens_BP[:, first : first + PREFILL], rows, first, cache, slots)
    assert state is not None
    first_B1 = state.token_B[:, None]
    if max_tokens == 1:
      return first_B1
    _, others = self._decode_tokens(model, rows, state, max_tokens - 1)
    return jnp.concatenate([first_B1, others], axis=1)

  def _prefill_chunk(self, weights, tokens_BP, rows: PromptRows, first, cache, slots: int) -> DecodeState:
    return self._with_shardings(self._prefill_state(self.model_of(weights), tokens_BP, rows, first, cache, slots))

  def _prefill_state(self, model, tokens_BP, rows: PromptRows, first, cache, slots: int) -> DecodeState:
    """Processes the prompts' positions from `first` on, and draws a token after the last of them."""
    batch = tokens_BP.shape[0]
    cache = model.empty_cache(batch, slots) if cache is None else cache
    logits_BV, cache = self._forward(model, tokens_BP, rows, first, cache)
    none_done_B = jnp.zeros(batch, bool)
    token_B, done_B = self._draw(logits_BV, uniforms(rows.key_B, 0, 1)[:, 0], rows, jnp.int32(0), none_done_B)
    return DecodeState(token_B, done_B, jnp.int32(1), cache)

  def _decode_block(self, weights, rows: PromptRows, ended_B, state: DecodeState) -> tuple[DecodeState, Array]:
    state = state._replace(done_B=state.done_B | ended_B)
    state, tokens_BN = self._decode_tokens(self.model_of(weights), rows, state, self.block_tokens)
    return self._with_shardings(state), tokens_BN

  def _decode_tokens(self, model, rows: PromptRows, state: DecodeState, count: int) -> tuple[DecodeState, Array]:
    """Generates up to `count` tokens (B, count), fewer if every row is done."""
    uniform_BN = uniforms(rows.key_B, state.drawn, count)

    def continues(carry):
      i, state, _ = carry
      return (i < count) & ~state.done_B.all()

    def decode_token(carry):
      i, state, tokens_BN = carry
      logits_BV, cache = self._forward(
        model, jnp.maximum(state.token_B, 0)[:, None], rows, rows.width + state.drawn - 1, state.cache
      )
      token_B, done_B = self._draw(logits_BV, uniform_BN[:, i], rows, state.drawn, state.done_B)
      return i + 1, DecodeState(token_B, done_B, state.drawn + 1, cache), tokens_BN.at[:, i].set(token_B)

    nothing = jnp.full((len(state.done_B), count), NOTHING, jnp.int32)
    _, state, tokens_BN = jax.lax.while_loop(continues, decode_token, (jnp.int32(0), state, nothing))
    return state, tokens_BN

  def _forward(self, model: LanguageModel, tokens_BT, rows: PromptRows, first, cache) -> tuple[Array, Any]:
    """Writes `tokens_BT` to the cache from slot `first` on. Returns the logits (B, V) after the last token."""
    slots = jax.tree.leaves(cache)[0].shape[1]
    slot_S, slot_T = jnp.arange(slots), first + jnp.arange(tokens_BT.shape[1])
    mask_BTS = (slot_S <= slot_T[:, None]) & (slot_S >= rows.start_B[:, None, None])
    # Padding and finished rows may have any valid position.
    positions_BT = jnp.clip(slot_T - rows.start_B[:, None], 0, self.max_len - 1)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT, mask_BTS, cache, first)
    return model.logits(x_BTD[:, -1:])[:, 0], cache

  def _draw(self, logits_BV, uniform_B, rows: PromptRows, count, done_B) -> tuple[Array, Array]:
    """Draws token number `count` of each row; NOTHING for rows that have ended, NOT_FINITE for those that fail.

    Also returns which rows are done.
    """
    logits_BV = logits_BV[:, : self.vocab_size]  # the model's vocabulary may be larger than the tokenizer's
    token_B = draw_token(logits_BV, uniform_B, self.cfg)
    ended_B = done_B | jnp.isin(token_B, jnp.array(self.stops, jnp.int32))
    token_B = jnp.where(ended_B, NOTHING, token_B)
    fails_B = ~done_B & ~jnp.isfinite(logits_BV.max(-1))  # the maximum is NaN if any logit is
    return jnp.where(fails_B, NOT_FINITE, token_B), ended_B | fails_B | (count + 1 >= rows.room_B)

  def _with_shardings(self, state: DecodeState) -> DecodeState:
    """Constrains the shardings of the state. If they changed, the next block would be compiled again."""

    def constrain(x: Array, spec: P) -> Array:
      return jax.lax.with_sharding_constraint(x, NamedSharding(self.layout.mesh, spec))

    rows = BATCH if state.token_B.shape[0] % self.layout.batch_ways == 0 else None
    ways = self.layout.mesh.shape["tensor"]

    def constrain_cache(x: Array) -> Array:
      heads = "tensor" if x.ndim == 4 and x.shape[2] % ways == 0 else None
      return constrain(x, P(rows, None, heads))

    token_B, done_B = constrain(state.token_B, P()), constrain(state.done_B, P())
    return DecodeState(token_B, done_B, constrain(state.drawn, P()), jax.tree.map(constrain_cache, state.cache))
