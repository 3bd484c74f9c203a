"""`task=chat`: holds a conversation with a run or a base, and shows the base's answers on request."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import jax

from lora_exp.config import Config, InputError
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.runtime.output_stream import output_lost
from lora_exp.train.loaded_run import LoadedRun, open_run
from lora_exp.train.sampling.chat_session import ChatSession, Reply
from lora_exp.train.sampling.prompt_encoding import PromptFormat
from lora_exp.train.sampling.sampler import Sampler, make_sampler

STREAMED = 1  # tokens that are decoded before they are shown
HELP = "/base: the base's answer to the last message. /reset: start again. /quit: end. Ctrl-C: stop the answer."
PROMPT = "> "


def run(cfg: Config) -> None:
  """Answers the lines of the terminal or of standard input until they end."""
  start_jax(cfg.cache, show_device=False)
  with console.phase("load the model"):
    loaded = open_run(cfg, with_base=cfg.run is not None)
  session = ChatSession(_sampler(loaded, cfg), (*loaded.single(), loaded.frozen), _base(loaded, cfg))
  console.show(f"Chat with {cfg.run or cfg.model.weights or cfg.name}. {_turns(session.sampler)}\n{HELP}")
  for line in _lines():
    if output_lost() or line == "/quit":
      break
    try:
      _answer(session, line)
    except KeyboardInterrupt:  # of /base; that of an answer is kept in part
      console.write("\n")
    except InputError as error:  # a message that is too long
      console.show_error(error)


def _sampler(loaded: LoadedRun, cfg: Config) -> Sampler:
  """The sampler of the conversation: by the chat template, unless sample.chat=none or the run's data had none."""
  tokenizer = loaded.plan.tokenizer
  sampler = make_sampler(loaded.job.program, cfg, tokenizer, STREAMED)
  if cfg.run is None and cfg.sample.chat == "auto" and tokenizer.chat_template is not None:
    sampler.format = PromptFormat(chat=True)
  return sampler


def _base(loaded: LoadedRun, cfg: Config) -> tuple | None:
  """The weights of the base; None if the conversation is with the base itself."""
  if cfg.run is None and cfg.lora.init_from is None:
    return None
  params, trials, frozen = loaded.base()
  params, trial = jax.tree.map(lambda x: x[0], (params, trials))
  return params, trial, frozen


def _turns(sampler: Sampler) -> str:
  if sampler.format.lines:
    return "It sees the whole conversation, as lines 'User: …' and 'Assistant: …'."
  if sampler.format.chat:
    return "It sees the whole conversation, by the tokenizer's chat template."
  return "There is no chat template, so each message is answered on its own."


def _lines() -> Iterator[str]:
  """The messages and commands, without empty lines. Ctrl-C twice at the prompt ends them."""
  interactive = sys.stdin is not None and sys.stdin.isatty()
  interrupted = False
  while sys.stdin is not None:
    try:
      line = input(PROMPT) if interactive else _piped_line()
    except EOFError:
      if interactive:
        console.write("\n")
      return
    except KeyboardInterrupt:
      if interrupted:
        return
      interrupted = True
      console.show("\nPress Ctrl-C again, or type /quit, to end.")
      continue
    interrupted = False
    if line.strip():
      yield line.strip()


def _piped_line() -> str:
  """The next line of standard input, which is shown as if it were typed. Raises EOFError at the end."""
  content = sys.stdin.buffer.readline()
  if not content:
    raise EOFError
  line = content.decode(errors="replace")
  if line.strip():
    console.write(f"{PROMPT}{line.strip()}\n")
  return line


def _answer(session: ChatSession, line: str) -> None:
  """Answers a message, or carries out a command."""
  if line == "/reset":
    session.reset()
    console.show("A new conversation.")
  elif line == "/base" and session.base is None:
    console.show("This is the base: there is no other answer.")
  elif line == "/base" and not session.messages:
    console.show("/base shows the base's answer to the last message, and there is none yet.")
  elif line == "/base":
    _stream(session, session.base_answer, "base: ")
  elif line.startswith("/"):
    console.show(HELP)
  else:
    _stream(session, lambda show: session.answer(line, show), "")


def _stream(session: ChatSession, answer: Callable[[Callable[[str], None]], Reply], label: str) -> None:
  """Shows an answer while it is generated, and what is not seen in it."""
  with ExitStack() as waiting:  # until the first token
    waiting.enter_context(console.phase("read the conversation"))
    begun: list[str] = []

    def show(piece: str) -> None:
      waiting.close()
      text = piece if begun else piece.lstrip()  # an answer may begin with spaces
      if text:
        console.write(text if begun else label + text)
        begun.append(text)

    reply = answer(show)
  console.write("\n")
  if reply.forgotten:
    console.show(f"({reply.forgotten} earlier messages no longer fit in model.max_len={session.sampler.max_len})")
  if reply.cut_off:
    console.show(f"(cut off at sample.max_tokens={session.sampler.cfg.max_tokens})")
