"""The format of a run's prompts, and their token ids. No model is needed, so prompts are checked before it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_exp.config import Config, InputError
from lora_exp.config.conversion import shown
from lora_exp.data.chats.chat import encode_chat
from lora_exp.data.chats.guarded_chat import Message
from lora_exp.data.chats.plain_turns import turns_prompt
from lora_exp.data.prompts import Prompt, shown_prompt
from lora_exp.data.sources import has_conversations, prompt_separator
from lora_exp.data.tokenization import Tokenizer


@dataclass(frozen=True)
class PromptFormat:
  """The format of prompts: a turn of the chat template, a line `User: …`, or plain text followed by a separator."""

  chat: bool = False
  lines: bool = False  # turns are lines, as in training on conversations without a chat template
  separator: str = ""

  @property
  def has_turns(self) -> bool:
    """Whether a prompt is a turn of a conversation."""
    return self.chat or self.lines


PLAIN = PromptFormat()


def prompt_format(cfg: Config, tokenizer: Tokenizer) -> PromptFormat:
  """The format of the prompts in `cfg.sample`.

  With `sample.chat=auto`, it is the format of the run's data, or plain text for a base without an adapter and for data
  without prompts. Raises InputError for sample.chat=always if the tokenizer has no chat template.
  """
  if cfg.sample.chat == "always":
    if tokenizer.chat_template is None:
      raise InputError(f"sample.chat=always: the tokenizer {tokenizer.name} has no chat template; use sample.chat=none")
    return PromptFormat(chat=True)
  separator = prompt_separator(cfg.data)
  trained = cfg.task == "train" or cfg.run is not None
  if cfg.sample.chat == "none" or not trained or separator is None:
    return PLAIN
  if cfg.data.chat == "auto" and tokenizer.chat_template is not None:
    return PromptFormat(chat=True)
  if has_conversations(cfg.data):
    return PromptFormat(lines=True)
  return PromptFormat(separator=separator)


def encode_prompts(
  prompts: Sequence[Prompt], format: PromptFormat, tokenizer: Tokenizer, max_len: int
) -> list[list[int]]:
  """The token ids of each prompt. Raises InputError if a prompt has `max_len` tokens or more."""
  ids = [_encode(prompt, format, tokenizer) for prompt in prompts]
  problems = [length_problem(prompt, row, max_len) for prompt, row in zip(prompts, ids, strict=True)]
  if any(problems):
    raise InputError([problem for problem in problems if problem])
  return ids


def encode_messages(messages: Sequence[Message], format: PromptFormat, tokenizer: Tokenizer) -> list[int]:
  """The token ids of messages, by the chat template or as lines. Raises InputError if the template refuses them."""
  if format.lines or tokenizer.chat_template is None:
    return turns_prompt(tokenizer, messages)[1]
  return encode_chat(tokenizer, messages)


def length_problem(prompt: Prompt, ids: Sequence[int], max_len: int) -> str | None:
  """Why the prompt with the token ids `ids` leaves no room for an answer, or None."""
  if len(ids) < max_len:
    return None
  return (f"the prompt {shown(shown_prompt(prompt))!r} has {len(ids):,} tokens, and model.max_len={max_len} "
          "leaves no room for another: shorten it")


def _encode(prompt: Prompt, format: PromptFormat, tokenizer: Tokenizer) -> list[int]:
  """The token ids of a prompt in `format`, or of messages; never empty."""
  if not isinstance(prompt, str):
    return encode_messages(prompt, format, tokenizer)
  if format.has_turns:
    return encode_messages([{"role": "user", "content": prompt}], format, tokenizer)
  start = [] if tokenizer.bos is None else [tokenizer.bos]
  return start + tokenizer.encode(prompt + format.separator) or [tokenizer.eot]
