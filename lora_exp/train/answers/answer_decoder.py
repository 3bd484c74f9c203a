"""Greedy answers of all trials of a pack to the same prompts, in one compiled program."""

from collections.abc import Sequence

import jax
import numpy as np

from lora_exp.config import SampleConfig
from lora_exp.data.tokenization import Tokenizer
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.dropout import stream_key
from lora_exp.runtime.host_arrays import on_host, put_equal
from lora_exp.runtime.padded_sizes import power_of_two
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Program, Tree, Weights, assemble
from lora_exp.train.compute.step import over_trials
from lora_exp.train.sampling.decode import Decoder, PromptRows, pad_left

MOST_PROMPTS = 128  # prompts decoded in one batch
CACHE_BYTES = 2**30  # of the keys and values of one batch for all trials; with more, batches have fewer prompts
GREEDY = SampleConfig(temperature=0)


class AnswerDecoder:
  """Decodes batches of prompts of one width, so that there is one compiled program."""

  def __init__(
    self, program: Program, tokenizer: Tokenizer, max_len: int, prompts: Sequence[Sequence[int]], max_tokens: int
  ):
    """`prompts` are all that it will be given. At most `max_tokens` tokens are generated for each of them."""
    self.program, self.max_len, self.max_tokens = program, max_len, max_tokens
    self.count, self.longest = len(prompts), max(map(len, prompts))
    self.slots = power_of_two(pad_left(prompts)[0].shape[1] + max_tokens)
    self.decoder = Decoder(self._model, GREEDY, tokenizer.stops, tokenizer.vocab_size, max_len, program.layout)
    self.complete = jax.jit(self._complete)

  def __call__(
    self, params: Tree, trials: Hyperparameters, frozen: Tree, prompts: Sequence[Sequence[int]]
  ) -> list[list[list[int]]]:
    """The token ids of each trial's answer to each prompt, without the token that ends it.

    The arrays of `params` and `trials` have a leading axis N.
    """
    answers: list[list[list[int]]] = [[] for _ in range(trials.scale.shape[0])]
    batch = self._batch_size(params, trials, frozen)
    for first in range(0, len(prompts), batch):
      part = prompts[first : first + batch]
      tokens_NBM = on_host(self._decode(params, trials, frozen, part, batch))
      for of_trial, tokens_BM in zip(answers, tokens_NBM, strict=True):
        of_trial += [row[row >= 0].tolist() for row in tokens_BM[: len(part)]]
    return answers

  def _model(self, weights: Weights) -> LanguageModel:
    params, trial, frozen = weights
    return assemble(self.program, params, trial, frozen, None)

  def _batch_size(self, params: Tree, trials: Hyperparameters, frozen: Tree) -> int:
    """The number of prompts in a batch (B), a power of two, for which the caches of all trials fit CACHE_BYTES."""

    def one_cache(weights: Weights) -> Tree:
      return self._model(weights).empty_cache(1, self.slots)

    params, trial = jax.tree.map(_first_shape, (params, trials))
    caches = jax.tree.leaves(jax.eval_shape(one_cache, (params, trial, frozen)))
    size = sum(x.size * x.dtype.itemsize for x in caches) * trials.scale.shape[0]
    fitting = 1 << max(0, (CACHE_BYTES // max(size, 1)).bit_length() - 1)
    return min(MOST_PROMPTS, power_of_two(self.count), fitting)

  def _decode(
    self, params: Tree, trials: Hyperparameters, frozen: Tree, prompts: Sequence[Sequence[int]], batch: int
  ) -> jax.Array:
    """The tokens (N, B, max_tokens) of the answers to at most `batch` (B) prompts."""
    missing = batch - len(prompts)
    tokens_BP, start_B = pad_left([*prompts, *[prompts[0]] * missing], self.longest)
    room = [min(self.max_tokens, self.max_len - len(prompt)) for prompt in prompts]
    room_B = np.array([*room, *[0] * missing], np.int32)  # rows that only fill the batch end at once
    keys = jax.random.split(stream_key(0, "sample"), batch)  # not used by greedy decoding
    key_B = put_equal(keys, self.program.layout.replicated)
    rows = PromptRows(start_B, room_B, key_B, np.int32(tokens_BP.shape[1]))
    tokens_NBM: jax.Array = self.complete(params, trials, frozen, tokens_BP, rows)
    return tokens_NBM

  def _complete(self, params, trials, frozen, tokens_BP, rows: PromptRows) -> jax.Array:
    def one_trial(trial: Hyperparameters, params: Tree) -> jax.Array:
      return self.decoder.complete((params, trial, frozen), tokens_BP, rows, self.slots, self.max_tokens)

    return over_trials(one_trial, self.program.mapping, trials, params)


def _first_shape(x: jax.Array) -> jax.ShapeDtypeStruct:
  """The shape of the first trial's part of an array."""
  return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
