"""Turns as lines of `Role: content`, for tokenizers without a chat template and for data.chat=none."""

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from lora_exp.data.chats.guarded_chat import GuardedChat, Message, encode_segments
from lora_exp.data.tokenization import Tokenizer

PLAIN_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: "
  "{{ message.content or (message.tool_calls | tojson if message.tool_calls) }}"
  "{{ eos_token if message.role == 'assistant' }}{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}")


def plain_chat(
  tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (),
  variables: Mapping[str, Any] | None = None,
) -> GuardedChat:
  """`messages` under the plain template. `variables` replace those of the tokenizer."""
  names = {i: token for token, i in tokenizer.special_tokens.items()}
  controls = {"eos_token": names[tokenizer.eot], "bos_token": "" if tokenizer.bos is None else names[tokenizer.bos]}
  return GuardedChat(tokenizer, messages, tools, controls | dict(variables or {}), PLAIN_TEMPLATE)


def turns_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[int]]:
  """The text and the ids of `messages` and of the beginning of the assistant's answer.

  A tokenizer may join the space after `Assistant:` with the first word of an answer. The space then belongs to the
  answer, as in training.
  """
  chat = plain_chat(tokenizer, messages)
  prompt = chat.rendered(chat.messages, True)
  alone, followed = encode_segments(tokenizer, [chat.segments(prompt, True), chat.segments(prompt + "The", True)])
  ids = list(commonprefix([alone, followed]))
  text = chat.without_guards(prompt)
  return text if ids == alone else text.rstrip(" "), ids
