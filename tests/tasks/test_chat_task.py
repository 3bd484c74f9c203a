"""`task=chat`: turns by the template, the base beside a run, and commands. The model is a small random one."""

import io

import pytest
from runs import QUIET
from tokenizer_files import CHATML, byte_level

from lora_exp.cli import main as entry
from lora_exp.cli.python_api import compose
from lora_exp.config.errors import InputError
from lora_exp.tasks.chat import _sampler
from lora_exp.train.loaded_run import open_run
from lora_exp.train.sampling.chat_session import ChatSession


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
  folder = byte_level(tmp_path_factory.mktemp("tokenizer"), chat_template=CHATML)
  return ["task=chat", "model=minigpt_tiny", "model.layers=1", f"model.tokenizer={folder}", "model.max_len=128",
          *QUIET, "sample.temperature=0", "sample.max_tokens=12"]


@pytest.fixture(scope="module")
def conversation(overrides):
  cfg = compose(overrides)
  loaded = open_run(cfg)
  weights = (*loaded.single(), loaded.frozen)
  return ChatSession(_sampler(loaded, cfg), weights, weights)


@pytest.fixture(autouse=True)
def new(conversation):
  conversation.reset()


def ignore(piece):
  """Shows nothing."""


def test_an_answer_depends_on_all_turns_by_the_template(conversation):
  sampler, shown = conversation.sampler, []
  first = conversation.answer("Once upon a time", shown.append)
  second = conversation.answer("And then?", ignore)
  assert "".join(shown) == first.text and first.cut_off
  turns = [{"role": "user", "content": "Once upon a time"}, {"role": "assistant", "content": first.text},
           {"role": "user", "content": "And then?"}]
  assert conversation.messages[:-1] == turns
  assert sampler.decode(*conversation.model, [sampler.encode_messages(turns)]) == [second.text]
  conversation.reset()
  assert conversation.answer("Once upon a time", ignore).text == first.text


def test_the_answer_of_the_base_is_not_part_of_the_turns(conversation):
  reply = conversation.answer("The cat sat.", ignore)
  before = list(conversation.messages)
  assert conversation.base_answer(ignore).text == reply.text  # the model is the base here
  assert conversation.messages == before


def test_an_interrupted_answer_is_kept_in_part(conversation):
  whole = conversation.answer("The cat sat.", ignore).text
  conversation.reset()
  pieces = []

  def interrupt(piece):
    pieces.append(piece)
    if len("".join(pieces)) > 3:
      raise KeyboardInterrupt

  reply = conversation.answer("The cat sat.", interrupt)
  assert whole.startswith(reply.text) and 3 < len(reply.text) < len(whole)
  assert conversation.messages[-1] == {"role": "assistant", "content": reply.text}


def test_the_first_turns_are_left_out_when_they_do_not_fit(conversation):
  for _ in range(3):
    reply = conversation.answer("a b c d e f g h i " * 2, ignore)
  assert reply.forgotten in (2, 4)
  with pytest.raises(InputError, match="leaves no room"):
    conversation.answer("x y z " * 100, ignore)
  assert conversation.messages[-1]["role"] == "assistant"


def test_messages_and_commands_come_through_a_pipe(overrides, capfd, monkeypatch):
  lines = "Once upon a time\n/base\n\n/what\n/reset\nOnce upon a time\n/quit\nnever read\n"
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
  assert entry.run(overrides) == 0
  out, err = capfd.readouterr()
  first, again = (part.splitlines()[1] for part in f"\n{out}".split("\n> Once upon a time")[1:])
  assert first == again
  assert "never read" not in out and "> /reset" in out
  assert "there is no other answer" in err and "A new conversation" in err and "cut off at sample.max_tokens=12" in err
