"""Conversations of several turns: the token ids of a rendered conversation, and a mask of the tokens that are learned.

If a template marks what the model generates, the mask is that of transformers (`return_assistant_tokens_mask`).
Otherwise turns are found by rendering the messages before them (`turn_spans`).
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.data.chats.chat import OPENINGS, missing_reason
from lora_exp.data.chats.control_names import ControlNames, control_name_reason
from lora_exp.data.chats.guarded_chat import GuardedChat, Message, encode_texts
from lora_exp.data.chats.plain_turns import plain_chat
from lora_exp.data.chats.rendered_text import RenderedText, Span
from lora_exp.data.chats.template_checks import TURNS, Problem, Problems, TemplateCheck
from lora_exp.data.chats.turn_spans import TurnFinder
from lora_exp.data.documents import Conversation
from lora_exp.data.tokenization import Tokenizer

NO_END = "no end-of-turn token of them is learned, so the model does not learn to stop"
ANSWERS = "assistant turns"  # a unit of `totals` and `problems`, like TURNS


@dataclass(frozen=True)
class EncodedConversation:
  """The token ids of a conversation, and which of them are learned."""

  ids: list[int]
  learned: np.ndarray  # (tokens,) bool
  totals: dict[str, int]  # unit -> how many there are: turns, assistant turns that should be learned
  problems: Problems


def encode_conversations(
  tokenizer: Tokenizer, conversations: Sequence[Conversation], loss: str, plain: bool
) -> list[EncodedConversation]:
  """Encodes each conversation; `loss` is assistant, last or all, as in `data.loss`.

  With `plain`, or without a chat template, turns are lines of `Role: content`. Raises InputError if the template
  refuses a conversation.
  """
  found = [_RenderedConversation(tokenizer, conversation, loss, plain) for conversation in conversations]
  texts = encode_texts(tokenizer, [conversation.rendered.segments for conversation in found])
  return [conversation.encoded(texts) for conversation in found]


class _RenderedConversation:
  """The rendered text of a conversation, its spans that are learned, and its problems."""

  def __init__(self, tokenizer: Tokenizer, conversation: Conversation, loss: str, plain: bool):
    render = plain_chat if plain or tokenizer.chat_template is None else GuardedChat
    rest = conversation.tools, conversation.variables
    self.tokenizer, self.loss = tokenizer, loss
    self.chat = render(tokenizer, conversation.messages, *rest)
    try:
      text, self.marks = self.chat.marked()
    except InputError:
      messages = _with_argument_texts(conversation.messages)
      if messages is None:
        raise
      self.chat = render(tokenizer, messages, *rest)
      text, self.marks = self.chat.marked()
    self.rendered = RenderedText(self.chat, text)
    self.turns = TurnFinder(self.chat, self.rendered)
    self.learned_turns, self.other_turns = _assistant_turns(conversation, loss)
    self.zero_weight_turns = conversation.zero_weight & set(self.other_turns)
    self.problems: Problems = TemplateCheck(self.chat, text).problems()
    self._count_names(conversation)
    self.spans = self._all_spans(self.zero_weight_turns) if loss == "all" else self._learned_spans()
    for missing in self.turns.missing:
      self._count((OPENINGS, missing_reason(missing)))

  def _count(self, problem: Problem, count: int = 1) -> None:
    if count:
      self.problems[problem] = self.problems.get(problem, 0) + count

  def _count_names(self, conversation: Conversation) -> None:
    """Counts the messages that spell out a control token."""
    names = ControlNames(self.tokenizer)
    for message in conversation.messages:
      name = names.first(str(message.get("content")))
      if name is not None:
        self._count((TURNS, control_name_reason(name)))

  def _all_spans(self, left_out: Set[int]) -> list[Span]:
    """The whole text without the turns `left_out`."""
    begin, spans = 0, []
    for span in self._found_spans(sorted(left_out)):
      spans.append((begin, span[0]))
      begin = span[1]
    return [*spans, (begin, len(self.rendered.text))]

  def _learned_spans(self) -> list[Span]:
    """The spans of the text that are learned, in order."""
    if not self.chat.template.marks_generations:
      spans = self._found_spans(self.learned_turns)
      missing = len(self.learned_turns) - len(spans)
      self._count((ANSWERS, "the chat template renders them differently once other turns follow"), missing)
      return spans
    others = self._found_spans(self.other_turns)
    return [mark for mark in self.marks if not any(begin < mark[1] and mark[0] < end for begin, end in others)]

  def _found_spans(self, turns: Sequence[int]) -> list[Span]:
    """The spans of those of `turns` that can be found."""
    return [span for span in map(self.turns.span, turns) if span is not None]

  def encoded(self, texts: Mapping[tuple[str, bool], list[int]]) -> EncodedConversation:
    """The ids and the mask. `texts`: the ids of each text, by (text, at_start)."""
    ids, learned = self.rendered.encoded(texts, self.spans)
    if self.loss != "all" and learned.any():
      ended = int(np.isin(np.array(ids)[learned], self.tokenizer.stops).sum())
      self._count((ANSWERS, NO_END), max(0, len(self.learned_turns) - ended))
    self._count((ANSWERS, "their weight is 0"), len(self.zero_weight_turns))
    totals = {TURNS: len(self.chat.messages), ANSWERS: len(self.learned_turns) + len(self.other_turns)}
    return EncodedConversation(ids, learned, totals, self.problems)


def _assistant_turns(conversation: Conversation, loss: str) -> tuple[list[int], list[int]]:
  """The indices of the assistant's messages that are learned, and of those that are not."""
  turns = [n for n, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
  learned = [turn for turn in turns if turn >= conversation.prompt_messages and turn not in conversation.zero_weight]
  if loss == "last":
    learned = [turn for turn in learned if turn == turns[-1]]
  return learned, [turn for turn in turns if turn not in learned]


def _with_argument_texts(messages: Sequence[Message]) -> list[Message] | None:
  """`messages` with the arguments of tool calls as JSON strings, which some templates expect; None without calls."""
  if not any(message.get("tool_calls") for message in messages):
    return None
  return [{**message, "tool_calls": [_with_argument_text(call) for call in message["tool_calls"]]}
          if message.get("tool_calls") else message for message in messages]


def _with_argument_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
  function = call["function"]
  arguments = function.get("arguments")
  text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
  return {**call, "function": {**function, "arguments": text}}
