"""`prompt_file=` holds prompts of one line or of several."""

import json

import pytest

from lora_exp.config.errors import InputError
from lora_exp.data.prompts import read_prompts

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere"}]


def test_a_text_file_has_a_prompt_per_line(tmp_path):
  (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n two \n".encode())
  assert read_prompts(str(tmp_path / "a.txt")) == ["one", " two "]


def test_lines_of_json_hold_whole_prompts(tmp_path):
  lines = [{"prompt": "a\nb"}, "c\nd", {"messages": MESSAGES}, MESSAGES, {"prompt": MESSAGES, "response": "x"}]
  (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
  expected = ["a\nb", "c\nd", MESSAGES, MESSAGES, MESSAGES]
  assert read_prompts(str(tmp_path / "a.jsonl")) == expected
  (tmp_path / "a.json").write_text(json.dumps(lines, indent=1))
  assert read_prompts(str(tmp_path / "a.json")) == expected
  (tmp_path / "b.json").write_text(json.dumps(MESSAGES))
  assert read_prompts(str(tmp_path / "b.json")) == [MESSAGES]


def test_only_line_breaks_end_a_prompt(tmp_path):
  texts = ["one\u2028two", "three\x0cfour", "five\x85six"]
  (tmp_path / "a.jsonl").write_text("\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts))
  (tmp_path / "a.txt").write_text("\n".join(texts))
  assert read_prompts(str(tmp_path / "a.jsonl")) == read_prompts(str(tmp_path / "a.txt")) == texts


def test_each_file_of_a_directory_or_a_list_is_a_prompt(tmp_path):
  for name, text in (("2.txt", "c\nd\n\n"), ("1.md", "a\n\nb"), (".hidden", "x"), ("empty.txt", "\n")):
    (tmp_path / name).write_text(text)
  assert read_prompts(str(tmp_path)) == ["a\n\nb", "c\nd"]
  assert read_prompts([str(tmp_path / "2.txt")]) == ["c\nd"]


@pytest.mark.parametrize(("name", "content", "words"), [
  ("a.jsonl", b'"ok"\n{"prompt"\n', "line 2: is not JSON"), ("a.jsonl", b'{"text": "a"}', "line 1: is no prompt"),
  ("a.json", b'[1]', "prompt 1: is no prompt"), ("a.json", b"[" * 100_000, "is not JSON"),
  ("a.jsonl", b'[{"role": "user"}]', "is no prompt"),
  ("a.jsonl", b'{"prompt": "a", "system": "b"}', "line 1: 'system' is not read beside 'prompt'"),
  ("a.jsonl", b'{"prompt": "a", "input": "dog"}', "line 1: 'input' is not read beside 'prompt'"),
  ("a.txt", b" \n", "contains no prompt"),
  ("a.txt", "Café".encode("latin-1"), "not UTF-8 text: byte 3")])
def test_files_without_prompts_are_refused_in_one_sentence(tmp_path, name, content, words):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=words) as error:
    read_prompts(str(tmp_path / name))
  assert len(error.value.problems) == 1 and name in str(error.value)
