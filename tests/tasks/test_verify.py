"""`task=verify` against a server with OpenAI's interface, and its refusals. PEFT and llama.cpp: tests/parity."""

import json
from pathlib import Path

import numpy as np
import pytest
from served_runs import completions_server, log_softmax

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError

V, SCALES = 40, (-1.0, 0.125, 0.25, 0.5, 2.0, 4.0, 8.0)
TEXT = {"hello": [1, 2, 3], "what?": [4, 5]}  # the tokens of two prompts
TURN = [9]  # before a prompt in the chat template


def logits(ids, scale: float, base: int = 0) -> np.ndarray:
  """The logits of a model whose next token depends on the last two, with an update of the given scale."""
  table = np.random.default_rng(base).normal(size=(V, V)) + 2 * np.random.default_rng(base + 1).normal(size=V)
  update = np.random.default_rng(7).normal(size=(V, V))
  return table[ids[-1]] + 0.5 * table[ids[max(-2, -len(ids))]] + scale * np.tanh(update[ids[-1]] + 0.3 * scale)


def continuation(prompt: list[int], scale: float) -> list[int]:
  """Six greedy tokens."""
  ids = list(prompt)
  for _ in range(6):
    ids.append(int(logits(ids, scale).argmax()))
  return ids[len(prompt) :]


def values(rows, scale: float) -> list[list[float]]:
  return [[float(log_softmax(logits([*prompt, *answer[:n]], scale))[answer[n]]) for n in range(len(answer))]
          for prompt, answer in rows]


@pytest.fixture
def card(tmp_path) -> Path:
  """A directory with the answer card of the model with scale 1."""
  prompts = [TURN + ids for ids in TEXT.values()]
  rows = [(prompt, continuation(prompt, 1.0)) for prompt in prompts]
  entries = [{"prompt": text, "rendered": text, "ids": prompt, "continuation": "", "continuation_ids": answer,
              "tokens": [f"<{i}>" for i in answer]}
             for text, (prompt, answer) in zip(TEXT, rows, strict=True)]
  models = {"base": values(rows, 0.0), "adapted": values(rows, 1.0)}
  models |= {f"scale {scale:g}": values(rows, scale) for scale in SCALES}
  content = {"version": 1, "chat": True, "prompts": entries, "logprobs": models}
  (tmp_path / "answers.json").write_text(json.dumps(content))
  return tmp_path


def encode(text: str, chat: bool) -> list[int]:
  return (TURN if chat else []) + TEXT[text]


def verified(card: Path, capfd, scale: float, base: int = 0, encode=encode, echoes: bool = False) -> tuple[int, str]:
  """(exit code, text) of task=verify against a server with the given scale and base."""
  adapted = lambda ids: logits(ids, scale, base)
  with completions_server(adapted, lambda ids: logits(ids, 0.0, base), encode, echoes) as url:
    capfd.readouterr()
    code = entry.run(["task=verify", f"verify.adapter={card}", "verify.backend=url", f"verify.url={url}",
                      "verify.base=base"])
  said = capfd.readouterr()
  return code, " ".join((said.out + said.err).split())


@pytest.mark.parametrize("echoes", [False, True], ids=["llama.cpp", "vLLM"])
def test_right_server_has_no_fault(card, capfd, echoes):
  code, said = verified(card, capfd, 1.0, echoes=echoes)
  assert code == 0 and "the server computes the adapted model" in said, said


@pytest.mark.parametrize(("scale", "base", "words"), [
  (0.0, 0, "the adapter is not applied"),
  (2.0, 0, "multiplied by about 2:"),
  (0.25, 0, "multiplied by about 0.25:"),
  (1.0, 3, "another base"),
])  # fmt: skip
def test_fault_of_a_server_is_named(card, capfd, scale, base, words):
  code, said = verified(card, capfd, scale, base)
  assert code == 1 and words in said, said


def test_base_in_fewer_bits_is_told_from_another_one(card, capfd):
  numbers = json.loads((card / "answers.json").read_text())["logprobs"]
  noise = np.random.default_rng(0).normal(size=(2, 6)) * 0.1
  content = {name: (np.array(numbers[name]) + noise).tolist() for name in ("adapted", "base")}
  file = card / "numbers.json"
  file.write_text(json.dumps(content))
  assert entry.run(["task=verify", f"verify.adapter={card}", "verify.backend=file", f"verify.file={file}"]) == 1
  assert "may be the same base in fewer bits" in " ".join(capfd.readouterr().err.split())


def test_another_template_is_named(card, capfd):
  code, said = verified(card, capfd, 1.0, encode=lambda text, chat: [11, 12, *TEXT[text][:1]])
  assert code == 1 and "another chat template" in said, said


def test_numbers_in_a_file_are_compared(card, capfd):
  numbers = json.loads((card / "answers.json").read_text())["logprobs"]
  file = card / "numbers.json"
  words = ["task=verify", f"verify.adapter={card}", "verify.backend=file", f"verify.file={file}"]
  file.write_text(json.dumps({"adapted": numbers["adapted"], "base": numbers["base"]}))
  assert entry.run(words) == 0
  file.write_text(json.dumps({"adapted": numbers["scale 4"]}))
  assert entry.run(words) == 1
  assert "multiplied by about 4:" in " ".join(capfd.readouterr().err.split())
  file.write_text(json.dumps({"adapted": [[1.0]]}))
  assert entry.run(words) == 2
  assert "must be a list of lists of numbers" in " ".join(capfd.readouterr().err.split())


def test_server_that_does_not_answer_is_an_input_error(card, capfd):
  words = ["task=verify", f"verify.adapter={card}", "verify.backend=url", "verify.url=http://127.0.0.1:9"]
  assert entry.run(words) == 2
  assert "no answer" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["{}", '{"version": 1}', '{"version": 1, "prompts": [], "logprobs": {}}', "[1]"])
def test_damaged_card_is_an_input_error(tmp_path, content):
  (tmp_path / "answers.json").write_text(content)
  words = ["task=verify", f"verify.adapter={tmp_path}", "verify.backend=file", f"verify.file={tmp_path}/x"]
  assert entry.run(words) == 2


def problems(*argv: str) -> list[str]:
  with pytest.raises(InputError) as caught:
    check_command_line(list(argv))
  return caught.value.problems


def test_settings_of_exports_and_checks_are_validated():
  assert "needs an exported adapter" in problems("task=verify")[0]
  assert "verify.url=null" in problems("task=verify", "verify.adapter=x", "verify.backend=url")[0]
  assert "must begin with http" in problems("task=verify", "verify.adapter=x", "verify.url=ftp://a")[0]
  assert "choose peft, transformers" in problems("task=verify", "verify.adapter=x", "verify.backend=ollama")[0]
