"""Tokens that only the settings of a tokenizer name have the ids stated there, in every format."""

import json

import pytest
from tokenizer_files import CHATML, LINES, byte_level, gpt2_files, sentencepiece_model, user

from lora_exp.config import InputError
from lora_exp.data.chats.chat import encode_chat
from lora_exp.data.tokenization import get_tokenizer

TURNS = ("<|im_start|>", "<|im_end|>")


def write(file, content):
  file.write_text(json.dumps(content))


def entry(content, special):
  return {"content": content, "special": special, "lstrip": False, "rstrip": False, "normalized": False}


def files_of(kind, folder):
  """A directory with a tokenizer that lacks the turn tokens, and the number of its tokens."""
  if kind == "sentencepiece":
    sentencepiece_model(folder)
  else:
    byte_level(folder, special=("<|endoftext|>",))
  if kind == "vocab.json":
    gpt2_files(folder)
  file = {"sentencepiece": "tokenizer.model", "vocab.json": "vocab.json"}.get(kind, "tokenizer.json")
  copy = folder.parent / f"{folder.name}-plain"
  folder.rename(copy)
  write(copy / "tokenizer_config.json", {} if kind == "sentencepiece" else {"eos_token": "<|endoftext|>"})
  count = get_tokenizer(str(copy / file)).vocab_size
  copy.rename(folder)
  return count


def declare(folder, how, ids):
  """Writes `ids` {token: id} of which the turns are special, as `how` stores them."""
  settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
  if how == "added_tokens_decoder":
    settings["added_tokens_decoder"] = {str(i): entry(token, token in TURNS) for token, i in ids.items()}
  else:
    write(folder / "added_tokens.json", ids)
    write(folder / "special_tokens_map.json", {"additional_special_tokens": list(TURNS)})
  write(folder / "tokenizer_config.json", settings)


@pytest.mark.parametrize("how", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json", "sentencepiece"])
def test_declared_tokens_have_their_ids(tmp_path, kind, how):
  folder = tmp_path / "x"
  n = files_of(kind, folder)
  declare(folder, how, {"<|im_start|>": n, "<|im_end|>": n + 1, "<think>": n + 2})
  tokenizer = get_tokenizer(str(folder))
  assert (tokenizer.eot, tokenizer.vocab_size) == (n + 1, n + 3)
  assert {tokenizer.special_tokens[token] for token in TURNS} == {n, n + 1}
  ids = encode_chat(tokenizer, user("a cat"))
  assert (ids[0], ids.count(n), ids.count(n + 1)) == (n, 2, 1)
  thought = tokenizer.encode("a<think>b")
  assert thought.count(n + 2) == 1
  assert tokenizer.decode(thought) == "a<think>b"
  assert n not in tokenizer.encode("a<|im_start|>b"), "text never becomes a control token"


def test_vocab_json_and_sentencepiece_may_skip_ids(tmp_path):
  for kind in ("vocab.json", "sentencepiece"):
    folder = tmp_path / kind
    n = files_of(kind, folder)
    declare(folder, "added_tokens.json", {"<|im_start|>": n + 3, "<|im_end|>": n + 7})
    tokenizer = get_tokenizer(str(folder))
    assert (tokenizer.eot, tokenizer.special_tokens["<|im_start|>"], tokenizer.vocab_size) == (n + 7, n + 3, n + 8)


def test_an_id_that_cannot_be_given_is_refused(tmp_path):
  n = files_of("tokenizer.json", tmp_path / "json")
  declare(tmp_path / "json", "added_tokens.json", {"<|im_start|>": n + 3, "<|im_end|>": n + 4})
  with pytest.raises(InputError, match=rf"'<\|im_start\|>' the id {n + 3}, but the next free id is {n}"):
    get_tokenizer(str(tmp_path / "json"))
  files_of("vocab.json", tmp_path / "vocab")
  declare(tmp_path / "vocab", "added_tokens.json", {"<|im_start|>": 7})
  with pytest.raises(InputError, match="the id 7, which another token has"):
    get_tokenizer(str(tmp_path / "vocab"))
  write(tmp_path / "vocab" / "added_tokens.json", {"<|im_start|>": "7"})
  with pytest.raises(InputError, match=r"added_tokens.json: must map tokens to ids"):
    get_tokenizer(str(tmp_path / "vocab" / "vocab.json"))


def test_a_reserved_piece_takes_the_name_of_a_token(tmp_path):
  folder = tmp_path / "x"
  files_of("sentencepiece", folder)
  plain = get_tokenizer(str(folder / "tokenizer.model"))
  reserved = plain.special_tokens["<start_of_turn>"]
  declare(folder, "added_tokens.json", {"<|im_start|>": reserved, "<|im_end|>": plain.special_tokens["<end_of_turn>"]})
  tokenizer = get_tokenizer(str(folder))
  assert (tokenizer.special_tokens["<|im_start|>"], tokenizer.vocab_size) == (reserved, plain.vocab_size)


def test_roles_without_an_id_follow_the_last_token(tmp_path):
  folder = tmp_path / "x"
  n = files_of("vocab.json", folder)
  write(folder / "special_tokens_map.json", {"pad_token": "<pad>", "eos_token": {"content": "<end>"}})
  tokenizer = get_tokenizer(str(folder))
  assert (tokenizer.special_tokens["<end>"], tokenizer.special_tokens["<pad>"], tokenizer.eot) == (n, n + 1, n)


def test_the_fingerprint_covers_added_tokens(tmp_path):
  prints = set()
  for name, token in (("a", "<x>"), ("b", "<y>")):
    n = files_of("sentencepiece", tmp_path / name)
    declare(tmp_path / name, "added_tokens.json", {"<|im_end|>": n, "<|im_start|>": n + 1, token: n + 2})
    prints.add(get_tokenizer(str(tmp_path / name)).fingerprint)
  assert len(prints) == 2


def test_qwen2s_vocab_json_splits_digits(tmp_path):
  folder = gpt2_files(byte_level(tmp_path, tokenizer_class="Qwen2Tokenizer"))
  tokenizer = get_tokenizer(str(folder))
  assert len(tokenizer.encode("2024")) == 4
  assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
  assert [tokenizer.decode(tokenizer.encode(line)) for line in LINES[:3]] == LINES[:3]
