"""Sampling of completions for prompts, with stop tokens and stop strings."""

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import Config, InputError, SampleConfig
from lora_exp.data.chats.guarded_chat import Message
from lora_exp.data.prompts import Prompt
from lora_exp.data.tokenization import Tokenizer
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime import console
from lora_exp.runtime.dropout import stream_key
from lora_exp.runtime.host_arrays import on_host, put_equal
from lora_exp.runtime.padded_sizes import power_of_two
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Program, Tree, Weights, assemble
from lora_exp.train.sampling.decode import BLOCK, NOT_FINITE, Decoder, PromptRows, pad_left
from lora_exp.train.sampling.prompt_encoding import (
  PLAIN,
  PromptFormat,
  encode_messages,
  encode_prompts,
  length_problem,
  prompt_format,
)

MOST_ROWS = 32  # prompts decoded in one batch
BROKEN = "\N{REPLACEMENT CHARACTER}"  # the decoded form of bytes that are not (yet) a character


class Sampler:
  """Samples completions of prompts in one format, for any state of one program."""

  def __init__(
    self, program: Program, cfg: SampleConfig, tokenizer: Tokenizer, max_len: int, format: PromptFormat = PLAIN,
    block: int = BLOCK,
  ):  # fmt: skip
    self.cfg, self.tokenizer, self.max_len, self.layout = cfg, tokenizer, max_len, program.layout
    self.format = format

    def build_model(weights: Weights) -> LanguageModel:
      params, trial, frozen = weights
      return assemble(program, params, trial, frozen, None)

    self.decoder = Decoder(build_model, cfg, tokenizer.stops, tokenizer.vocab_size, max_len, program.layout, block)

  def __call__(self, params: Tree, trial: Hyperparameters, frozen: Tree, prompts: Sequence[str]) -> list[str]:
    """Completions of `prompts`, without the prompts, up to a stop token or a stop string."""
    return self.decode(params, trial, frozen, self.encode(prompts))

  def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The token ids of each prompt. Raises InputError if a prompt is as long as `model.max_len` or longer."""
    return encode_prompts(prompts, self.format, self.tokenizer, self.max_len)

  def check_length(self, prompt: str, ids: Sequence[int]) -> None:
    """Raises InputError if the prompt leaves no room for an answer."""
    problem = length_problem(prompt, ids, self.max_len)
    if problem:
      raise InputError(problem)

  def encode_messages(self, messages: Sequence[Message]) -> list[int]:
    """The token ids of messages in the format of the prompts. Raises InputError if the chat template refuses them."""
    return encode_messages(messages, self.format, self.tokenizer)

  def stream(
    self, weights: Weights, prompt: Sequence[int], show: Callable[[str], None]
  ) -> "StreamedText":
    """The completion of one prompt, given as token ids. `show` is called with its text, piece by piece."""
    text = StreamedText(self.tokenizer, prompt, self.cfg.stop)
    self._decode(weights, [prompt], [0], [text], show)
    return text

  def decode(
    self,
    params: Tree,
    trial: Hyperparameters,
    frozen: Tree,
    prompts: Sequence[Sequence[int]],
    show: Callable[[str], None] | None = None,
  ) -> list[str]:
    """Completions of prompts given as token ids. `show` is called with the text of the first one, piece by piece.

    A completion ends where the logits are NaN or infinite, with a warning. The sample of a prompt depends on
    `sample.seed` and on the number of earlier equal prompts, not on other prompts.
    """
    return [text.text for text in self._streams(params, trial, frozen, prompts, show)]

  def continuations(
    self, params: Tree, trial: Hyperparameters, frozen: Tree, prompts: Sequence[Sequence[int]]
  ) -> list[list[int]]:
    """The completions of `decode` as token ids, without the stop token."""
    return [text.ids for text in self._streams(params, trial, frozen, prompts, None)]

  def _streams(
    self, params: Tree, trial: Hyperparameters, frozen: Tree, prompts: Sequence[Sequence[int]],
    show: Callable[[str], None] | None
  ) -> list["StreamedText"]:
    """Decodes all prompts, MOST_ROWS at a time."""
    texts = [StreamedText(self.tokenizer, prompt, self.cfg.stop) for prompt in prompts]
    counts: Counter[tuple[int, ...]] = Counter()
    repeats = []
    for prompt in map(tuple, prompts):
      repeats.append(counts[prompt])
      counts[prompt] += 1
    for first in range(0, len(texts), MOST_ROWS):
      part = slice(first, first + MOST_ROWS)
      self._decode((params, trial, frozen), prompts[part], repeats[part], texts[part], show)
    return texts

  def _decode(
    self, weights: Weights, prompts: Sequence[Sequence[int]], repeats: Sequence[int], texts: list["StreamedText"],
    show: Callable[[str], None] | None,
  ) -> None:  # fmt: skip
    """Decodes one batch of prompts into `texts`. `repeats`: the number of earlier equal prompts of each."""
    count = len(prompts)
    batch = power_of_two(count)  # the additional rows are copies of the first and end at once
    prompts = [*prompts, *[prompts[0]] * (batch - count)]
    tokens_BP, start_B = pad_left(prompts)
    room_B = np.array([min(self.cfg.max_tokens, self.max_len - len(prompt)) for prompt in prompts], np.int32)
    numbers = jnp.array([*repeats, *[0] * (batch - count)], jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(stream_key(self.cfg.seed, "sample"), numbers)
    width = tokens_BP.shape[1]
    rows = PromptRows(start_B, room_B, put_equal(keys, self.layout.replicated), np.int32(width))
    slots = power_of_two(width + int(room_B.max()))
    state = self.decoder.start(weights, tokens_BP, rows, slots)
    new_BN, failed = state.token_B[:, None], 0
    while True:
      drawn_BN, done_B = on_host((new_BN, state.done_B))
      for text, row in zip(texts, drawn_BN, strict=False):
        piece = text.add([t for t in row.tolist() if t >= 0])
        if show is not None and text is texts[0]:
          show(piece)
      failed += int((drawn_BN[:count] == NOT_FINITE).sum())
      ended_B = np.array([*(text.stopped for text in texts), *[True] * (batch - count)])
      if (done_B | ended_B).all():
        break
      state, new_BN = self.decoder.block(weights, rows, state, ended_B)
    for text in texts:
      piece = text.rest()
      if show is not None and text is texts[0]:
        show(piece)
    if failed:
      console.show_warning(f"{failed} of {count} completions ended early, because the logits were NaN or infinite; "
                           "the model diverged in training, or its activations overflow in model.dtype")


def make_sampler(program: Program, cfg: Config, tokenizer: Tokenizer, block: int = BLOCK) -> Sampler:
  """The sampler of a run, with the settings in `cfg.sample`. A streamed text is shown after each `block` of tokens."""
  return Sampler(program, cfg.sample, tokenizer, cfg.model.max_len, prompt_format(cfg, tokenizer), block)


class StreamedText:
  """The text of one completion during generation: complete characters only, and no part of a stop string."""

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
    self.tokenizer, self.stops, self.ids = tokenizer, stops, list[int]()
    # A leading space belongs to the completion unless the prompt ends with a control token.
    controls = tokenizer.special_tokens.values()
    self.at_start = tokenizer.start_after_control and len(prompt) > 0 and prompt[-1] in controls
    self.text, self.returned, self.stopped = "", 0, False  # `returned`: number of characters

  def add(self, ids: Sequence[int]) -> str:
    """Adds token ids. Returns the new text that later tokens cannot change."""
    if self.stopped:
      return ""
    self.ids += ids
    self.text = self.tokenizer.decode(self.ids, start=self.at_start)
    final = self.text.rstrip(BROKEN)
    # The stop string that ends first applies, however many tokens arrive at a time.
    positions = [(final.find(stop), stop) for stop in self.stops]
    matches = [(start + len(stop), start) for start, stop in positions if start >= 0]
    if matches:
      self.stopped = True
      self.text = final = final[: min(matches)[1]]
    else:
      final = final[: len(final) - max((_partial_stop(final, stop) for stop in self.stops), default=0)]
    return self._take(final)

  def rest(self) -> str:
    """The remaining text, when generation has ended."""
    return self._take(self.text)

  def _take(self, final: str) -> str:
    """The part of `final` that was not returned before."""
    piece = final[self.returned :]
    self.returned = max(self.returned, len(final))
    return piece


def _partial_stop(text: str, stop: str) -> int:
  """The number of characters at the end of `text` that may be the start of `stop`."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
