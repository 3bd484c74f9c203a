"""GPT-2's tokens and bytes: every text comes back from its ids."""


import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization import get_tokenizer


def test_gpt2_ids_are_openais():
  gpt2 = get_tokenizer("gpt2")
  assert gpt2.encode("hello world") == [31373, 995]
  assert gpt2.encode(" \n\n  I'll pay 1234 €😀") == [220, 628, 220, 314, 1183, 1414, 1105, 2682, 10432, 47249, 222]
  assert (gpt2.vocab_size, gpt2.eot, gpt2.decode([31373, 50256])) == (50257, 50256, "hello<|endoftext|>")


@pytest.mark.parametrize(("name", "size"), [("gpt2", 50257), ("gpt2_4096", 4096), ("bytes", 257)])
@given(text=st.text())
@settings(max_examples=50, deadline=None)
def test_every_text_comes_back_from_its_ids(name, size, text):
  tokenizer = get_tokenizer(name)
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert (tokenizer.vocab_size, tokenizer.eot) == (size, size - 1)
  assert all(0 <= i < tokenizer.eot for i in ids)
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_the_small_vocabulary_is_the_beginning_of_the_large_one():
  small, large = get_tokenizer("gpt2_4096"), get_tokenizer("gpt2")
  assert [small.decode([i]) for i in range(4095)] == [large.decode([i]) for i in range(4095)]
  assert small.encode(" the world") == large.encode(" the world")


@pytest.mark.parametrize("name", ["gpt2", "gpt2_4096", "bytes"])
def test_a_special_token_in_a_text_is_ordinary_text(name):
  tokenizer = get_tokenizer(name)
  assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")


def test_an_unknown_tokenizer_names_the_nearest():
  with pytest.raises(InputError, match="'gpt2_4069'.*did you mean gpt2_4096"):
    get_tokenizer("gpt2_4069")
