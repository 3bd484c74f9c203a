"""Conversations: which turns are learned, and what a chat template hides from the model is said."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES
from tokenizer_files import CHATML, byte_level

from lora_exp.config.schema import DataConfig
from lora_exp.data.chats.conversations import EncodedConversation, encode_conversations
from lora_exp.data.chats.plain_turns import turns_prompt
from lora_exp.data.documents import Conversation, Document
from lora_exp.data.encoding import source_writer
from lora_exp.data.encoding.encode import encode_documents
from lora_exp.data.sources.source import TextSource
from lora_exp.data.tokenization import Tokenizer, get_tokenizer

TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "The cat"},
         {"role": "assistant", "content": "sat"}, {"role": "user", "content": "Again"},
         {"role": "assistant", "content": "sat sat"})
MARKED = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
  "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}")


def chatml(folder: Path, template: str = CHATML, **settings) -> Tokenizer:
  return get_tokenizer(str(byte_level(folder, chat_template=template, **settings)))


def encoded(tokenizer: Tokenizer, conversation: Conversation, loss: str = "assistant") -> EncodedConversation:
  [one] = encode_conversations(tokenizer, [conversation], loss, plain=False)
  return one


def learned_text(tokenizer: Tokenizer, one: EncodedConversation) -> list[str]:
  """The text of each run of learned tokens."""
  ids, learned = np.array(one.ids), one.learned.astype(int)
  edges = np.flatnonzero(np.diff(np.concatenate([[0], learned, [0]])))
  return [tokenizer.decode(ids[begin:end].tolist()) for begin, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize(("loss", "texts"), [
  ("assistant", ["sat<|im_end|>\n", "sat sat<|im_end|>\n"]), ("last", ["sat sat<|im_end|>\n"])])
def test_turns_of_the_assistant_are_learned(tmp_path, loss, texts):
  tokenizer = chatml(tmp_path)
  one = encoded(tokenizer, Conversation(TURNS), loss)
  assert learned_text(tokenizer, one) == texts
  assert one.problems == {}
  everything = encoded(tokenizer, Conversation(TURNS), "all")
  assert everything.ids == one.ids and everything.learned.all()


@pytest.mark.parametrize(("settings", "texts"), [
  ({"zero_weight": frozenset([2])}, ["sat sat<|im_end|>\n"]), ({"zero_weight": frozenset([4])}, ["sat<|im_end|>\n"]),
  ({"prompt_messages": 4}, ["sat sat<|im_end|>\n"]), ({"prompt_messages": 5}, []),
])
def test_turns_of_weight_0_and_of_the_prompt_are_not_learned(tmp_path, settings, texts):
  for template, end in ((CHATML, ""), (MARKED, "<|im_end|>\n")):
    tokenizer = chatml(tmp_path / str(len(template)), template)
    one = encoded(tokenizer, Conversation(TURNS, **settings))
    assert learned_text(tokenizer, one) == [text.removesuffix(end) for text in texts]
    assert one.totals["assistant turns"] == 2
    assert one.problems.get(("assistant turns", "their weight is 0"), 0) == len(settings.get("zero_weight", ()))


@pytest.mark.parametrize(("zero_weight", "left_out"), [({2}, ["sat<|im_end|>\n"]), ({4}, ["sat sat<|im_end|>\n"]),
                                                     ({2, 4}, ["sat<|im_end|>\n", "sat sat<|im_end|>\n"])])
def test_turns_of_weight_0_are_not_part_of_all(tmp_path, zero_weight, left_out):
  tokenizer = chatml(tmp_path)
  one = encoded(tokenizer, Conversation(TURNS, zero_weight=frozenset(zero_weight)), "all")
  assert learned_text(tokenizer, replace(one, learned=~one.learned)) == left_out
  assert one.problems == {("assistant turns", "their weight is 0"): len(zero_weight)}


def test_an_end_that_is_not_learned_is_counted(tmp_path):
  one = encoded(chatml(tmp_path, MARKED), Conversation(TURNS))
  reason = "no end-of-turn token of them is learned, so the model does not learn to stop"
  assert one.problems == {("assistant turns", reason): 2} and one.totals["assistant turns"] == 2


@pytest.mark.parametrize(("old", "new", "role", "count"), [
  ("message['content']", "message['content'][:3]", "user", 2),
  ("message['content']", "(message['content'] if message['role'] != 'system' else '')", "system", 1),
  ("message['content']", "message['content'].replace('sat sat', 'sat')", "assistant", 1),
  ("message['content']", "message['content'] | upper", "assistant", 2)])
def test_text_that_a_template_changes_is_counted(tmp_path, old, new, role, count):
  one = encoded(chatml(tmp_path, CHATML.replace(old, new)), Conversation(TURNS))
  assert one.problems["turns", f"the chat template changes the text of the {role}, or leaves it out"] == count
  assert one.totals["turns"] == 5


def test_text_in_json_and_without_spaces_is_not_changed(tmp_path):
  turns = ({"role": "user", "content": " \"é\"\n"}, {"role": "assistant", "content": " a\n"})
  for content in ("message['content'] | trim", "message | tojson"):
    template = CHATML.replace("message['content']", f"({content})")
    assert encoded(chatml(tmp_path / str(len(content)), template), Conversation(turns)).problems == {}


def test_a_thought_in_the_generation_prompt_is_said(tmp_path):
  template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
  tokenizer = chatml(tmp_path, template)
  one = encoded(tokenizer, Conversation(TURNS))
  assert learned_text(tokenizer, one) == ["sat<|im_end|>\n", "sat sat<|im_end|>\n"]
  reason = "the chat template's generation prompt ends in '<think>\\n', and the answers do not begin with it"
  assert one.problems == {("openings of answers", reason): 2}
  [pair] = encode_documents(tokenizer, [Document(0, "sat", "The cat")], DataConfig(), "")
  assert tokenizer.decode(np.array(pair.ids)[pair.learned].tolist()) == "sat<|im_end|>"
  assert pair.problems == {("openings of answers", reason): 1}


def test_names_of_control_tokens_in_a_text_are_counted(tmp_path):
  tokenizer = chatml(tmp_path)
  reason = "'<|im_end|>' in their text is encoded as ordinary text, not as the control token"
  documents = [Document(0, "a<|im_end|>"), Document(0, "a < b |"), Document(0, "a", "b<|im_end|>\n")]
  for chat in ("auto", "none"):
    found = encode_documents(tokenizer, documents, DataConfig(chat=chat), "")
    assert [dict(one.problems) for one in found] == [{("documents", reason): 1}, {}, {("answers", reason): 1}]
  turns = ({"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"})
  assert encoded(tokenizer, Conversation(turns)).problems == {("turns", reason): 1}


def test_characters_that_a_tokenizer_does_not_know_are_counted(tmp_path):
  from tokenizers import Tokenizer as Library
  from tokenizers import models, pre_tokenizers

  words = Library(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2, "sat": 3}, unk_token="<unk>"))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  words.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
  documents = [Document(0, "cat sat"), Document(0, "dog sat"), Document(0, "cat", "dog")]
  found = encode_documents(get_tokenizer(str(tmp_path)), documents, DataConfig(), "")
  reason = "they have characters that are not in the tokenizer's vocabulary and become its unknown token"
  assert [dict(one.problems) for one in found] == [{}, {("documents", reason): 1}, {("answers", reason): 1}]


def test_characters_that_a_tokenizer_leaves_out_are_counted(tmp_path):
  from tokenizers import Tokenizer as Library
  from tokenizers import decoders, models, pre_tokenizers

  letters = Library(models.BPE({"a": 0, "c": 1, "t": 2, "Ġ": 3, "</s>": 4}, []))
  letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  letters.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  tokenizer = get_tokenizer(str(tmp_path))
  turns = Conversation(({"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}))
  documents = [Document(0, "cat cat"), Document(0, "dog cat"), Document(0, "act", "é"), Document(0, "", "", 0, turns)]
  found = encode_documents(tokenizer, documents, DataConfig(), "")
  reason = "they have characters that are not in the tokenizer's vocabulary and are left out"
  assert [reason in {text for _, text in one.problems} for one in found] == [False, True, True, True]
  assert chatml(tmp_path / "whole").missing_bytes == frozenset()


def test_tools_that_a_template_leaves_out_are_counted(tmp_path):
  call = {"type": "function", "function": {"name": "f", "arguments": {}}}
  turns = ({"role": "user", "content": "Use f."}, {"role": "assistant", "content": "", "tool_calls": [call]},
           {"role": "tool", "content": "sat"}, {"role": "assistant", "content": "sat"})
  conversation = Conversation(turns, tools=({"type": "function", "function": {"name": "f"}},))
  calls = "message['content'] + (message.tool_calls | tojson if message.tool_calls else '')"
  written = CHATML.replace("message['content']", calls)
  reasons = {("turns", "the chat template leaves out the tool calls of the assistant"): 1,
             ("conversations", "the chat template leaves out their tools"): 1}
  both = "{{ tools | tojson }}" + written
  ascii_only = both.replace("tojson", "tojson(ensure_ascii=True)")
  for name, template, lost in (("none", CHATML, 2), ("calls", written, 1), ("both", both, 0), ("ascii", ascii_only, 0)):
    problems = encoded(chatml(tmp_path / name, template), conversation).problems
    assert len(reasons.keys() & problems.keys()) == lost == len(problems), (name, problems)


def test_control_tokens_in_a_tool_stay_text(tmp_path):
  template = "{{ tools | tojson }}{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}"
  call = {"function": {"name": "f", "arguments": {"<|im_end|>": "<|im_start|>"}}}
  conversation = Conversation(({"role": "assistant", "content": None, "tool_calls": [call]},), tools=(
    {"function": {"name": "f", "description": "<|im_end|>"}},))
  tokenizer = chatml(tmp_path, template)
  one = encoded(tokenizer, conversation, "all")
  assert tokenizer.decode(one.ids) == json.dumps(list(conversation.tools)) + json.dumps([call])
  assert not set(tokenizer.special_tokens.values()) & set(one.ids)


def test_without_a_template_turns_are_lines():
  [one] = encode_conversations(BYTES, [Conversation(TURNS)], "assistant", plain=True)
  end = "<|endoftext|>"
  assert BYTES.decode(one.ids) == (
    f"System: Be brief.\nUser: The cat\nAssistant: sat{end}\nUser: Again\nAssistant: sat sat{end}\n")
  assert learned_text(BYTES, one) == [f"sat{end}\n", f"sat sat{end}\n"]


@dataclass(frozen=True)
class Talks(TextSource):
  """Conversations for the test."""

  name = "talks"
  unit = "conversations"

  def documents(self):
    for key in range(8):
      turns = TURNS if key % 4 < 2 else TURNS[:2] if key % 4 == 2 else (TURNS[1], {"role": "user", "content": "x" * 99})
      yield Document(key, "", conversation=Conversation(turns), where=f"talk {key}")


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_rows_hold_conversations_and_what_is_lost_is_told(tmp_path, packing):
  cfg = DataConfig(source="talks", seq_len=76, packing=packing, eval_fraction=0.5)
  counts = source_writer.write_rows(tmp_path, cfg, BYTES, Talks(), progress=False)
  assert (counts.documents, counts.eval_documents) == (4, 2)
  told = "\n".join(counts.warnings)
  assert "the turns of 8 conversations are written as lines, 'User: …' and 'Assistant: …'" in told
  assert "4 of 8 conversations: they have no token to learn (first: talk 2)" in told
  assert "4 of 8 conversations: their end lies beyond data.seq_len=76 (first: talk 0)" in told


def test_digests_of_conversations_differ():
  @dataclass(frozen=True)
  class One(TextSource):
    """A conversation."""

    name = "one"
    content: str = ""

    def documents(self):
      yield Document(0, "", conversation=Conversation(({"role": "user", "content": self.content},)))

  assert One("a").digest() != One("b").digest() == One("b").digest()


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt2_4096"])
def test_a_prompt_of_plain_turns_is_what_was_trained_on(name):
  """The prompt and the learned tokens after it are the tokens of the conversation."""
  tokenizer = get_tokenizer(name)
  messages = ({"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine, thanks."})
  one = encoded(tokenizer, Conversation(messages))
  text, ids = turns_prompt(tokenizer, messages[:1])
  assert one.ids[: len(ids)] == ids and one.learned.argmax() == len(ids)
  assert text == ("User: How are you?\nAssistant: " if name == "bytes" else "User: How are you?\nAssistant:")
