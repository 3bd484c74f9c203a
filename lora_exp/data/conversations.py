"""Conversations of several turns: the token ids of a rendered conversation, and a mask of the tokens that are learned.

If a template marks what the model generates, the mask is that of transformers (`return_assistant_tokens_mask`).
Otherwise a turn is the text that it adds to the rendering of the messages before it, from the end of the generation
prompt to the end of the turn. Some templates render a turn differently once other turns follow, without its reasoning
for example. Such a turn ends at its end-of-turn token. A turn that cannot be found is not learned, and is counted.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.data.chat import (
  OPENINGS,
  ControlNames,
  GuardedChat,
  Message,
  Segment,
  common_prefix_length,
  control_name_reason,
  encode_segments,
  encode_texts,
  missing_reason,
)
from lora_exp.data.sources.source import Conversation
from lora_exp.data.tokenizers import Tokenizer

# For tokenizers without a chat template.
PLAIN_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: "
  "{{ message.content or (message.tool_calls | tojson if message.tool_calls) }}"
  "{{ eos_token if message.role == 'assistant' }}{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}")
NO_END = "no end-of-turn token of them is learned, so the model does not learn to stop"
TURNS, ANSWERS = "turns", "assistant turns"  # units of `totals` and `problems`
Span = tuple[int, int]  # characters of a rendered text
Problems = dict[tuple[str, str], int]  # (unit, what is wrong with them) -> how many


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
  texts = encode_texts(tokenizer, [conversation.segments for conversation in found])
  return [conversation.encoded(texts) for conversation in found]


class _RenderedConversation:
  """The rendered text of a conversation, and its spans that are learned."""

  def __init__(self, tokenizer: Tokenizer, conversation: Conversation, loss: str, plain: bool):
    template = PLAIN_TEMPLATE if plain or tokenizer.chat_template is None else None
    variables = dict(conversation.variables)
    if template is not None:
      variables = _plain_variables(tokenizer) | variables
    self.chat = GuardedChat(tokenizer, conversation.messages, conversation.tools, variables, template)
    self.tokenizer, self.loss = tokenizer, loss
    self.text, self.marks = self.chat.marked()
    self.segments = self.chat.segments(self.text, True)
    self.learned_turns, self.other_turns = _assistant_turns(conversation, loss)
    self.zero_weight_turns = len(conversation.unlearned & set(self.other_turns))
    self.spans: list[Span] = []
    self.problems = _changed_messages(self.chat, self.text, conversation.messages)
    self._count_names(conversation.messages)
    self._count_tools()
    self.spans = self._all_spans(conversation.unlearned) if loss == "all" else self._learned_spans()

  def _count_names(self, messages: Sequence[Message]) -> None:
    """Counts the messages that spell out a control token."""
    names = ControlNames(self.tokenizer)
    for message in messages:
      name = names.first(str(message.get("content")))
      if name is not None:
        key = TURNS, control_name_reason(name)
        self.problems[key] = self.problems.get(key, 0) + 1

  def _count_tools(self) -> None:
    """Counts the messages whose tool calls the template leaves out, and the conversation if it leaves out its tools."""
    for turn, message in enumerate(self.chat.messages):
      if message.get("tool_calls"):
        calls = [_renamed_call(call, self.chat.sentinel) for call in message["tool_calls"]]
        messages = [*self.chat.messages[:turn], {**message, "tool_calls": calls}, *self.chat.messages[turn + 1 :]]
        if not self._has_sentinel(messages, self.chat.tools):
          key = TURNS, "the chat template leaves out the tool calls of the assistant"
          self.problems[key] = self.problems.get(key, 0) + 1
    tools = [_renamed_call(tool, self.chat.sentinel) for tool in self.chat.tools]
    if tools and not self._has_sentinel(self.chat.messages, tools):
      self.problems["conversations", "the chat template leaves out their tools"] = 1

  def _has_sentinel(self, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    """Whether the sentinel is in the rendering of `messages` and `tools`, or the template refuses it there."""
    try:
      text = self.chat.template.render(self.chat.variables, messages, False, tools)
    except InputError:
      return True
    return self.chat.sentinel in text or json.dumps(self.chat.sentinel)[1:-1] in text

  def _all_spans(self, unlearned: Set[int]) -> list[Span]:
    """The whole text without the assistant turns of weight 0, `unlearned`."""
    begin, spans = 0, []
    for span in filter(None, map(self._turn_span, sorted(unlearned & set(self.other_turns)))):
      spans.append((begin, span[0]))
      begin = span[1]
    return [*spans, (begin, len(self.text))]

  def _learned_spans(self) -> list[Span]:
    """The spans of the text that are learned, in order."""
    if self.chat.template.marks_generations:
      if not self.other_turns:
        return self.marks
      others = [span for span in map(self._turn_span, self.other_turns) if span is not None]
      return [mark for mark in self.marks if not any(begin < mark[1] and mark[0] < end for begin, end in others)]
    spans = [self._turn_span(turn) for turn in self.learned_turns]
    missing = spans.count(None)
    if missing:
      self.problems[ANSWERS, "the chat template renders them differently once other turns follow"] = missing
    return [span for span in spans if span is not None]

  def _turn_span(self, turn: int) -> Span | None:
    """The characters of message number `turn`, from the end of the generation prompt; None if it cannot be found."""
    messages = self.chat.messages
    prompt, through = self._rendered(messages[:turn], True), self._rendered(messages[: turn + 1], False)
    begin = self._prompt_end(turn, prompt)
    if begin is None:
      return self._moved_span(turn, prompt, through)
    if turn == len(messages) - 1:
      return begin, len(self.text)
    if through is not None and self.text.startswith(through) and len(through) > begin:
      return begin, len(through)
    return self._span_to_end(turn, begin, through)

  def _prompt_end(self, turn: int, prompt: str | None) -> int | None:
    """The character at which `prompt`, the rendering before `turn` with the generation prompt, ends in the text.

    None if the text does not begin with the messages before `turn` as they are rendered alone.
    """
    if prompt is None or self.text.startswith(prompt):
      return None if prompt is None else len(prompt)
    history = self._rendered(self.chat.messages[:turn], False)
    if history is None or not self.text.startswith(history) or not prompt.startswith(history):
      return None
    common = common_prefix_length(prompt, self.text, len(history))
    key = OPENINGS, missing_reason(prompt[common:])  # the prompt ends in text that the turn lacks, such as `<think>`
    self.problems[key] = self.problems.get(key, 0) + 1
    return self._common_tokens_end(prompt)

  def _common_tokens_end(self, prompt: str) -> int:
    """The character at which the common prefix of the tokens of `prompt` and of the text ends."""
    parts = [self.chat.segments(prompt, True), self.segments]
    prompt_ids, ids = encode_segments(self.tokenizer, parts)
    remaining = len(commonprefix([prompt_ids, ids]))
    for segment in self.segments:
      tokens = [segment.token] if segment.token is not None else self.tokenizer.encode(segment.text, segment.at_start)
      if remaining < len(tokens):
        least = self._token_bounds(segment, tokens)[1][remaining - 1] if remaining else 0
        places = range(segment.begin, segment.end)
        return next(place for place in places if self._bytes_before(segment, place) >= least)
      remaining -= len(tokens)
    return len(self.text)

  def _moved_span(self, turn: int, prompt: str | None, through: str | None) -> Span | None:
    """The characters of `turn` if the template renders the turns before it differently once others follow."""
    inside = self._place_inside(turn)
    if inside is None:
      return None
    if prompt is not None and through is not None and through.startswith(prompt):
      alone = through[len(prompt) :]  # the turn, if it is rendered in the same way
      begin = self.text.rfind(alone, max(0, inside - len(alone)), inside + len(alone))
      if alone and 0 <= begin <= inside:
        return begin, begin + len(alone)
    if turn == len(self.chat.messages) - 1:
      return inside, len(self.text)
    return self._span_to_end(turn, inside, through)

  def _place_inside(self, turn: int) -> int | None:
    """Where the content, or the first tool call, of message number `turn` begins; None if the template omits it."""
    messages = list(self.chat.messages)
    message = dict(messages[turn])
    if message.get("content"):
      message["content"] = self.chat.sentinel
    if calls := message.get("tool_calls"):
      message["tool_calls"] = [_renamed_call(call, self.chat.sentinel) for call in calls]
    messages[turn] = message
    text = self._rendered(messages, False)
    if text is None or self.chat.sentinel not in text:
      return None
    before = text[: text.index(self.chat.sentinel)]
    return len(before) if self.text.startswith(before) else None

  def _span_to_end(self, turn: int, begin: int, through: str | None) -> Span | None:
    """The characters from `begin` to the token that ends `turn`, which is not the last turn.

    Without such a token, the span ends where the text no longer equals `through`, the rendering up to the turn.
    """
    following, stops, through = self._place_inside(turn + 1), self.tokenizer.stops, through or ""
    limit = len(self.text) if following is None else following
    ends = [segment.end for segment in self.segments
            if segment.token in stops and begin <= segment.begin and segment.end <= limit]
    if not ends:
      common = len(commonprefix([through, self.text]))
      return (begin, common) if begin < common <= limit else None
    after = self.text[ends[0] : limit]
    spaces = after[: len(after) - len(after.lstrip())]  # they belong to the turn if they do so in `through`
    alone = [segment for segment in self.chat.segments(through, True) if segment.token in stops]
    while spaces and not any(through.startswith(spaces, segment.end) for segment in alone[-2:]):
      spaces = spaces[:-1]
    return begin, ends[0] + len(spaces)

  def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
    """The rendered text of `messages`; None if the template refuses them."""
    try:
      return self.chat.rendered(messages, add_generation_prompt)
    except InputError:
      return None

  def encoded(self, texts: dict[tuple[str, bool], list[int]]) -> EncodedConversation:
    """The ids and the mask. `texts`: the ids of each text, by (text, at_start)."""
    ids: list[int] = []
    masks: list[np.ndarray] = []
    for segment in self.segments:
      if segment.token is not None:
        ids.append(segment.token)
        masks.append(np.array([_overlaps(segment.begin, segment.end, self.spans)]))
        continue
      tokens = texts[segment.text, segment.at_start]
      ids += tokens
      masks.append(self._text_mask(segment, tokens))
    learned = np.concatenate([np.zeros(0, bool), *masks])
    if self.loss != "all":
      ended = np.isin(np.array(ids)[learned], self.tokenizer.stops).sum() if learned.any() else 0
      if learned.any() and ended < len(self.learned_turns):
        self.problems[ANSWERS, NO_END] = len(self.learned_turns) - int(ended)
    if self.zero_weight_turns:
      self.problems[ANSWERS, "their weight is 0"] = self.zero_weight_turns
    totals = {TURNS: len(self.chat.messages), ANSWERS: len(self.learned_turns) + len(self.other_turns)}
    return EncodedConversation(ids, learned, totals, self.problems)

  def _text_mask(self, segment: Segment, tokens: list[int]) -> np.ndarray:
    """Whether each token of a text overlaps a learned span."""
    inside = [span for span in self.spans if span[0] < segment.end and segment.begin < span[1]]
    mask = np.zeros(len(tokens), bool)
    if not inside:
      return mask
    if inside[0][0] <= segment.begin and segment.end <= inside[0][1]:
      return ~mask
    begins_N, ends_N = self._token_bounds(segment, tokens)
    for span in inside:
      begin, end = (self._bytes_before(segment, place) for place in span)
      mask |= (begins_N < end) & (ends_N > begin)
    return mask

  def _bytes_before(self, segment: Segment, place: int) -> int:
    """The number of bytes of the segment's text before the character `place` of the rendered text."""
    return len(self._plain(self.text[segment.begin : max(place, segment.begin)]).encode(errors="surrogatepass"))

  def _plain(self, text: str) -> str:
    return text.replace(self.chat.guard, "")

  def _token_bounds(self, segment: Segment, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The byte offsets in the segment's text at which the tokens begin and end, (n,) and (n,)."""
    lengths = self.tokenizer.byte_lengths[tokens]
    size = len(segment.text.encode(errors="surrogatepass"))
    added = int(lengths.sum()) - size  # a tokenizer may put a space before a text
    if added in (0, 1):
      ends_N = np.cumsum(lengths) - added
      return np.maximum(ends_N - lengths, 0), ends_N
    # The tokenizer normalises texts, so byte lengths do not add up. Instead, the text up to each boundary is encoded.
    places = sorted({place for span in self.spans for place in span if segment.begin < place < segment.end})
    bounds = np.zeros(len(tokens) + 1, np.int64)
    bounds[-1] = size
    for place in places:
      part = self._plain(self.text[segment.begin : place])
      count = len(commonprefix([self.tokenizer.encode(part, segment.at_start), tokens]))
      bounds[count] = len(part.encode(errors="surrogatepass"))
    bounds = np.maximum.accumulate(bounds)
    return bounds[:-1], np.maximum(bounds[1:], bounds[:-1] + 1)


def _assistant_turns(conversation: Conversation, loss: str) -> tuple[list[int], list[int]]:
  """The indices of the assistant's messages that are learned, and of those that are not."""
  turns = [n for n, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
  learned = [turn for turn in turns if turn >= conversation.prompt_messages and turn not in conversation.unlearned]
  if loss == "last":
    learned = [turn for turn in learned if turn == turns[-1]]
  return learned, [turn for turn in turns if turn not in learned]


def _renamed_call(call: Any, name: str) -> Any:
  """The tool call `call` with `name` as the name of its function."""
  if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
    return {**call, "function": {**call["function"], "name": name}}
  return {**call, "name": name} if isinstance(call, Mapping) else call


def _changed_messages(chat: GuardedChat, text: str, messages: Sequence[Message]) -> Problems:
  """How many messages the template changes or leaves out, by role."""
  problems: Problems = {}
  for message in messages:
    texts = [message.get("content"), *(message.get(name) for name in ("reasoning_content", "thinking"))]
    texts += [part.get("text") for part in texts[0] if isinstance(part, dict)] if isinstance(texts[0], list) else []
    if not all(chat.has_text(text, content) for content in texts if isinstance(content, str)):
      key = TURNS, f"the chat template changes the text of the {message.get('role')}, or leaves it out"
      problems[key] = problems.get(key, 0) + 1
  return problems


def _plain_variables(tokenizer: Tokenizer) -> dict[str, Any]:
  """The control tokens in `PLAIN_TEMPLATE`."""
  names = {i: token for token, i in tokenizer.special_tokens.items()}
  return {"eos_token": names[tokenizer.eot], "bos_token": "" if tokenizer.bos is None else names[tokenizer.bos]}


def _overlaps(begin: int, end: int, spans: Sequence[Span]) -> bool:
  return any(first < end and begin < last for first, last in spans)
