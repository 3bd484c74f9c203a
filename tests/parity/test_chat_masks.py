"""Against transformers: the ids of conversations under templates of eight kinds, and the mask of what is learned.

The templates are written for this test. `⟦…⟧` is what the model generates: with `{% generation %}` there, transformers
gives the mask; the same template without it must give the same one.
"""

import json
import random
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pytest
from tokenizer_files import byte_level, spaced

from lora_exp.data.chats.chat import encode_answers
from lora_exp.data.chats.conversations import encode_conversations
from lora_exp.data.documents import Conversation
from lora_exp.data.tokenization import get_tokenizer

transformers = pytest.importorskip("transformers")

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{% if m.role == 'assistant' %}⟦{{ m.content + '<|im_end|>\n' }}⟧{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

HEADERS = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}\
{% if loop.first and tools %}{{ 'Functions: ' + (tools | tojson) + '\n' }}{% endif %}\
{% if m.role == 'assistant' %}⟦{% if m.tool_calls %}\
{{ '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}\
{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content | trim }}{% endif %}\
{{ '<|eot_id|>' }}⟧{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

INST = """{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}\
{% set ns = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = ns.user + 1 %}\
{% if tools and ns.user == users | length %}{{ '[TOOLS] ' + (tools | tojson) + ' [/TOOLS]' }}{% endif %}\
{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'tool' %}{{ '[RESULT] ' + m.content + ' [/RESULT]' }}\
{% elif m.tool_calls %}⟦{{ ' [CALL] ' + (m.tool_calls | tojson) + eos_token }}⟧\
{% else %}⟦{{ ' ' + m.content | trim + eos_token }}⟧{% endif %}{% endfor %}"""

MODEL = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}\
{% if m.role == 'assistant' %}⟦{{ m.content | trim + '<end_of_turn>\n' }}⟧\
{% else %}{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

THINKING = """{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ (tool | tojson) + '\n' }}\
{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% set ns = namespace(last=-1) %}\
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% for m in messages %}{% if m.role == 'tool' %}\
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}\
{% elif m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}\
{% set content = m.content or '' %}{% set thought = '' %}{% if '</think>' in content %}\
{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}\
{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}⟦\
{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}\
{{ content }}{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n{"name": "' + call.function.name + '", ' }}\
{{ '"arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}⟧\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

OPEN_THOUGHT = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}\
{% elif m.role == 'assistant' %}{{ '<|assistant|>' }}⟦{% set c = m.content %}\
{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ c + '<|end|>' }}⟧\
{% else %}{{ m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""

STRIPPING = """{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}⟦\
{{ m.content + '<|end|>\n' }}⟧{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}⟦{{ eos_token }}⟧{% endif %}"""

HEADINGS = """{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:' }}⟦\
{{ '\n' + m.content + '\n\n' + eos_token }}⟧{% else %}{{ '### ' + m.role | capitalize + ':\n' + m.content + '\n\n' }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"""

HEADER_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>")
ROLE_TOKENS = ("<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
# template, control tokens (None: a tokenizer that puts a space before a text), the last of which ends a turn
FAMILIES = {
  "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")), "headers": (HEADERS, HEADER_TOKENS), "inst": (INST, None),
  "model": (MODEL, TURN_TOKENS), "thinking": (THINKING, ("<|im_start|>", "<|im_end|>")),
  "open_thought": (OPEN_THOUGHT, ROLE_TOKENS), "stripping": (STRIPPING, ROLE_TOKENS),
  "headings": (HEADINGS, ("<|endoftext|>",)),
}
WITH_TOOLS, WITHOUT_SYSTEM = ("headers", "inst", "thinking"), ("inst", "model", "open_thought")
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},)
WORDS = ("The cat", "sat", " hat", "12", "\n", "\n\n", "é", "😀", "  ", "red;", "a", ".", '"x"', "<b>")


def folder_of(family: str, folder: Path, marked: bool) -> Path:
  """The files of the family's tokenizer."""
  template, tokens = FAMILIES[family]
  template = template.replace("⟦", "{% generation %}" if marked else "").replace(
    "⟧", "{% endgeneration %}" if marked else "")
  if tokens is None:
    return spaced(folder, "first", chat_template=template)
  ends = {"headers": "<|eot_id|>", "model": "<end_of_turn>", "open_thought": "<|end|>"}
  byte_level(folder, special=tokens, added=("<think>", "</think>", "<tool_call>", "</tool_call>"),
             chat_template=template, eos_token=ends.get(family, tokens[-1]), bos_token=tokens[0])
  if family == "stripping":  # as Phi-3's: control tokens take the spaces after them
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
      token["rstrip"] = token["content"] in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    file.write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert settings["eos_token"] == "<|endoftext|>"
  return folder


