"""The compiled half of generation: one prefill of the prompts, then blocks of tokens with a key/value cache.

Rows are padded on the left, so that all end at one slot of the cache: row b begins at slot `start_B[b]`, and a token's
position is its slot less that. Widths and numbers of slots come in powers of two: few programs serve every length.
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
from lora_exp.runtime.mesh import BATCH, Layout
from lora_exp.train.program import Tree

Array = jax.Array
BLOCK = 16  # tokens decoded in one call: text appears while it is drawn, and the call costs little
PREFILL = 256  # positions of a prompt that go through the model at once
NOTHING = -1  # in place of a token after a row's end
BELOW_ONE = 1 - 1e-6  # keeps a draw below the rounded sum of all token_probabilities


class State(NamedTuple):
  """What one block of tokens hands to the next."""

  token_B: Array  # the latest
  done_B: Array
  drawn: Array  # tokens so far
  cache: Any


class Rows(NamedTuple):
  """What is known of the rows and does not change."""

  start_B: np.ndarray  # slot of a row's first token
  room_B: np.ndarray  # tokens that may be drawn
  key_B: Array  # of the draws
  width: np.int32  # slots that the padded prompts take


def power_of_two(n: int) -> int:
  """The smallest that is at least `n`."""
  return 1 << max(0, n - 1).bit_length()


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Tokens (B, P) with each prompt at its row's end, and the slots (B,) where they begin."""
  longest = max(map(len, prompts))
  width = max(16, power_of_two(longest)) if longest <= PREFILL else -(-longest // PREFILL) * PREFILL
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  return tokens, np.array([width - len(prompt) for prompt in prompts], np.int32)


def uniforms(key_B: Array, first, count: int) -> Array:
  """Numbers (B, count) in [0, 1) for the draws from number `first` on; each depends on its row's key and number."""
  draw = lambda key, number: jax.random.uniform(jax.random.fold_in(key, number))
  return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(key_B, first + jnp.arange(count))


def draw_token(logits_BV: Array, uniform_B: Array, cfg: SampleConfig) -> Array:
  """A token (B,) a row: the likeliest at temperature 0, else drawn after top-k and then top-p.

  `uniform_B`, in [0, 1), picks from the cumulated token_probabilities: a random number for each token of the vocabulary costs
  more than all layers of a small model.
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
  wanted_B = uniform_B * sum_BV[:, -1] * BELOW_ONE
  number_V = jnp.arange(sum_BV.shape[-1], dtype=jnp.int32)
  hit_BV = (sum_BV > wanted_B[:, None]) & (chance_BV > 0)
  pick_B = jnp.where(hit_BV, number_V, number_V[-1]).min(-1)
  return pick_B if token_BV is None else jnp.take_along_axis(token_BV, pick_B[:, None], axis=1)[:, 0]


def nucleus(chance_BV: Array, share: float) -> Array:
  """Chances outside the smallest set of likeliest tokens that hold `share` become 0 (top-p, arXiv 1904.09751).

  The least chance that stays is found bit by bit: floats that are not negative are ordered as their bits are, and 31
  sums are twenty times quicker than sorting a large vocabulary.
  """

  def bit(i, least_B):
    higher_B = least_B | (1 << (30 - i))
    kept = chance_BV >= jax.lax.bitcast_convert_type(higher_B, jnp.float32)[:, None]
    return jnp.where(jnp.where(kept, chance_BV, 0).sum(-1) >= share, higher_B, least_B)

  least_B = jax.lax.fori_loop(0, 31, bit, jnp.zeros(len(chance_BV), jnp.int32))
  return jnp.where(chance_BV >= jax.lax.bitcast_convert_type(least_B, jnp.float32)[:, None], chance_BV, 0)


class Decoder:
  """Compiled prefill and decoding. `model_of(weights)` gives the model inside the trace."""

  def __init__(
    self,
    model_of: Callable[..., LanguageModel],
    cfg: SampleConfig,
    stops: Sequence[int],
    vocab_size: int,
    max_len: int,
    layout: Layout,
  ):
    self.model_of, self.cfg, self.layout, self.max_len = model_of, cfg, layout, max_len
    self.stops, self.vocab_size = tuple(stops), vocab_size
    self._prefill = jax.jit(self._prefill_chunk, static_argnames="slots", donate_argnames="cache")
    self._decode = jax.jit(self._decode_block, donate_argnames="state")

  def start(self, weights: Tree, tokens_BP: np.ndarray, rows: Rows, slots: int) -> State:
    """The state after the prompts and their first new token; the cache gets `slots` slots."""
    state: Any = None
    for first in range(0, tokens_BP.shape[1], PREFILL):
      chunk, cache = tokens_BP[:, first : first + PREFILL], state and state.cache
      state = self._prefill(weights, chunk, rows, np.int32(first), cache=cache, slots=slots)
    return state

  def block(self, weights: Tree, rows: Rows, state: State, ended_B: np.ndarray) -> tuple[State, Array]:
    """Up to BLOCK more tokens (B, BLOCK), fewer where every row is done; rows in `ended_B` take no more.

    Consumes `state`.
    """
    return self._decode(weights, rows, ended_B, state=state)

  def _prefill_chunk(self, weights, tokens_BP, rows: Rows, first, cache, slots: int) -> State:
    model = self.model_of(weights)
    batch = tokens_BP.shape[0]
    cache = model.empty_cache(batch, slots) if cache is None else cache
    logits_BV, cache = self._forward(model, tokens_BP, rows, first, cache)
    nobody = jnp.zeros(batch, bool)
    token_B, done_B = self._draw(logits_BV, uniforms(rows.key_B, 0, 1)[:, 0], rows, jnp.int32(0), nobody)
    return self._placed(State(token_B, done_B, jnp.int32(1), cache))

  def _decode_block(self, weights, rows: Rows, ended_B, state: State) -> tuple[State, Array]:
    model = self.model_of(weights)
    uniform_BN = uniforms(rows.key_B, state.drawn, BLOCK)

    def going(carry):
      i, state, _ = carry
      return (i < BLOCK) & ~state.done_B.all()

    def one(carry):
      i, state, tokens_BN = carry
      logits_BV, cache = self._forward(
        model, jnp.maximum(state.token_B, 0)[:, None], rows, rows.width + state.drawn - 1, state.cache
      )
      token_B, done_B = self._draw(logits_BV, uniform_BN[:, i], rows, state.drawn, state.done_B)
      return i + 1, State(token_B, done_B, state.drawn + 1, cache), tokens_BN.at[:, i].set(token_B)

    nothing = jnp.full((len(ended_B), BLOCK), NOTHING, jnp.int32)
    start = (jnp.int32(0), state._replace(done_B=state.done_B | ended_B), nothing)
    _, state, tokens_BN = jax.lax.while_loop(going, one, start)
    return self._placed(state), tokens_BN

  def _forward(self, model: LanguageModel, tokens_BT, rows: Rows, first, cache) -> tuple[Array, Any]:
    """Logits (B, V) after the last of `tokens_BT`, which fill the cache from slot `first` on."""
    slots = jax.tree.leaves(cache)[0].shape[1]
    slot_S, slot_T = jnp.arange(slots), first + jnp.arange(tokens_BT.shape[1])
    seen_BTS = (slot_S <= slot_T[:, None]) & (slot_S >= rows.start_B[:, None, None])
    # Padding, and rows that are done, have no position of their own: any that the model knows will do.
    positions_BT = jnp.clip(slot_T - rows.start_B[:, None], 0, self.max_len - 1)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT, seen_BTS, cache, first)
    return model.logits(x_BTD[:, -1:])[:, 0], cache

  def _draw(self, logits_BV, uniform_B, rows: Rows, count, done_B) -> tuple[Array, Array]:
    """Token number `count` of each row, NOTHING for rows that are done or end here, and which are done now."""
    logits_BV = logits_BV[:, : self.vocab_size]  # a model may have more rows than its tokenizer has tokens
    token_B = draw_token(logits_BV, uniform_B, self.cfg)
    over_B = done_B | jnp.isin(token_B, jnp.array(self.stops, jnp.int32))
    return jnp.where(over_B, NOTHING, token_B), over_B | (count + 1 >= rows.room_B)

  def _placed(self, state: State) -> State:
    """The state in its place on the mesh, always the same: a block that moved it would compile the next one anew."""
    place = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(self.layout.mesh, spec))
    rows = BATCH if state.token_B.shape[0] % self.layout.batch_ways == 0 else None
    ways = self.layout.mesh.shape["tensor"]

    def cached(x):
      heads = "tensor" if x.ndim == 4 and x.shape[2] % ways == 0 else None
      return place(x, P(rows, None, heads))

    token_B, done_B = place(state.token_B, P()), place(state.done_B, P())
    return State(token_B, done_B, place(state.drawn, P()), jax.tree.map(cached, state.cache))
