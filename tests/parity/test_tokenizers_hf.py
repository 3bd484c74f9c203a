"""Against transformers: the ids of a text and of a chat under the same tokenizer files."""

import json

import pytest
from tokenizer_files import CHATML, LINES, byte_level, gpt2_files, spaced, user

from lora_exp.data.chats.chat import encode_chat
from lora_exp.data.tokenization import get_tokenizer

transformers = pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402


@pytest.mark.parametrize("make", [byte_level, spaced, lambda f, **kw: spaced(f, "normalizer", **kw)])
def test_ids_and_chats_are_those_of_transformers(tmp_path, make, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  inst = "{{bos_token}}{% for m in messages %}{{'[INST] ' + m['content']}}{% endfor %}"
  folder = make(tmp_path, chat_template=CHATML if make is byte_level else inst)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  ours = get_tokenizer(str(folder))
  for text in [*LINES[:3], "é 12", " a"]:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
  messages = [*user("The cat's hat "), {"role": "assistant", "content": " a"}, *user("b")]
  theirs_ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
  assert encode_chat(ours, messages) == theirs_ids


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_added_tokens_have_the_ids_of_transformers(tmp_path, kind):
  roles = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
  gpt2_files(byte_level(tmp_path, special=("<|endoftext|>",), tokenizer_class=kind, **roles))
  count = len(json.loads((tmp_path / "vocab.json").read_text()))
  ids = {token: count + i for i, token in enumerate(("<|im_start|>", "<|im_end|>", "<think>"))}
  (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
  ours, theirs = get_tokenizer(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in (*LINES[:3], "a<think> 12 b", "<think>"):
    assert ours.encode(text) == theirs.encode(text)
  assert (ours.eot, ours.vocab_size, ours.special_tokens["<pad>"]) == (theirs.eos_token_id, len(theirs), count + 3)


def test_smollm2s_template_is_rendered_as_transformers_does(smollm2):
  messages = [{"role": "system", "content": "Be brief."}, *user("Hi"), {"role": "assistant", "content": "Yo"}]
  [[text], _] = render_jinja_template([messages], chat_template=smollm2.chat_template, add_generation_prompt=True)
  assert smollm2.decode(encode_chat(smollm2, messages)) == text
