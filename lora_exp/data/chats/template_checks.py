"""Finds the parts of messages, tools and variables that a chat template changes or leaves out.

It is not enough to find a text in the rendering, because another message may contain the same text. Each part is
therefore tagged with a character that no message contains, and everything is rendered again. The template leaves out a
part if its tag is missing.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.chats.chat_template import REASONING
from lora_exp.data.chats.guarded_chat import GuardedChat, Message, renamed_call

TURNS, CONVERSATIONS = "turns", "conversations"  # units of problems
CHECKED_KEYS = ("name", "documents")  # keys of messages besides their texts; ids only link a tool call and its result
TEXTS = {"text": ("content",), "reasoning": REASONING}  # keys of messages
Problem = tuple[str, str]  # (unit, what is wrong with it)
Problems = dict[Problem, int]  # how many have it


class TemplateCheck:
  """Compares the messages, tools and variables of `chat` with `text`, their rendering."""

  def __init__(self, chat: GuardedChat, text: str):
    self.chat, self.text = chat, chat.without_guards(text)
    self.tags: dict[str, list[str]] = {}  # what is tagged, such as "text 2" -> its tags
    self.called = _called_functions(chat)
    self.rendered = self._rendered()

  def problems(self) -> Problems:
    """How many turns and conversations the template changes or does not write in full."""
    found = Counter[Problem]()
    for turn, message in enumerate(self.chat.messages):
      found.update(self._text_problems(turn, message))
      found.update(self._key_problems(turn, message))
    if not self._is_written("tools"):
      found[CONVERSATIONS, self._left_out("their tools")] += 1
    for name in sorted(self.chat.given_variables - self.chat.template.variables):
      found[CONVERSATIONS, self._left_out(f"the variable {name!r} of chat_template_kwargs")] += 1
    return dict(found)

  def _text_problems(self, turn: int, message: Message) -> Iterator[Problem]:
    """The problems of the text, and of the reasoning, of message number `turn`."""
    for kind, names in TEXTS.items():
      texts = [message[name] for name in names if isinstance(message.get(name), str)]
      is_whole = all(has_text(self.text, self.chat.without_guards(text)) for text in texts)
      if not is_whole or not self._is_written(f"{kind} {turn}"):
        yield TURNS, f"the chat template changes the {kind} of the {message.get('role')}, or leaves it out"

  def _key_problems(self, turn: int, message: Message) -> Iterator[Problem]:
    """The problems of the tool calls and other keys of message number `turn`."""
    if not self._is_written(f"tool_calls {turn}"):
      yield TURNS, self._left_out("the tool calls of the assistant")
    for key in CHECKED_KEYS:
      if not self._is_written(f"{key} {turn}"):
        yield TURNS, self._left_out(f"the key {key!r} in messages of the {message.get('role')}")

  def _left_out(self, what: str) -> str:
    subject = "the format without a chat template" if self.chat.is_plain else "the chat template"
    return f"{subject} leaves out {what}"

  def _is_written(self, part: str) -> bool:
    """Whether all tags of `part` are in the rendering. True if it has none, or if the template refuses tags."""
    return self.rendered is None or all(has_text(self.rendered, tag) for tag in self.tags.get(part, ()))

  def _rendered(self) -> str | None:
    """The rendering of all parts with their tags; None if the template refuses them."""
    messages = [self._tagged_message(turn, message) for turn, message in enumerate(self.chat.messages)]
    tools = [renamed_call(tool, self._new_tag("tools")) for tool in self.chat.tools]
    try:
      return self.chat.template.render(self.chat.variables, messages, False, tools)
    except InputError:
      return None

  def _tagged_message(self, turn: int, message: Message) -> Message:
    tagged = dict(message)
    for kind, names in TEXTS.items():
      texts = {name: message[name] for name in names if isinstance(message.get(name), str) and message[name].strip()}
      if texts:
        tag = self._new_tag(f"{kind} {turn}")
        tagged |= {name: _with_tag(text, tag) for name, text in texts.items()}
    for key in CHECKED_KEYS:
      repeats_call = key == "name" and message.get("role") == "tool" and message.get(key) in self.called
      if _has_strings(message.get(key)) and not repeats_call:
        tagged[key] = _with_tags(message[key], self._new_tag(f"{key} {turn}"))
    if message.get("tool_calls"):
      tagged["tool_calls"] = [renamed_call(call, self._new_tag(f"tool_calls {turn}")) for call in message["tool_calls"]]
    return tagged

  def _new_tag(self, part: str) -> str:
    tag = next(self.chat.unused_characters, self.chat.sentinel)
    self.tags.setdefault(part, []).append(tag)
    return tag


def _called_functions(chat: GuardedChat) -> set[Any]:
  """The names of the functions that the messages call."""
  calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
  return {call["function"].get("name") for call in calls if isinstance(call, Mapping) and "function" in call}


def has_text(rendered: str, content: str) -> bool:
  """Whether `rendered` contains `content`, as it is or as a JSON string, without the spaces around it."""
  content = content.strip()
  return (content in rendered or json.dumps(content, ensure_ascii=False)[1:-1] in rendered
          or json.dumps(content)[1:-1] in rendered)


def _with_tag(text: str, tag: str) -> str:
  """`text` with `tag` after its last word, before closing marks such as `</tool_response>`, which templates search."""
  end = len(text.rstrip())
  while text.endswith(">", 0, end) and text.rfind("<", 0, end) > 0:
    end = len(text[: text.rfind("<", 0, end)].rstrip())
  end = end or len(text)
  return text[:end] + tag + text[end:]


def _has_strings(value: Any) -> bool:
  """Whether `value` contains a string."""
  if isinstance(value, str):
    return bool(value)
  values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
  return any(map(_has_strings, values))


def _with_tags(value: Any, tag: str) -> Any:
  """`value` with `tag` at the end of each of its strings."""
  if isinstance(value, str):
    return value + tag
  if isinstance(value, Mapping):
    return {name: _with_tags(inner, tag) for name, inner in value.items()}
  return [_with_tags(inner, tag) for inner in value] if isinstance(value, list) else value
