"""Reads the columns of a row: it becomes a document, or is skipped with a reason.

Columns are found by their names, row by row, unless `data.columns` names them. Columns that are not read are listed in
`Document.unread`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lora_exp.data.documents import Conversation, Document, Skipped
from lora_exp.data.formats.columns import column_of, found_roles, given_roles
from lora_exp.data.formats.data_files import SPLITS
from lora_exp.data.formats.message_forms import REASONING, Turns, history_of, messages_in, parsed, text_of, tools_of
from lora_exp.data.formats.row import Row, RowProblem, excerpt

LONGEST = 2**25  # characters of a row; a longer one is skipped, because it would need gigabytes of memory
SPLIT_COLUMNS = ("split", "set", "partition", "subset")
HELD_OUT_SPLITS = {word for word, split in SPLITS.items() if split != "train"}
LEARNED_ROLES = ("messages", "prompt", "response", "text")


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
      return given_roles(names, tuple(self.columns.items()), self.optional)
    texts = frozenset(name for name in names if _is_plain_text(fields[name]))
    messages = column_of("messages", names)
    if messages is not None and fields[messages] is None:  # formats with one set of columns for all rows
      with suppress(RowProblem):
        others = tuple(name for name in names if name != messages)
        return found_roles(others, texts, self.prompt_field, self.response_field)
    return found_roles(names, texts, self.prompt_field, self.response_field)

  def _document(self, row: Row, key: int) -> Document:
    try:
      roles = self.roles(row.fields)
    except RowProblem as problem:
      raise RowProblem(f"{problem}{row.hint}") from problem
    cells = {role: row.fields[column] for role, column in roles.items()}
    read = set(roles.values())
    others = {name: value for name, value in row.fields.items() if name not in read and _is_filled(value)}
    unread = [_unread_column(name, value) for name, value in others.items()] + list(row.doubts)
    if "messages" in cells or _is_conversation(cells):
      text, prompt, conversation = "", "", _conversation(cells, roles, unread)
    else:
      (text, prompt), conversation = _texts(cells, unread), None
      unread += [*_blank("text" if "text" in cells else "response", text), *_blank("prompt", prompt, "prompt" in cells)]
    choices = _choices(cells)
    if choices and text not in choices:
      unread.append("the answer is not one of the choices, so the choices are not read")
    columns = tuple(roles[role] for role in LEARNED_ROLES if role in roles)
    document = Document(
      key, text, prompt, row.read, conversation, tuple(unread), _without_directory(row.where),
      choices if text in choices else (), columns)
    if document.characters > LONGEST:
      raise RowProblem(f"the row has more than {LONGEST:,} characters; split it")
    return document


def _unread_column(name: str, value: Any) -> str:
  """The message about a column that is not read, which may say that its row belongs to another split."""
  message = f"the column {name!r} is not read"
  if name.strip().lower() in SPLIT_COLUMNS and str(value).strip().lower() in HELD_OUT_SPLITS:
    message += f", so its rows of the split {value!r} are not held out"
  return message


def _blank(name: str, text: str, expected: bool = True) -> Iterator[str]:
  """The message about an `expected` text that is empty or contains only white space."""
  if not text and expected:
    yield f"the {name} is empty" + (", and only its end is learned" if name == "response" else "")
  elif text and not text.strip():
    yield f"the {name} contains only white space"


def _without_directory(where: str) -> str:
  """'pairs.jsonl, line 7'. Cached messages show no directory, because the same content may have another path later."""
  return os.path.basename(where)


def _is_plain_text(value: Any) -> bool:
  """Whether `value` is a string that does not begin like a list."""
  return isinstance(value, str) and not value.lstrip().startswith("[")


def _empty_turn(message: Mapping[str, Any]) -> str | None:
  """The message about a turn without a text, tool calls or reasoning, or None."""
  if any(_is_filled(message.get(key)) for key in ("tool_calls", *REASONING)):
    return None
  words = {"assistant": "an answer is empty, and only its end is learned", "user": "a user turn is empty"}
  return None if str(message["content"] or "").strip() else words.get(message["role"])


def _has_two_system_prompts(system: Any, first: Mapping[str, Any]) -> bool:
  """Whether the cell `system` differs from the content of `first`, the first message of the conversation."""
  return _is_filled(system) and first["content"] != system


def _is_filled(value: Any) -> bool:
  return value is not None and value != "" and value != [] and value != {}


def _is_conversation(cells: Mapping[str, Any]) -> bool:
  """Whether a row with a prompt and a response has messages, a system prompt, a history or tools."""
  return any(messages_in(cells.get(role)) is not None for role in ("prompt", "response")) or any(
    _is_filled(cells.get(role)) for role in ("system", "history", "tools"))


def _texts(cells: Mapping[str, Any], unread: list[str]) -> tuple[str, str]:
  """(text, prompt) of a row of texts. Appends a message to `unread` if there are other responses."""
  if "text" in cells:
    if cells["text"] in (None, ""):
      raise RowProblem("the text is empty")
    return text_of(cells["text"], "the text"), ""
  texts = _several_texts(cells["response"])
  if texts and len(set(texts)) > 1:
    unread.append("the response is a list of texts, and only the first is read")
  return _response_text(cells), _prompt_text(cells)


def _several_texts(value: Any) -> list[str] | None:
  """The texts in a list, or in SQuAD's {"text": [text, …]}; None for any other value."""
  texts = value.get("text") if isinstance(value, dict) else value
  if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
    return texts
  return None


