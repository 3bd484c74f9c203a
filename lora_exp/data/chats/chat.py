"""Encodes prompts and answers with a model's chat template."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple

from lora_exp.config.errors import InputError
from lora_exp.data.chats.chat_template import ADVICE
from lora_exp.data.chats.guarded_chat import GuardedChat, Message, Segment, common_prefix_length, encode_segments
from lora_exp.data.chats.template_checks import Problems, TemplateCheck
from lora_exp.data.tokenization import Tokenizer

OPENINGS = "openings of answers"  # the unit of `missing_reason`


class Answer(NamedTuple):
  """A question and its answer as token ids."""

  prompt: list[int]
  answer: list[int]  # including the end of its turn
  problems: Problems = {}  # what the template changes, or leaves out


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
  """The ids of `messages` with the generation prompt.

  Raises InputError if the tokenizer has no template, or if its template refuses the messages.
  """
  chat = GuardedChat(tokenizer, messages)
  return next(encode_segments(tokenizer, [chat.segments(chat.rendered(chat.messages, True), True)]))


def encode_answers(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
  """Encodes each (question, answer).

  Raises InputError if the template refuses the messages, or does not put the answer right after the prompt.
  """
  parts: list[list[Segment]] = []
  facts: list[tuple[Problems, str]] = []
  for question, answer in pairs:
    chat = GuardedChat(tokenizer, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    prompt_text, full_text, missing = prompt_and_full_text(chat)
    if missing:
      common = len(prompt_text) - len(missing)
      parts += [chat.segments(prompt_text, True), _first_turn(tokenizer, chat.segments(full_text, True), common)]
    else:
      parts += _prompt_and_answer(chat, prompt_text, full_text)
    facts.append((TemplateCheck(chat, full_text).problems(), missing))
  ids = encode_segments(tokenizer, parts)  # of prompts and answers in turn: each step of zip takes one of each
  return [_answer(prompt, answer, *fact) for prompt, answer, fact in zip(ids, ids, facts, strict=True)]


def _answer(prompt: list[int], answer: list[int], problems: Problems, missing: str) -> Answer:
  """Splits prompt and answer; if the prompt has a `missing` end, `answer` still begins with the prompt."""
  if not missing:
    return Answer(prompt, answer, problems)
  common = len(commonprefix([prompt, answer]))  # of the tokens, as in TRL
  return Answer(answer[:common], answer[common:], {**problems, (OPENINGS, missing_reason(missing)): 1})


def prompt_and_full_text(chat: GuardedChat) -> tuple[str, str, str]:
  """The rendered prompt, the rendered conversation, and the end of the prompt that the conversation lacks (or '').

  The prompt is all messages but the last, with the generation prompt. A generation prompt may end in text that the
  conversation does not contain, such as `<think>`. What is learned then starts after the common prefix, as in TRL.
  Raises InputError if the rendering of the last message does not follow that of the others.
  """
  prompt_text, full_text = chat.rendered(chat.messages[:-1], True), chat.rendered(chat.messages, False)
  if full_text.startswith(prompt_text):
    return prompt_text, full_text, ""
  history = chat.rendered(chat.messages[:-1], False)
  if not (prompt_text.startswith(history) and full_text.startswith(history)):
    raise InputError(f"the chat template of {chat.tokenizer.name} does not continue its generation prompt with the "
                     f"answer; {ADVICE}")
  return prompt_text, full_text, prompt_text[common_prefix_length(prompt_text, full_text, len(history)) :]


def missing_reason(missing: str) -> str:
  """The reason in `not_learned` for answers that lack the `missing` end of the generation prompt."""
  return f"the chat template's generation prompt ends in {missing!r}, and the answers do not begin with it"


def _prompt_and_answer(chat: GuardedChat, prompt_text: str, full_text: str) -> tuple[list[Segment], list[Segment]]:
  """The segments of the prompt, and those of the answer up to the end of its turn."""
  prompt = chat.segments(prompt_text, True)
  start = not prompt or (prompt[-1].token is not None and chat.tokenizer.start_after_control)
  strips = prompt and prompt[-1].token is not None and chat.tokenizer.strips.get(prompt[-1].token, (False, False))[1]
  begin = len(prompt_text)
  if strips:
    begin = len(full_text) - len(full_text[begin:].lstrip())
  return prompt, _first_turn(chat.tokenizer, chat.segments(full_text, start, begin))


def _first_turn(tokenizer: Tokenizer, answer: list[Segment], begin: int = 0) -> list[Segment]:
  """`answer` up to the token that ends it: the first that stops generation, else its last control token, else `eot`.

  Control tokens before the character `begin` belong to the prompt and are not considered.
  """
  controls = [n for n, segment in enumerate(answer) if segment.token is not None and segment.begin >= begin]
  last = controls[-1] if controls else None
  end = next((n for n in controls if answer[n].token in tokenizer.stops), last)
  return [*answer, Segment(0, 0, tokenizer.eot)] if end is None else answer[: end + 1]
