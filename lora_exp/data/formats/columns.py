"""Which column of a row has which role: prompt, response, messages, text, and others. Columns are found by name."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from lora_exp.config.errors import did_you_mean, nearest
from lora_exp.data.formats.row import RowProblem

# role -> possible names of its column; the first that a row has is used. Case is ignored.
NAMES: dict[str, tuple[str, ...]] = {
  "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "contents"),
  "prompt": ("prompt", "instruction", "question", "query", "problem", "input", "user"),
  "input": ("input", "context"),
  "response": ("response", "completion", "output", "answer", "solution", "target", "assistant"),
  "choices": ("choices", "options", "endings"),
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
  "multiple_choice": {"prompt": "question", "choices": "choices", "response": "answer"},
}

NAME_COLUMNS = " (data.columns={prompt: NAME, response: NAME} or {messages: NAME} names them)"


@lru_cache(maxsize=1024)
def given_roles(
  names: tuple[str, ...], columns: tuple[tuple[str, str], ...], optional: frozenset[str]
) -> Mapping[str, str]:
  """Role -> column for a row with the columns `names`. `columns`: the given pairs (role, column)."""
  for role, column in columns:
    if column not in names and role not in optional:
      raise RowProblem(_no_column(column, names, advice=""))
  return {role: column for role, column in columns if column in names}


@lru_cache(maxsize=1024)
def found_roles(
  names: tuple[str, ...], texts: frozenset[str], prompt_field: str, response_field: str
) -> Mapping[str, str]:
  """Role -> column for a row with the columns `names`. `texts`: the columns whose cells are plain text."""
  given = {role: name for role, name in (("prompt", prompt_field), ("response", response_field)) if name != role}
  for name in given.values():
    if name not in names:
      raise RowProblem(_no_column(name, names))
  if given.get("response") in NAMES["text"] and "prompt" not in given and "prompt" not in names:
    return {"text": given["response"]}
  by_name = {role: column_of(role, names) for role in NAMES}
  found = {role: name for role, name in by_name.items() if name is not None} | given
  if "messages" in found and found["messages"] not in texts and not given:
    return {role: found[role] for role in ("messages", "system", "tools", "variables") if role in found}
  if found.get("input") == found.get("prompt"):
    found.pop("input", None)
  if "response" in found and "prompt" in found:
    return {role: name for role, name in found.items() if role not in ("messages", "text")}
  if "text" in found and "response" not in found:
    _check_not_a_message(names)
    return {"text": found["text"]}
  if {"chosen", "rejected"} <= set(names):
    raise RowProblem("chosen and rejected are a preference pair and not an example; "
                     f"data.columns={{{_chosen_columns(found, texts)}}} learns the chosen one")
  raise RowProblem(_no_column(prompt_field if "response" in found else response_field, names))


def _chosen_columns(found: Mapping[str, str], texts: frozenset[str]) -> str:
  """The setting that reads the chosen answer of a preference pair.

  If `chosen` has messages, it repeats the question where the prompt is a text, as in UltraFeedback, and is only the
  answer where the prompt has messages too, as in TRL's examples.
  """
  prompt = found.get("prompt")
  chosen_is_text = "chosen" in texts
  if prompt is None:
    return "text: chosen" if chosen_is_text else "messages: chosen"
  if chosen_is_text or prompt not in texts:
    return f"prompt: {prompt}, response: chosen"
  return "messages: chosen"


def _check_not_a_message(names: Sequence[str]) -> None:
  """Raises RowProblem if a row with a text is one message, as in the files of OpenAssistant."""
  role = next((name for name in names if name.lower() == "role"), None)
  if role is not None:
    raise RowProblem(f"a row is one message, with its {role!r}, and not a conversation; write one row for each "
                     "conversation, with a list 'messages' (data.columns={text: NAME} reads each message as a text)")


def column_of(role: str, names: Sequence[str]) -> str | None:
  """The column of `role` among `names`, or None."""
  lower = {name.strip().lower(): name for name in reversed(names)}
  return next((lower[name] for name in NAMES[role] if name in lower), None)


def _no_column(column: str, names: Sequence[str], advice: str = NAME_COLUMNS) -> str:
  """The message for a row without `column`. `names`: the columns that it has."""
  shown = ", ".join(map(repr, names)) or "none"
  same = next((name for name in names if name.lower() == column.lower()), None)
  usual = NAMES.get(column, ())  # its other usual names: `answers` is near to `answer`, and so a response
  near = next((name for name in names if nearest(name.lower(), usual, similarity=0.8)), None)
  if same is not None or near is not None:
    hint = f"; did you mean {same or near}?"
  else:
    hint = did_you_mean(column, names)
  return f"there is no column {column!r}; the columns are {shown}{hint}{advice}"