def _choices(cells: Mapping[str, Any]) -> tuple[str, ...]:
  """The choices of a multiple-choice question: a list of texts, or {"text": [text, …]}; () if there are none."""
  texts = _several_texts(parsed(cells.get("choices")))
  return tuple(texts) if texts and len(texts) > 1 else ()


def _prompt_text(cells: Mapping[str, Any]) -> str:
  """The prompt, and on the next line its input, if there is one."""
  prompt = "" if cells.get("prompt") is None else text_of(cells["prompt"], "the prompt")
  if not _is_filled(cells.get("input")):
    return prompt
  return f"{prompt}\n{text_of(cells['input'], 'the input')}" if prompt else text_of(cells["input"], "the input")


def _response_text(cells: Mapping[str, Any]) -> str:
  answer, choices = cells["response"], _choices(cells)
  if choices and isinstance(answer, int) and not isinstance(answer, bool):
    if not 0 <= answer < len(choices):
      raise RowProblem(f"the answer is {answer}, and the choices are 0 to {len(choices) - 1}")
    return choices[answer]
  texts = _several_texts(answer)
  if answer is None or texts == []:
    raise RowProblem("there is no response")
  if texts:
    return text_of(texts[0], "the response")
  return text_of(cells["response"], "the response")


def _conversation(cells: Mapping[str, Any], roles: Mapping[str, str], unread: list[str]) -> Conversation:
  """The conversation of a row. Appends messages about what is not read, or not learned, to `unread`."""
  turns = Turns()
  prompt_messages = 0
  if "messages" in cells:
    turns.add_all(cells["messages"])
  else:
    for question, answer in history_of(cells.get("history")):
      turns.add_text("user", question)
      turns.add_text("assistant", answer)
    prompt_messages = _add_pair(turns, cells)
  if _add_system(turns, cells.get("system")):
    prompt_messages += 1 if prompt_messages else 0
  if not any(message["role"] == "assistant" for message in turns.messages):
    raise RowProblem("there is no assistant turn")
  unread += [f"the key {name!r} of messages is not read" for name in turns.unread]
  unread += ["some turns have weight 0"] if turns.zero_weight else []
  unread += dict.fromkeys(filter(None, map(_empty_turn, turns.messages)))
  if _has_two_system_prompts(cells.get("system"), turns.messages[0]):
    unread.append(f"the column {roles['system']!r} is not read, because the messages begin with a system turn")
  if turns.messages[-1]["role"] == "user":
    unread.append("the last turn is a user turn without an answer")
  variables = parsed(cells.get("variables")) or {}
  if not isinstance(variables, dict):
    raise RowProblem(f"the column {roles['variables']!r} is not an object")
  return Conversation(tuple(turns.messages), prompt_messages, frozenset(turns.zero_weight),
                      tools_of(cells.get("tools")), variables)


def _add_system(turns: Turns, system: Any) -> bool:
  """Puts the system prompt `system`, if there is one, before `turns` unless they begin with one."""
  if not _is_filled(system) or (turns.messages and turns.messages[0]["role"] in ("system", "developer")):
    return False
  turns.messages.insert(0, {"role": "system", "content": text_of(system, "the system prompt")})
  turns.zero_weight = {index + 1 for index in turns.zero_weight}
  return True


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
