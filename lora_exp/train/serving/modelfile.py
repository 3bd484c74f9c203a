"""The Modelfile with which Ollama creates a model from a GGUF file, and its template in Go's syntax."""

import json
from pathlib import Path

from lora_exp.config import InputError
from lora_exp.data.chats.chat import GuardedChat
from lora_exp.data.tokenization import Tokenizer
from lora_exp.train.sampling.prompt_encoding import PromptFormat

MODELFILE = "Modelfile"
# The lines of lora_exp/data/chats/plain_turns.py
LINES = ('{{ if .System }}System: {{ .System }}\n{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}User: '
         '{{ .Content }}\n{{ else if eq .Role "assistant" }}Assistant: {{ .Content }}END\n{{ end }}{{ end }}Assistant:')
SYSTEM, USER, ANSWER, SECOND = "\ue001", "\ue002", "\ue003", "\ue004"  # contents, which no template has


def modelfile(tokenizer: Tokenizer, model: str, adapter: str | None, format: PromptFormat) -> str:
  """The content of a Modelfile for prompts in `format`.

  `model` and `adapter` are paths as Ollama resolves them, from the Modelfile. If prompts are turns of the tokenizer's
  chat template, it is written if Go's syntax can express it, and otherwise left to Ollama.
  """
  lines = [f"FROM {model}"]
  if adapter is not None:
    lines.append(f"ADAPTER {adapter}")
  template = _template(tokenizer, format)
  if template is not None:
    lines.append(f'TEMPLATE """{template}"""')
  names = {i: token for token, i in tokenizer.special_tokens.items()}
  lines += [f"PARAMETER stop {json.dumps(names[i], ensure_ascii=False)}" for i in tokenizer.stops if i in names]
  return "\n".join(lines) + "\n"


def _template(tokenizer: Tokenizer, format: PromptFormat) -> str | None:
  """The template of prompts in `format`; None if it is left to Ollama."""
  if format.chat:
    return go_template(tokenizer)
  if format.lines:
    names = {i: token for token, i in tokenizer.special_tokens.items()}
    return LINES.replace("END", names[tokenizer.eot])
  return "{{ .Prompt }}" + format.separator


def go_template(tokenizer: Tokenizer) -> str | None:
  """The chat template in Go's syntax; None if it is not a plain sequence of turns.

  The parts are read from rendered conversations, and must compose a longer one. A system message that the template
  itself adds is kept.
  """
  try:
    alone = _rendered(tokenizer, [("user", USER)], True)
    system = _rendered(tokenizer, [("system", SYSTEM), ("user", USER)], True)
    several = _rendered(tokenizer, [("user", USER), ("assistant", ANSWER), ("user", SECOND)], True)
  except InputError:
    return None
  if USER not in alone or not all(mark in several for mark in (USER, ANSWER, SECOND)):
    return None
  head, tail = alone.split(USER, 1)
  after_user, rest = several.split(USER, 1)[1].split(ANSWER, 1)
  between = rest.split(SECOND, 1)[0]
  if any('"""' in part or "{{" in part for part in (head, tail, after_user, between)):
    return None
  # A turn of the user begins alike everywhere; what precedes the first one is the start of the conversation.
  turn = _common_end(head, between)
  start, answer_end = head[: len(head) - len(turn)], between[: len(between) - len(turn)]
  if tail != after_user or several != head + USER + tail + ANSWER + answer_end + turn + SECOND + tail:
    return None
  if SYSTEM in system and system.endswith(turn + USER + tail):
    before, _, after = system[: -len(turn + USER + tail)].partition(SYSTEM)
    start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"
  asked = f'{{{{ if eq .Role "user" }}}}{turn}{{{{ .Content }}}}{tail}'
  answered = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{answer_end}{{{{ end }}}}'
  return f"{start}{{{{ range .Messages }}}}{asked}{answered}{{{{ end }}}}"


def _common_end(a: str, b: str) -> str:
  """The longest common end of two texts."""
  count = 0
  while count < min(len(a), len(b)) and a[-count - 1] == b[-count - 1]:
    count += 1
  return a[len(a) - count :]


def _rendered(tokenizer: Tokenizer, turns: list[tuple[str, str]], generation_prompt: bool) -> str:
  """The rendered text of `turns` (role, content)."""
  chat = GuardedChat(tokenizer, [{"role": role, "content": content} for role, content in turns])
  return chat.rendered(chat.messages, generation_prompt).replace(chat.guard, "")


def write_modelfile(directory: Path, content: str) -> None:
  """Writes the Modelfile in `directory`."""
  (directory / MODELFILE).write_text(content, encoding="utf-8")
