"""Greedy answers of all trials of a pack to the same prompts, in one compiled program."""

from collections.abc import Sequence

import jax
import numpy as np

from lora_exp.config import SampleConfig
from lora_exp.data.tokenizers import Tokenizer
from lora_exp.runtime.dropout import stream_key
from lora_exp.train.decode import NOTHING, Decoder, PromptRows, pad_left, power_of_two
from lora_exp.train.hyperparameters import Hyperparameters
from lora_exp.train.program import Program, Tree, assemble
from lora_exp.train.step import over_trials

MOST_PROMPTS = 32  # prompts decoded in one batch; each trial has a cache of keys and values for all of them
GREEDY = SampleConfig(temperature=0)


class AnswerDecoder:
  """Decodes batches of prompts of one width, so that there is one compiled program."""

  def __init__(
    self, program: Program, tokenizer: Tokenizer, max_len: int, prompts: Sequence[Sequence[int]], max_tokens: int
  ):
    """`prompts` are all that it will be given. At most `max_tokens` tokens are generated for each of them."""
    self.program, self.max_len, self.max_tokens = program, max_len, max_tokens
    self.batch = min(MOST_PROMPTS, power_of_two(len(prompts)))
    self.longest = max(map(len, prompts))
    self.keys = jax.device_put(
      jax.random.split(stream_key(0, "sample"), self.batch), program.layout.replicated
    )  # not used by greedy decoding

    def build_model(weights):
      params, trial, frozen = weights
      return assemble(program, params, trial, frozen, None)

    self.decoder = Decoder(build_model, GREEDY, tokenizer.stops, tokenizer.vocab_size, max_len, program.layout)
    self.program_of = jax.jit(self._complete, static_argnames="slots")

  def __call__(
    self, params: Tree, trials: Hyperparameters, frozen: Tree, prompts: Sequence[Sequence[int]]
  ) -> list[list[list[int]]]:
    """The token ids of each trial's answer to each prompt, without the token that ends it.

    The arrays of `params` and `trials` have a leading axis N.
    """
    answers: list[list[list[int]]] = [[] for _ in range(trials.scale.shape[0])]
    for first in range(0, len(prompts), self.batch):
      part = prompts[first : first + self.batch]
      tokens_NBM = jax.device_get(self._decode(params, trials, frozen, part))
      for of_trial, tokens_BM in zip(answers, tokens_NBM, strict=True):
        of_trial += [row[row != NOTHING].tolist() for row in tokens_BM[: len(part)]]
    return answers

  def _decode(self, params: Tree, trials: Hyperparameters, frozen: Tree, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """The tokens (N, B, max_tokens) of the answers to at most B prompts."""
    missing = self.batch - len(prompts)
    tokens_BP, start_B = pad_left([*prompts, *[prompts[0]] * missing], self.longest)
    room = [min(self.max_tokens, self.max_len - len(prompt)) for prompt in prompts]
    room_B = np.array([*room, *[0] * missing], np.int32)  # rows that only fill the batch end at once
    rows = PromptRows(start_B, room_B, self.keys, np.int32(tokens_BP.shape[1]))
    slots = power_of_two(tokens_BP.shape[1] + self.max_tokens)
    return self.program_of(params, trials, frozen, tokens_BP, rows, slots=slots)

  def _complete(self, params, trials, frozen, tokens_BP, rows: PromptRows, slots: int) -> jax.Array:
    def one_trial(trial: Hyperparameters, params: Tree) -> jax.Array:
      return self.decoder.complete((params, trial, frozen), tokens_BP, rows, slots, self.max_tokens)

    return over_trials(one_trial, self.program.mapping, trials, params)
