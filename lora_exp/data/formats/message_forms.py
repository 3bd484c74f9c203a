"""Converts the messages of a row to the form that chat templates read.

OpenAI's form is {"role": "user", "content": …}, ShareGPT's {"from": "human", "value": …}. Both become the first.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_exp.data.formats.row import RowProblem

ROLES = {
  "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
  "model": "assistant", "bot": "assistant", "ai": "assistant", "function": "tool", "observation": "tool",
  "tool_response": "tool", "prompter": "user",
}  # fmt: skip
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
CALLS = ("function_call", "tool_call")  # roles of ShareGPT's turns that call a function
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts")
QUESTION_KEYS = ("human", "user", "input", "question", "prompt")  # of objects without a role
ANSWER_KEYS = ("assistant", "gpt", "bot", "output", "answer", "response")
WEIGHT_KEYS = ("weight", "train", "training")  # a turn is not learned if one is 0, as in OpenAI's files, or false
ARGUMENT_KEYS = ("arguments", "parameters", "input")  # of tool calls, in OpenAI's, Llama's and Anthropic's form
REASONING = ("reasoning_content", "reasoning", "thinking")
READ_KEYS = ("name", "tool_calls", "tool_call_id", *REASONING, "documents")


class Turns:
  """Collects the messages of a row."""

  def __init__(self) -> None:
    self.messages: list[dict[str, Any]] = []
    self.zero_weight: set[int] = set()
    self.unread: dict[str, None] = {}  # an ordered set: keys of messages that are not read

  def add_text(self, role: str, text: Any) -> None:
    """Adds a message with the content `text`. Raises RowProblem if it is not text."""
    self.messages.append({"role": role, "content": text_of(text, f"the {role} turn")})

  def add_all(self, value: Any) -> None:
    """Adds the messages in the cell `value`: a list, or a string that contains one. Raises RowProblem.

    Strings in a list are turns of the user and the assistant alternately.
    """
    messages = _messages_of_columns(parsed(value))
    if not isinstance(messages, list):
      raise RowProblem("the messages are not a list")
    if len(messages) > 1 and all(isinstance(text, str) for text in messages):  # as in LIMA: the user begins
      for number, text in enumerate(messages):
        self.add_text("assistant" if number % 2 else "user", text)
      return
    for raw in messages:
      self._add(raw)

  def _add(self, raw: Any) -> None:
    if not isinstance(raw, Mapping):
      raise RowProblem("a message is not an object")
    keys = _pair_keys(raw)
    if keys is not None:
      self.add_text("user", raw[keys[0]])
      self.add_text("assistant", raw[keys[1]])
      self._add_unread(raw, set(keys))
      return
    role_key, role = _first(raw, ROLE_KEYS)
    content_key, content = _first(raw, CONTENT_KEYS)
    if not isinstance(role, str):
      raise RowProblem("a message has no role")
    if any(key in raw and not raw[key] and raw[key] is not None for key in WEIGHT_KEYS):
      self.zero_weight.add(len(self.messages))
    self.messages.append(_message(role, content, raw))
    read = {role_key, content_key, "function_call", *READ_KEYS, *WEIGHT_KEYS}
    read -= {key for key in WEIGHT_KEYS if raw.get(key) not in (0, 1, None)}  # other weights count as 1
    self._add_unread(raw, read)

  def _add_unread(self, raw: Mapping[str, Any], read: set[str]) -> None:
    """Remembers the keys of `raw` that have a value and are not among `read`."""
    filled = [key for key, value in raw.items() if value not in (None, "", [], {})]
    self.unread |= dict.fromkeys(key for key in filled if key not in read)


def _pair_keys(raw: Mapping[str, Any]) -> tuple[str, str] | None:
  """The keys of question and answer in an object such as {"human": …, "assistant": …}; None for any other message."""
  question, answer = (next((key for key in keys if raw.get(key) is not None), None)
                      for keys in (QUESTION_KEYS, ANSWER_KEYS))
  return None if question is None or answer is None or _first(raw, ROLE_KEYS)[0] in raw else (question, answer)


def _messages_of_columns(value: Any) -> Any:
  """The messages of {"from": [role, …], "value": [text, …]}, a sequence of objects of `datasets`; else `value`."""
  if not isinstance(value, Mapping) or not value or not all(isinstance(cells, list) for cells in value.values()):
    return value
  if len({len(cells) for cells in value.values()}) > 1:
    return value
  return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _first(raw: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, Any]:
  """The first of `keys` that `raw` has, and its value."""
  key = next((key for key in keys if key in raw), keys[0])
  return key, raw.get(key)


def _message(role: str, content: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
  """The message in the form that chat templates read. Raises RowProblem."""
  role = role.strip().lower()
  if role in CALLS:
    return {"role": "assistant", "content": None, "tool_calls": _tool_calls(content)}
  role = ROLES.get(role, role)
  if role not in KNOWN_ROLES:
    raise RowProblem(f"the role {role!r} is unknown; known are {', '.join((*KNOWN_ROLES, *ROLES, *CALLS))}")
  extra = {key: raw[key] for key in READ_KEYS if raw.get(key) not in (None, [])}
  calls = raw.get("tool_calls") or raw.get("function_call")
  if calls:
    extra["tool_calls"] = _tool_calls(calls)
  if content is None and not calls:
    raise RowProblem(f"a message with the role {role!r} has no content")
  if role == "tool" and isinstance(content, dict):
    content = json.dumps(content, ensure_ascii=False)
  text = None if content is None else text_of(content, f"a message with the role {role!r}")
  return {"role": role, "content": text, **extra}


def text_of(value: Any, name: str) -> str:
  """The text in `value`: a string, or a list of text parts. Raises RowProblem for anything else."""
  if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
    kinds = [part.get("type", "text") for part in value]
    other = next((kind for kind in kinds if kind != "text"), None)
    if other is not None:
      raise RowProblem(f"{name} has a part of type {other!r}, and only text is read")
    if not all(isinstance(part.get("text"), str) for part in value):
      raise RowProblem(f"{name} has a part without a text")
    value = "".join(part["text"] for part in value)
  if not isinstance(value, str):
    raise RowProblem(f"{name} has type {type(value).__name__}, expected a string")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise RowProblem(f"{name} contains an unpaired surrogate") from error
  return value


def parsed(value: Any) -> Any:
  """The value of a string that contains JSON, or a Python literal as pandas writes it; otherwise `value` itself."""
  if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
    return value
  try:
    return json.loads(value)
  except (ValueError, RecursionError):
    pass
  try:
    return ast.literal_eval(value.strip())
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: a list as a key
    return value


def messages_in(value: Any) -> list[Any] | None:
  """The messages in a cell: a list of objects with a role, or a string that contains one; None for anything else.

  A string may be JSON that a model should read or write, such as `[{"name": "Ann", "role": "engineer"}]`. It contains
  messages only if every object has a known role, a content, and no other keys than those of messages.
  """
  messages = parsed(value)
  if not (isinstance(messages, list) and messages and all(isinstance(item, Mapping) for item in messages)):
    return None
  if isinstance(value, str):
    return messages if all(map(_is_message, messages)) else None
  return messages if _first(messages[0], ROLE_KEYS)[0] in messages[0] else None


def _is_message(item: Mapping[str, Any]) -> bool:
  """Whether an object has a known role, a content or calls, and only keys that messages have."""
  role = _first(item, ROLE_KEYS)[1]
  has_known_role = isinstance(role, str) and role.strip().lower() in {*KNOWN_ROLES, *ROLES, *CALLS}
  contents = {*CONTENT_KEYS, "tool_calls", "function_call"}
  known = {*ROLE_KEYS, *contents, *READ_KEYS, *WEIGHT_KEYS}
  return has_known_role and not contents.isdisjoint(item) and known.issuperset(item)


def _tool_calls(value: Any) -> list[dict[str, Any]]:
  """Tool calls with their arguments as objects, because templates convert them to JSON. Raises RowProblem."""
  calls = parsed(value)
  calls = calls if isinstance(calls, list) else [calls]
  found = []
  for call in calls:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
      raise RowProblem("a tool call has no function name")
    arguments = parsed(next((function[key] for key in ARGUMENT_KEYS if key in function), {}))
    extra = {"id": call["id"]} if "id" in call else {}
    found.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
  return found


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
  """The tools in a cell: a list of JSON schemas, or a string that contains one. Raises RowProblem."""
  tools = parsed(value)
  if not tools:
    return ()
  if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
    raise RowProblem("the tools are not a list of objects")
  return tuple(tool if {"function", "type"} & tool.keys() else {"type": "function", "function": tool} for tool in tools)


def history_of(value: Any) -> list[tuple[str, str]]:
  """Earlier questions and answers: a list of pairs. Raises RowProblem."""
  pairs = parsed(value) or []
  if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
    raise RowProblem("the history is not a list of [question, answer]")
  return [(text_of(question, "a question"), text_of(answer, "an answer")) for question, answer in pairs]
