"""A conversation with a model: turns by its chat template, and the base's answer to the same turn."""

from collections.abc import Callable
from dataclasses import dataclass

from lora_exp.train.compute.program import Weights
from lora_exp.train.sampling.sampler import Sampler

Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
  """An answer."""

  text: str
  cut_off: bool  # whether it reached the maximum number of tokens
  forgotten: int  # messages at the beginning of the conversation that no longer fit


class ChatSession:
  """The messages so far. Where the format of prompts has no turns, each message is answered alone."""

  def __init__(self, sampler: Sampler, model: Weights, base: Weights | None):
    self.sampler, self.model, self.base = sampler, model, base
    self.messages: list[Message] = []

  def answer(self, text: str, show: Callable[[str], None]) -> Reply:
    """The model's answer to a new message. If Ctrl-C interrupts it, the answer is the part that was shown."""
    before = list(self.messages)
    self.messages.append({"role": "user", "content": text})
    parts: list[str] = []

    def keep(piece: str) -> None:
      parts.append(piece)
      show(piece)

    try:
      reply = self._reply(self.model, keep)
    except KeyboardInterrupt:
      reply = Reply("".join(parts), False, 0)
    except BaseException:
      self.messages = before
      raise
    self.messages.append({"role": "assistant", "content": reply.text})
    return reply

  def base_answer(self, show: Callable[[str], None]) -> Reply:
    """The base's answer to the last message. It is not part of the conversation."""
    assert self.base is not None and self.messages
    answered, self.messages = self.messages, self.messages[:-1]
    try:
      return self._reply(self.base, show)
    finally:
      self.messages = answered

  def reset(self) -> None:
    """Begins a new conversation."""
    self.messages = []

  def _reply(self, weights: Weights, show: Callable[[str], None]) -> Reply:
    """The answer of the model with `weights` to the messages."""
    ids, forgotten = self._encoded()
    room = min(self.sampler.cfg.max_tokens, self.sampler.max_len - len(ids))
    text = self.sampler.stream(weights, ids, show)
    return Reply(text.text, not text.stopped and len(text.ids) >= room, forgotten)

  def _encoded(self) -> tuple[list[int], int]:
    """The token ids of the messages, and how many of the first ones are left out so that an answer fits."""
    if not self.sampler.format.has_turns:
      [ids] = self.sampler.encode([self.messages[-1]["content"]])
      return ids, 0
    kept, needed = list(self.messages), min(self.sampler.cfg.max_tokens, self.sampler.max_len // 4)
    ids = self.sampler.encode_messages(kept)
    while len(ids) + needed > self.sampler.max_len and len(kept) > 2:
      kept = kept[2:]  # a message and its answer
      ids = self.sampler.encode_messages(kept)
    self.sampler.check_length(kept[-1]["content"], ids)
    return ids, len(self.messages) - len(kept)
