"""The answer card of an exported adapter: log-probabilities of fixed continuations, of base and adapted model.

    answers.json
      chat       whether the prompts are turns of the chat template
      prompts    text, rendered text, token ids of the prompt and of its greedy continuation (by the adapted model)
      logprobs   name of a model -> nats of every token of the continuations: base, adapted, and `scale F`: the update
                 multiplied by F, `without X`: an adapter that lacks some modules

The models other than base and adapted are those that a server computes if it loads the adapter incorrectly.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.runtime.json_files import read_json_object

CARD = "answers.json"
VERSION = 1
BASE, ADAPTED = "base", "adapted"
WITHOUT = "without "  # before the name of a part, for the adapter without it
Row = tuple[list[int], list[int]]  # token ids of a prompt and of its continuation


def read_card(directory: Path) -> dict[str, Any]:
  """The answer card in `directory`. Raises InputError if there is none, or if it is not one of this version."""
  file = directory / CARD
  if not file.is_file():
    raise InputError(f"{directory} has no {CARD}; give a directory that task=export wrote with export.answers=true")
  card = read_json_object(file)
  problem = _card_problem(card)
  if problem is not None:
    raise InputError(f"{file}: {problem}; export the adapter again")
  return card


def _card_problem(card: Mapping[str, Any]) -> str | None:
  """Why `card` is not an answer card, or None."""
  if card.get("version") != VERSION:
    return f"version {card.get('version')!r} is not {VERSION}"
  try:
    lengths = [len(prompt["continuation_ids"]) for prompt in card["prompts"]]
    models = card["logprobs"]
    complete = all([len(row) for row in models[name]] == lengths for name in models) and {BASE, ADAPTED} <= set(models)
    finite = all(isinstance(x, int | float) for rows in models.values() for row in rows for x in row)
    known = all(isinstance(i, int) for prompt in card["prompts"] for i in (*prompt["ids"], *prompt["continuation_ids"]))
  except (KeyError, TypeError):
    return "is not an answer card"
  return None if lengths and complete and finite and known else "has missing values"


def card_rows(card: Mapping[str, Any]) -> list[Row]:
  """The token ids of prompts and continuations."""
  return [(prompt["ids"], prompt["continuation_ids"]) for prompt in card["prompts"]]


def scale_name(factor: float) -> str:
  """The name of the model whose update is multiplied by `factor`."""
  return f"scale {factor:g}"


def scale_of(name: str) -> float | None:
  """The factor in a name of `scale_name`; None for other names."""
  kind, _, number = name.partition(" ")
  if kind != "scale":
    return None
  try:
    factor = float(number)
  except ValueError:
    return None
  return factor if math.isfinite(factor) else None