def conversation(family: str, seed: int) -> Conversation:
  """A random conversation that the family's template accepts."""
  draw = random.Random(seed)

  def text() -> str:
    return "x" + "".join(draw.choices(WORDS, k=draw.randrange(1, 6))) + draw.choice(("", " ", "\n"))

  messages = [] if family in WITHOUT_SYSTEM or draw.random() < 0.5 else [{"role": "system", "content": text()}]
  has_tools = family in WITH_TOOLS and draw.random() < 0.6
  for _ in range(draw.randrange(1, 5)):
    messages.append({"role": "user", "content": text()})
    if has_tools and draw.random() < 0.6:
      call = {"type": "function", "function": {"name": "add", "arguments": {"a": draw.randrange(99), "b": text()}}}
      messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
      messages.append({"role": "tool", "name": "add", "content": text()})
    thought = family in ("thinking", "open_thought") and draw.random() < 0.5
    messages.append({"role": "assistant", "content": f"<think>\n{text()}\n</think>\n\n" * thought + text()})
  return Conversation(tuple(messages), tools=TOOLS if has_tools else ())


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_transformers(tmp_path, family, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  folders = {marked: folder_of(family, tmp_path / str(marked), marked) for marked in (True, False)}
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders[True])
  conversations = [conversation(family, seed) for seed in range(50)]
  expected = []
  for one in conversations:
    out = theirs.apply_chat_template(list(one.messages), tools=list(one.tools) or None, return_dict=True,
                                     return_assistant_tokens_mask=True)
    expected.append((out["input_ids"], np.array(out["assistant_masks"], bool)))
  assert all(mask.any() for _, mask in expected)
  for marked, folder in folders.items():
    found = encode_conversations(get_tokenizer(str(folder)), conversations, "assistant", plain=False)
    for one, (ids, mask), text in zip(found, expected, conversations, strict=True):
      assert one.ids == ids, text
      assert one.learned.tolist() == mask.tolist(), (marked, text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_answer_alone_is_the_end_of_the_mask(tmp_path, family):
  conversations = [conversation(family, seed) for seed in range(10)]
  for marked in (True, False):
    tokenizer = get_tokenizer(str(folder_of(family, tmp_path / str(marked), marked)))
    every = encode_conversations(tokenizer, conversations, "assistant", plain=False)
    last = encode_conversations(tokenizer, conversations, "last", plain=False)
    for one, other in zip(every, last, strict=True):
      begin = int(np.flatnonzero(other.learned)[0])
      assert not one.learned[begin - 1] and (one.learned[begin:] == other.learned[begin:]).all()
      assert other.learned[:begin].sum() == 0


EMPTY_THOUGHT = OPEN_THOUGHT.replace("'</think>' in c", "false").replace("<think>\n", "<think>\n\n</think>\n\n")


@pytest.mark.parametrize("template", [OPEN_THOUGHT, EMPTY_THOUGHT])
def test_a_prompt_is_the_common_beginning_of_its_tokens(tmp_path, template, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setitem(FAMILIES, "open_thought", (template, ROLE_TOKENS))
  folder = folder_of("open_thought", tmp_path, False)
  theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(folder), get_tokenizer(str(folder))
  for answer in ("x", "<think>\nx\n</think>y", "<think>\n\n</think>\n\ny", "<b>", "th"):
    turns = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": answer}]
    prompt = theirs.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    whole = theirs.apply_chat_template(turns, return_dict=False)
    common = len(commonprefix([prompt, whole]))  # as in TRL
    [one] = encode_conversations(ours, [Conversation(tuple(turns))], "assistant", plain=False)
    assert one.ids == whole and one.learned.tolist() == [n >= common for n in range(len(whole))], answer
    [pair] = encode_answers(ours, [("The cat", answer)])
    assert (pair.prompt, pair.answer) == (whole[:common], whole[common:])


def test_a_template_for_tools_is_used_with_tools(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  plain = CHATML.replace("⟦", "").replace("⟧", "")
  templates = [{"name": "default", "template": plain}, {"name": "tool_use", "template": "{{ tools | tojson }}" + plain}]
  folder = byte_level(tmp_path, special=("<|im_start|>", "<|im_end|>"), chat_template=templates)
  theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(folder), get_tokenizer(str(folder))
  turns = ({"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat"})
  for tools in ((), TOOLS):
    [one] = encode_conversations(ours, [Conversation(turns, tools=tools)], "assistant", plain=False)
    assert one.ids == theirs.apply_chat_template(list(turns), tools=list(tools) or None, return_dict=False)
    assert ours.decode(one.ids).startswith("[{") == bool(tools)
