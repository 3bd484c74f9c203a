"""Completions of prompts, token by token, with stop texts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import Config, InputError, SampleConfig
from lora_exp.config.conversion import shown
from lora_exp.data.chat import encode_chat
from lora_exp.data.sources import prompt_separator
from lora_exp.data.tokenizers import Tokenizer
from lora_exp.runtime.dropout import stream_key
from lora_exp.train.decode import NOTHING, Decoder, PromptRows, pad_left, power_of_two
from lora_exp.train.hyperparameters import Hyperparameters
from lora_exp.train.program import Program, Tree, assemble

MOST_ROWS = 32  # prompts decoded together
BROKEN = "\N{REPLACEMENT CHARACTER}"  # decodes from bytes that are not, or not yet, a character


@dataclass(frozen=True)
class PromptFormat:
  """How a prompt is put to the model: as a turn of its chat template, or as text with a separator after it."""

  chat: bool = False
  separator: str = ""


PLAIN = PromptFormat()


def prompt_format(cfg: Config, tokenizer: Tokenizer) -> PromptFormat:
  """The format of the prompts that `cfg` samples from.

  With `sample.chat=auto` it is the format of the run's data. A base alone, and a run on text without prompts, continues
  the plain prompt. Raises InputError for sample.chat=always without a template.
  """
  if cfg.sample.chat == "always":
    if tokenizer.chat_template is None:
      raise InputError(f"sample.chat=always: the tokenizer {tokenizer.name} has no chat template; use sample.chat=none")
    return PromptFormat(chat=True)
  separator = prompt_separator(cfg.data)
  trained = cfg.task == "train" or cfg.run is not None
  if cfg.sample.chat == "none" or not trained or separator is None:
    return PLAIN
  if cfg.data.chat == "auto" and tokenizer.chat_template is not None:
    return PromptFormat(chat=True)
  return PromptFormat(separator=separator)


class Sampler:
  """Completions of prompts in one format. One object serves every state of one program."""

  def __init__(
    self, program: Program, cfg: SampleConfig, tokenizer: Tokenizer, max_len: int, format: PromptFormat = PLAIN
  ):
    self.cfg, self.tokenizer, self.max_len, self.layout = cfg, tokenizer, max_len, program.layout
    self.format = format
    self.decoder = Decoder(
      lambda weights: assemble(program, weights[0], weights[1], weights[2], None),
      cfg,
      tokenizer.stops,
      tokenizer.vocab_size,
      max_len,
      program.layout,
    )

  def __call__(self, params: Tree, trial: Hyperparameters, frozen: Tree, prompts: Sequence[str]) -> list[str]:
    """Completions without their prompts, up to a stop token or a stop text."""
    return self.decode(params, trial, frozen, self.encode(prompts))

  def encode(self, prompts: Sequence[str]) -> list[list[int]]:
    """The token ids of each prompt. Raises InputError if `model.max_len` leaves no position for another token."""
    ids = [self._asked(prompt) for prompt in prompts]
    if problems := [
      f"the prompt {shown(prompt)!r} has {len(row):,} tokens, and model.max_len={self.max_len} leaves no room for "
      "another: shorten it"
      for prompt, row in zip(prompts, ids, strict=True)
      if len(row) >= self.max_len
    ]:
      raise InputError(problems)
    return ids

  def _asked(self, prompt: str) -> list[int]:
    if self.format.chat:
      return encode_chat(self.tokenizer, [{"role": "user", "content": prompt}])
    start = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
    return start + self.tokenizer.encode(prompt + self.format.separator) or [self.tokenizer.eot]

  def decode(
    self,
    params: Tree,
    trial: Hyperparameters,
    frozen: Tree,
    prompts: Sequence[Sequence[int]],
    show: Callable[[str], None] | None = None,
  ) -> list[str]:
    """Completions of prompts given as token ids; `show` gets the text of the first one piece by piece.

    The samples of a prompt depend on `sample.seed` and on how often it came before, not on the other prompts.
    """
    texts = [StreamedText(self.tokenizer, prompt, self.cfg.stop) for prompt in prompts]
    seen: Counter[tuple[int, ...]] = Counter()
    repeats = []
    for prompt in map(tuple, prompts):
      repeats.append(seen[prompt])
      seen[prompt] += 1
    for first in range(0, len(texts), MOST_ROWS):
      part = slice(first, first + MOST_ROWS)
      self._decode((params, trial, frozen), prompts[part], repeats[part], texts[part], show)
    return [text.whole for text in texts]

  def _decode(self, weights, prompts, repeats, texts: list["StreamedText"], show) -> None:
    count = len(prompts)
    batch = power_of_two(count)  # further rows are copies of the first, and end at once
    prompts = [*prompts, *[prompts[0]] * (batch - count)]
    tokens_BP, start_B = pad_left(prompts)
    room_B = np.array([min(self.cfg.max_tokens, self.max_len - len(prompt)) for prompt in prompts], np.int32)
    numbers = jnp.array([*repeats, *[0] * (batch - count)], jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(stream_key(self.cfg.seed, "sample"), numbers)
    width = tokens_BP.shape[1]
    rows = PromptRows(start_B, room_B, jax.device_put(keys, self.layout.replicated), np.int32(width))
    slots = power_of_two(width + int(room_B.max()))
    state = self.decoder.start(weights, tokens_BP, rows, slots)
    new_BN = state.token_B[:, None]
    while True:
      drawn_BN, done_B = jax.device_get((new_BN, state.done_B))
      for text, row in zip(texts, drawn_BN, strict=False):
        piece = text.add([t for t in row.tolist() if t != NOTHING])
        if show is not None and text is texts[0]:
          show(piece)
      ended_B = np.array([*(text.stopped for text in texts), *[True] * (batch - count)])
      if (done_B | ended_B).all():
        break
      state, new_BN = self.decoder.block(weights, rows, state, ended_B)
    for text in texts:
      piece = text.rest()
      if show is not None and text is texts[0]:
        show(piece)


def make_sampler(program: Program, cfg: Config, tokenizer: Tokenizer) -> Sampler:
  """The sampler of a run: called with (params, trial, frozen, prompts) it gives the completions."""
  return Sampler(program, cfg.sample, tokenizer, cfg.model.max_len, prompt_format(cfg, tokenizer))


class StreamedText:
  """The text of one completion while it is generated: complete characters, and no part of a stop text."""

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
    self.tokenizer, self.stops, self.ids = tokenizer, stops, list[int]()
    # A leading space is part of the text if the prompt ends with text.
    controls = tokenizer.special_tokens.values()
    self.anew = tokenizer.start_after_control and len(prompt) > 0 and prompt[-1] in controls
    self.whole, self.given, self.stopped = "", 0, False

  def add(self, ids: Sequence[int]) -> str:
    """Adds token ids; returns the text that has become final."""
    if self.stopped:
      return ""
    self.ids += ids
    self.whole = self.tokenizer.decode(self.ids, start=self.anew)
    sure = self.whole.rstrip(BROKEN)
    # The stop text that is complete first counts, whatever the pieces in which tokens arrive.
    found = [(i + len(stop), i) for stop in self.stops if (i := sure.find(stop)) >= 0]
    if found:
      self.stopped = True
      self.whole = sure = sure[: min(found)[1]]
    else:
      sure = sure[: len(sure) - max((_begun(sure, stop) for stop in self.stops), default=0)]
    return self._give(sure)

  def rest(self) -> str:
    """The text that was held back, when no more tokens come."""
    return self._give(self.whole)

  def _give(self, sure: str) -> str:
    piece, self.given = sure[self.given :], max(self.given, len(sure))
    return piece


def _begun(text: str, stop: str) -> int:
  """Characters at the end of `text` that begin `stop`."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
