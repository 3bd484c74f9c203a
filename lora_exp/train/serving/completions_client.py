"""Log-probabilities from a server with OpenAI's HTTP interface: llama.cpp, vLLM, Ollama, LM Studio and others.

Prompts are sent as token ids. A server that returns the log-probabilities of the prompt (`echo`, vLLM) gets one request
per continuation. Any other server gets one request per token, which is looked up among the most likely tokens.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any, NamedTuple

from lora_exp.config import InputError
from lora_exp.runtime import console
from lora_exp.runtime.foreign_files import damage_reported
from lora_exp.train.serving.card_file import Row

TOP = 20  # most likely tokens to ask for, vLLM's limit
LONGEST_REPLY = 2**26  # bytes
TIMEOUT = 300  # seconds for an answer
ANSWERS = "answers of OpenAI's interface"
TOKEN_ID = "token_id:"  # before the ids that vLLM gives instead of texts
MISMATCH = 0.05  # smallest difference of the first answer's log-probability that counts as another prompt, in nats


class FirstToken(NamedTuple):
  """The first token of an answer."""

  text: str
  logprob: float


class CompletionsClient:
  """Requests to one model of a server. `extra` are fields that every request contains."""

  def __init__(self, url: str, model: str | None, extra: Mapping[str, Any] | None = None):
    self.root = url.rstrip("/").removesuffix("/v1")
    self.model, self.extra = model, dict(extra or {})
    self._echoes: bool | None = None

  def logprobs(self, rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> list[list[float]]:
    """The log-probability of every token of the continuations; NaN if the server does not return it.

    `texts` are the texts of these tokens, for servers that return no ids.
    """
    values = []
    with console.progress("ask the server", len(rows), "prompts") as bar:
      for (prompt, answer), pieces in zip(rows, texts, strict=True):
        values.append(self._continuation(prompt, answer, pieces))
        bar.advance()
    return values

  def _continuation(self, prompt: list[int], answer: list[int], pieces: Sequence[str]) -> list[float]:
    if self._echoes is not False:
      echoed = self._echoed(prompt, answer)
      self._echoes = echoed is not None
      if echoed is not None:
        return echoed
    return [self._token([*prompt, *answer[:n]], answer[n], pieces[n]) for n in range(len(answer))]

  def _echoed(self, prompt: list[int], answer: list[int]) -> list[float] | None:
    """The log-probabilities of the prompt's own tokens, or None if the server does not return them."""
    ids = [*prompt, *answer]
    fields = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1}
    try:
      choice = self.completion(fields)
    except InputError:
      return None
    with damage_reported(self.root, ANSWERS):
      values = (choice.get("logprobs") or {}).get("token_logprobs")
      if not isinstance(values, list) or len(values) < len(ids):
        return None
      return [math.nan if x is None else float(x) for x in values[len(prompt) : len(ids)]]

  def _token(self, prompt: list[int], token: int, text: str) -> float:
    """The log-probability of `token` after `prompt`; NaN if it is not among the most likely ones."""
    choice = self.completion({"prompt": prompt, "max_tokens": 1, "logprobs": TOP, "temperature": 0})
    with damage_reported(self.root, ANSWERS):
      return _lookup(choice.get("logprobs") or {}, token, text)

  def completion(self, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of /v1/completions. Raises InputError if the server refuses or gives none."""
    return self._first_choice(self._post("/v1/completions", fields))

  def first_of_text(self, prompt: str) -> FirstToken | None:
    """The most likely first token after a prompt given as text, which the server tokenises."""
    choice = self.completion({"prompt": prompt, "max_tokens": 1, "logprobs": TOP, "temperature": 0})
    with damage_reported(self.root, ANSWERS):
      return _first(choice.get("logprobs") or {})

  def first_of_chat(self, prompt: str) -> FirstToken | None:
    """The most likely first token of the answer to a user's message, which the server renders with its template.

    Raises InputError if the server has no chat interface.
    """
    fields = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1, "logprobs": True,
              "top_logprobs": 5, "temperature": 0}
    choice = self._first_choice(self._post("/v1/chat/completions", fields))
    with damage_reported(self.root, ANSWERS):
      return _first(choice.get("logprobs") or {})

  def _first_choice(self, reply: Mapping[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
      raise InputError(f"{self.root} answers without choices; is it a server with OpenAI's interface?")
    return choices[0]

  def _post(self, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    body = {**self.extra, **fields}
    if self.model is not None:
      body["model"] = self.model
    content_type = {"Content-Type": "application/json"}
    request = urllib.request.Request(self.root + path, json.dumps(body).encode(), content_type)  # noqa: S310
    try:
      with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:  # noqa: S310 - checks.py allows http and https
        content = json.loads(reply.read(LONGEST_REPLY))
    except urllib.error.HTTPError as error:
      said = error.read(300).decode(errors="replace").strip()
      raise InputError(f"{self.root}{path}: HTTP {error.code}: {said}") from None
    except (OSError, ValueError, RecursionError, HTTPException) as error:
      raise InputError(f"{self.root}{path}: no answer ({error}); start the server, or correct verify.url") from None
    if not isinstance(content, dict):
      raise InputError(f"{self.root}{path} does not answer with a JSON object")
    return content


def _lookup(logprobs: Mapping[str, Any], token: int, text: str) -> float:
  """The log-probability of a token in an answer of either layout, by id or else by text."""
  if "content" in logprobs:  # the layout of chat completions, which llama.cpp uses everywhere
    content = logprobs["content"] or [{}]
    candidates = content[0].get("top_logprobs") or content[:1]
    by_id = {entry["id"]: entry.get("logprob") for entry in candidates if "id" in entry}
    by_text = {entry.get("token"): entry.get("logprob") for entry in candidates}
  else:
    top = (logprobs.get("top_logprobs") or [{}])[0] or {}
    by_id = {int(name.removeprefix(TOKEN_ID)): x for name, x in top.items() if name.startswith(TOKEN_ID)}
    by_text = dict(top)
  value = by_id.get(token) if by_id else by_text.get(text)  # several ids may have the same text
  return float(value) if isinstance(value, int | float) else math.nan


def _first(logprobs: Mapping[str, Any]) -> FirstToken | None:
  """The token that was generated first."""
  if "content" in logprobs:
    content = logprobs["content"] or []
    return FirstToken(str(content[0].get("token")), float(content[0]["logprob"])) if content else None
  tokens, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
  return FirstToken(str(tokens[0]), float(values[0])) if tokens and values else None


def template_problem(client: CompletionsClient, card: Mapping[str, Any]) -> str | None:
  """How the server renders or tokenises the card's prompts differently, or None.

  The first token of each answer must be as likely as after the card's token ids at the same server.
  """
  for prompt in card["prompts"]:
    choice = client.completion({"prompt": prompt["ids"], "max_tokens": 1, "logprobs": TOP, "temperature": 0})
    with damage_reported(client.root, ANSWERS):
      expected = _first(choice.get("logprobs") or {})
    try:
      given = client.first_of_chat(prompt["prompt"]) if card["chat"] else client.first_of_text(prompt["rendered"])
    except InputError as error:
      return f"the prompts cannot be compared: {error}"
    if expected is None or given is None:
      continue
    named = TOKEN_ID in expected.text or TOKEN_ID in given.text  # one interface gives ids, and the other texts
    if abs(expected.logprob - given.logprob) > MISMATCH or not named and expected.text != given.text:
      how = "chat template" if card["chat"] else "tokenizer (or the token that begins a text)"
      return (f"another {how}: the first token of the answer to {prompt['prompt']!r} is {given.text!r} "
              f"({given.logprob:.3f} nats) instead of {expected.text!r} ({expected.logprob:.3f})")
  return None
