"""What the columns of a row mean: which contain the prompt, the response, the messages, or a text.

Columns are found by their names, row by row, unless `data.columns` names them. A row becomes a document, or is skipped
with a reason. Columns that are not read are listed in `Document.unread`.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lora_exp.config.errors import did_you_mean
from lora_exp.data.formats.message_forms import Turns, history_of, messages_in, parsed, text_of, tools_of
from lora_exp.data.formats.row import Row, RowProblem, excerpt
from lora_exp.data.sources.source import Conversation, Document, Skipped

# role -> possible names of its column; the first that a row has is used. Case is ignored.
NAMES: dict[str, tuple[str, ...]] = {
  "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
  "prompt": ("prompt", "instruction", "question", "query", "problem", "input", "user"),
  "input": ("input", "context"),
  "response": ("response", "completion", "output", "answer", "solution", "target", "assistant"),
  "system": ("system", "system_prompt"),
  "history": ("history",),
  "tools": ("tools", "functions"),
  "variables": ("chat_template_kwargs",),
  "text": ("text", "content", "document"),
}
LAYOUTS: dict[str, Mapping[str, str]] = {  # data.format -> columns by role
  "messages": {"messages": "messages", "tools": "tools"},
  "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
  "alpaca": {"prompt": "instruction", "input": "input", "response": "output", "system": "system", "history": "history"},
  "prompt_response": {"prompt": "prompt", "response": "response"},
  "prompt_completion": {"prompt": "prompt", "response": "completion", "tools": "tools"},
  "question_answer": {"prompt": "question", "response": "answer"},
}

NAME_COLUMNS = " (data.columns={prompt: NAME, response: NAME} names them)"


@dataclass(frozen=True)
class Layout:
  """How the columns of rows are read."""

  columns: Mapping[str, str] | None = None  # role -> column; None: found by name
  prompt_field: str = "prompt"  # data.prompt_field of older commands; "prompt": found by name
  response_field: str = "response"  # data.response_field, likewise
  optional: frozenset[str] = field(default=frozenset())  # roles in `columns` that a row may lack

  def document(self, row: Row, key: int) -> Document | Skipped:
    """The document of a row; Skipped if it cannot be used."""
    try:
      if row.problem:
        raise RowProblem(row.problem)
      return self._document(row, key)
    except RowProblem as problem:
      detail = row.detail or (excerpt(dict(row.fields)) if row.fields else "")
      where = _without_directory(row.where)
      return Skipped(str(problem), f"{where}: {detail}" if detail else where, read=row.read)

  def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
    """The column of each role in a row. Raises RowProblem if nothing in the row can be learned."""
    names = tuple(fields)
    if self.columns is not None:
      return _given_roles(names, tuple(self.columns.items()), self.optional)
    texts = frozenset(name for name in names if _is_plain_text(fields[name]))
    messages = _column_of("messages", names)
    if messages is not None and fields[messages] is None:  # formats with one set of columns for all rows
      with suppress(RowProblem):
        others = tuple(name for name in names if name != messages)
        return _found_roles(others, texts, self.prompt_field, self.response_field)
    return _found_roles(names, texts, self.prompt_field, self.response_field)

  def _document(self, row: Row, key: int) -> Document:
    roles = self.roles(row.fields)
    cells = {role: row.fields[column] for role, column in roles.items()}
    read = set(roles.values())
    others = [name for name, value in row.fields.items() if name not in read and _is_filled(value)]
    unread = [f"the column {name!r} is not read" for name in others]
    if "messages" not in cells and not _is_conversation(cells):
      text, prompt = _texts(cells)
      unread += [] if text else ["the response is empty, and only its end is learned"]
      unread += ["the prompt is empty"] if "prompt" in cells and not prompt else []
      return Document(key, text, prompt, row.read, None, tuple(unread), _without_directory(row.where))
    conversation, unread_keys = _conversation(cells)
    unread += [f"the key {name!r} of messages is not read" for name in unread_keys]
    unread += ["some turns have weight 0"] if conversation.unlearned else []
    if any(map(_is_empty_answer, conversation.messages)):
      unread.append("an answer is empty, and only its end is learned")
    if _has_two_system_prompts(cells.get("system"), conversation.messages[0]):
      unread.append(f"the column {roles['system']!r} is not read, because the messages begin with a system turn")
    return Document(key, "", "", row.read, conversation, tuple(unread), _without_directory(row.where))


def _without_directory(where: str) -> str:
  """'pairs.jsonl, line 7'. Cached messages show no directory, because the same content may have another path later."""
  return os.path.basename(where)


def _is_plain_text(value: Any) -> bool:
  """Whether `value` is a string that does not begin like a list."""
  return isinstance(value, str) and not value.lstrip().startswith("[")


def _is_empty_answer(message: Mapping[str, Any]) -> bool:
  return message["role"] == "assistant" and not message["content"] and "tool_calls" not in message


def _has_two_system_prompts(system: Any, first: Mapping[str, Any]) -> bool:
  """Whether the cell `system` differs from the content of `first`, the first message of the conversation."""
  return _is_filled(system) and first["content"] != system


def _is_filled(value: Any) -> bool:
  return value is not None and value != "" and value != [] and value != {}


@lru_cache(maxsize=1024)
def _given_roles(
  names: tuple[str, ...], columns: tuple[tuple[str, str], ...], optional: frozenset[str]
) -> Mapping[str, str]:
  """Role -> column for a row with the columns `names`. `columns`: the given pairs (role, column)."""
  for role, column in columns:
    if column not in names and role not in optional:
      raise RowProblem(_no_column(column, names, advice=""))
  return {role: column for role, column in columns if column in names}


@lru_cache(maxsize=1024)
def _found_roles(
  names: tuple[str, ...], texts: frozenset[str], prompt_field: str, response_field: str
) -> Mapping[str, str]:
  """Role -> column for a row with the columns `names`. `texts`: the columns whose cells are plain text."""
  given = {role: name for role, name in (("prompt", prompt_field), ("response", response_field)) if name != role}
  for name in given.values():
    if name not in names:
      raise RowProblem(_no_column(name, names))
  if given.get("response") in NAMES["text"] and "prompt" not in given and "prompt" not in names:
    return {"text": given["response"]}
  by_name = {role: _column_of(role, names) for role in NAMES}
  found = {role: name for role, name in by_name.items() if name is not None} | given
  if "messages" in found and found["messages"] not in texts and not given:
    return {role: found[role] for role in ("messages", "system", "tools", "variables") if role in found}
  if found.get("input") == found.get("prompt"):
    found.pop("input", None)
  if "response" in found and "prompt" in found:
    return {role: name for role, name in found.items() if role not in ("messages", "text")}
  if "text" in found and "response" not in found:
    return {"text": found["text"]}
  if {"chosen", "rejected"} <= set(names):
    columns = "text: chosen" if "prompt" not in found else f"prompt: {found['prompt']}, response: chosen"
    columns = columns if "chosen" in texts else "messages: chosen"
    raise RowProblem("chosen and rejected are a preference pair and not an example; "
                     f"data.columns={{{columns}}} learns the chosen one")
  raise RowProblem(_no_column(prompt_field if "response" in found else response_field, names))


def _column_of(role: str, names: Sequence[str]) -> str | None:
  """The column of `role` among `names`, or None."""
  lower = {name.strip().lower(): name for name in reversed(names)}
  return next((lower[name] for name in NAMES[role] if name in lower), None)


def _no_column(column: str, names: Sequence[str], advice: str = NAME_COLUMNS) -> str:
  """The message for a row without `column`. `names`: the columns that it has."""
  shown = ", ".join(map(repr, names)) or "none"
  same = next((name for name in names if name.lower() == column.lower()), None)
  hint = did_you_mean(column, names) if same is None else f"; did you mean {same}?"
  return f"there is no column {column!r}; the columns are {shown}{hint}{advice}"


def _is_conversation(cells: Mapping[str, Any]) -> bool:
  """Whether a row with a prompt and a response has messages, a system prompt, a history or tools."""
  return any(messages_in(cells.get(role)) is not None for role in ("prompt", "response")) or any(
    _is_filled(cells.get(role)) for role in ("system", "history", "tools"))


def _texts(cells: Mapping[str, Any]) -> tuple[str, str]:
  """(text, prompt) of a row of texts."""
  if "text" in cells:
    if cells["text"] in (None, ""):
      raise RowProblem("the text is empty")
    return text_of(cells["text"], "the text"), ""
  return _response_text(cells), _prompt_text(cells)


def _prompt_text(cells: Mapping[str, Any]) -> str:
  """The prompt, and on the next line its input, if there is one."""
  prompt = "" if cells.get("prompt") is None else text_of(cells["prompt"], "the prompt")
  if not _is_filled(cells.get("input")):
    return prompt
  return f"{prompt}\n{text_of(cells['input'], 'the input')}" if prompt else text_of(cells["input"], "the input")


def _response_text(cells: Mapping[str, Any]) -> str:
  if cells["response"] is None:
    raise RowProblem("there is no response")
  return text_of(cells["response"], "the response")


def _conversation(cells: Mapping[str, Any]) -> tuple[Conversation, list[str]]:
  """The conversation of a row, and the keys of its messages that are not read."""
  turns = Turns()
  prompt_messages = 0
  if "messages" in cells:
    turns.add_all(cells["messages"])
  else:
    for question, answer in history_of(cells.get("history")):
      turns.add_text("user", question)
      turns.add_text("assistant", answer)
    prompt_messages = _add_pair(turns, cells)
  system = cells.get("system")
  if _is_filled(system) and not (turns.messages and turns.messages[0]["role"] in ("system", "developer")):
    turns.messages.insert(0, {"role": "system", "content": text_of(system, "the system prompt")})
    turns.unlearned = {index + 1 for index in turns.unlearned}
    prompt_messages += 1 if prompt_messages else 0
  if not any(message["role"] == "assistant" for message in turns.messages):
    raise RowProblem("no turn of the assistant")
  variables = parsed(cells.get("variables")) or {}
  conversation = Conversation(tuple(turns.messages), prompt_messages, frozenset(turns.unlearned),
                              tools_of(cells.get("tools")), variables if isinstance(variables, dict) else {})
  return conversation, list(turns.unread)


def _add_pair(turns: Turns, cells: Mapping[str, Any]) -> int:
  """Adds a prompt and its response, each a text or a list of messages.

  Returns the number of messages of the prompt if either is a list of messages, as in TRL; else 0.
  """
  prompt, response = messages_in(cells.get("prompt")), messages_in(cells["response"])
  if prompt is not None:
    turns.add_all(prompt)
  else:
    text = _prompt_text(cells)
    if text:
      turns.add_text("user", text)
  count = len(turns.messages)
  if response is not None:
    turns.add_all(response)
  else:
    turns.add_text("assistant", _response_text(cells))
  return 0 if prompt is None and response is None else count
