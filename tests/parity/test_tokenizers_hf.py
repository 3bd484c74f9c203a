"""Against transformers: the ids of a text and of a chat under the same tokenizer files."""

import pytest
from tokenizer_files import CHATML, LINES, byte_level, spaced, user

from lora_exp.data.chat import encode_chat
from lora_exp.data.tokenizers import get_tokenizer

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


def test_smollm2s_template_is_rendered_as_transformers_does(smollm2):
  messages = [{"role": "system", "content": "Be brief."}, *user("Hi"), {"role": "assistant", "content": "Yo"}]
  [[text], _] = render_jinja_template([messages], chat_template=smollm2.chat_template, add_generation_prompt=True)
  assert smollm2.decode(encode_chat(smollm2, messages)) == text
