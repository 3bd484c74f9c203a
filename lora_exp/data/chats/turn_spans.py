"""Finds the characters of a turn in a rendered conversation.

A turn is the text that it adds to the rendering of the messages before it, from the end of the generation prompt to the
end of the turn. Some templates render a turn differently once other turns follow, without its reasoning for example.
Such a turn ends at its end-of-turn token. A turn that cannot be found is not learned, and is counted.
"""

from collections.abc import Sequence
from os.path import commonprefix

from lora_exp.config.errors import InputError
from lora_exp.data.chats.guarded_chat import GuardedChat, Message, common_prefix_length, renamed_call
from lora_exp.data.chats.rendered_text import RenderedText, Span


class TurnFinder:
  """Finds turns in `rendered`, the rendering of all messages of `chat`."""

  def __init__(self, chat: GuardedChat, rendered: RenderedText):
    self.chat, self.rendered, self.text = chat, rendered, rendered.text
    self.missing: list[str] = []  # ends of generation prompts that the turns found so far do not begin with

  def span(self, turn: int) -> Span | None:
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
    self.missing.append(prompt[common:])  # the prompt ends in text that the turn lacks, such as `<think>`
    return self.rendered.common_tokens_end(prompt)

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
    if message.get("tool_calls"):
      message["tool_calls"] = [renamed_call(call, self.chat.sentinel) for call in message["tool_calls"]]
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
    following, stops, through = self._place_inside(turn + 1), self.chat.tokenizer.stops, through or ""
    limit = len(self.text) if following is None else following
    ends = [segment.end for segment in self.rendered.segments
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
