"""Files that hide something: what is suspicious is said, and unusual forms of rows are read or named."""

import json
import zipfile
from pathlib import Path

import pytest
from corpora import BYTES, PAIRS, jsonl_file

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.documents import Document, Skipped
from lora_exp.data.rows import make_rows
from lora_exp.data.sources import open_source

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def config(path: object, **settings) -> DataConfig:
  return DataConfig(**{"source": "files", "path": str(path), "eval_fraction": 0.5, "seq_len": 64, **settings})


def said(folder: Path, path: object, **settings) -> str:
  return "\n".join(make_rows(config(path, **settings), BYTES, folder / "cache", progress=False).warnings)


def first(path: object, **settings) -> Document:
  document = next(iter(open_source(config(path, **settings)).documents()))
  assert isinstance(document, Document), document
  return document


@pytest.mark.parametrize(("row", "suspicion"), [
  ({"text": "### Human: hi### Assistant: hello"}, "they contain a chat as one text ('### Assistant')"),
  ({"text": "User: hi\nAssistant: hello"}, "they contain a chat as one text ('Assistant:'), so the user turns"),
  ({"prompt": "[INST] hi [/INST]", "response": "a"}, "they contain marks of a chat format ('[/INST]')"),
  ({"messages": [USER, {**ANSWER, "content": "a <|im_start|>assistant b"}]}, "they contain marks of a chat format"),
  ({"prompt": "a", "response": "caf\ufffd"}, "they contain '\ufffd', which stands for characters that were lost"),
  ({"prompt": "a", "response": "cafÃ©"}, "they contain 'Ã©', which is typical of UTF-8 text that was read in another"),
  ({"messages": [USER, {**ANSWER, "content": "donâ€™t"}]}, "they contain 'â€™'"),
  ({"prompt": "a", "response": "b\r\nc"}, r"their lines end in '\r\n', and the '\r' is learned too"),
  ({"prompt": "a", "response": "NaN"}, "an answer is 'NaN', perhaps a missing value"),
  ({"prompt": "a &amp; b", "response": "c"}, "they contain '&amp;', which is HTML"),
  ({"prompt": "a", "response": "b\u200b"}, r"they contain the invisible character '\u200b'"),
  ({"prompt": "Do {input}.", "response": "b"}, "they contain the placeholder '{input}', which was not filled in"),
  ({"prompt": "a", "response": "a"}, "the answer is the prompt"),
  ({"prompt": "What is the capital?", "response": "What is the capital? It is."}, "the answer begins with the prompt"),
  ({"prompt": "a", "response": "b</s>"}, "they contain '</s>', which this tokenizer reads as ordinary text"),
  ({"prompt": "a", "response": r"b\n\nc"}, r"they contain '\n' as two characters instead of line breaks"),
  ({"messages": [USER, {**ANSWER, "content": "None"}]}, "an answer is 'None', perhaps a missing value"),
])
def test_suspicious_texts_are_counted(tmp_path, row, suspicion):
  told = said(tmp_path, jsonl_file(tmp_path, [*PAIRS, row]))
  assert f"1 of 11 documents: {suspicion}" in told and "corpus.jsonl, line 11" in told
  assert said(tmp_path, jsonl_file(tmp_path, PAIRS, "clean.jsonl")) == ""


def test_rows_inside_a_quoted_cell_are_suspected(tmp_path):
  lines = [f"{n}?,{n}!" for n in range(12)]
  lines[3], lines[7] = '3?,"3!', '7?,7!"'
  (tmp_path / "x.csv").write_text("prompt,response\n" + "\n".join(lines) + "\n")
  told = said(tmp_path, tmp_path / "x.csv")
  assert "1 of 8 rows: a quoted cell contains lines that look like rows" in told and "x.csv, line 5" in told
  (tmp_path / "y.csv").write_text('prompt,response\n' + "".join(f'{n}?,"one\ntwo\nthree"\n' for n in range(4)))
  assert "look like rows" not in said(tmp_path, tmp_path / "y.csv")


def test_files_of_a_directory_that_are_not_read_are_named(tmp_path):
  data = tmp_path / "data"
  data.mkdir()
  jsonl_file(data, PAIRS, "a.jsonl")
  jsonl_file(data, PAIRS, ".b.jsonl")
  (data / "notes.txt").write_text("More text.")
  (data / ".gitattributes").write_text("*")
  told = said(tmp_path, data)
  assert "1 file: hidden files are not read" in told and ".b.jsonl" in told and "gitattributes" not in told
  assert "plain text next to files of rows; to read both, give a list of files" in told


def test_lists_of_an_object_that_hold_no_rows_are_named(tmp_path):
  path = tmp_path / "x.json"
  path.write_text(json.dumps({"version": "1", "data": [*PAIRS, "odd"], "more": ["a", "b"]}))
  told = said(tmp_path, path)
  assert "1 of 12 rows: expected a JSON object, got a string (first: x.json, data, row 11" in told
  assert "1 of 12 rows: the list 'more' has no objects, and is not read" in told
  path.write_text(json.dumps({**PAIRS[0], "tools": [{"name": "f"}], "id": 1}))
  assert first(path, eval_path=str(path)).conversation.tools[0]["function"] == {"name": "f"}


def test_byte_order_marks_inside_a_file_are_dropped(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text("\n".join("\ufeff" + json.dumps(pair) for pair in PAIRS))
  assert len(list(open_source(config(path)).documents())) == len(PAIRS) and said(tmp_path, path) == ""


def test_a_last_turn_of_the_user_is_counted(tmp_path):
  rows = [{"messages": [USER, ANSWER, USER]}, {"messages": [USER, ANSWER]}] * 2
  told = said(tmp_path, jsonl_file(tmp_path, rows))
  assert "2 of 4 rows: the last turn is a user turn without an answer" in told


@pytest.mark.parametrize(("row", "turns"), [
  ({"conversations": ["q", "a", "r", "b"]}, "q a r b"),
  ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, "q a"),
  ({"conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}, "q a r b"),
  ({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}, "q a"),
])
def test_unusual_forms_of_conversations_are_read(tmp_path, row, turns):
  conversation = first(jsonl_file(tmp_path, [row])).conversation
  assert conversation is not None
  assert [message["content"] for message in conversation.messages] == turns.split()
  assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * (len(turns.split()) // 2)


def test_rows_of_other_splits_in_one_file_are_counted(tmp_path):
  rows = [{**pair, "split": "train" if n < 7 else "test"} for n, pair in enumerate(PAIRS)]
  told = said(tmp_path, jsonl_file(tmp_path, rows))
  assert "7 of 10 rows: the column 'split' is not read (first: corpus.jsonl, line 1)" in told
  assert "3 of 10 rows: the column 'split' is not read, so its rows of the split 'test' are not held out" in told


def test_other_keys_of_a_pair_of_turns_are_named(tmp_path):
  document = first(jsonl_file(tmp_path, [{"conversation": [{"system": "Be brief.", "human": "q", "bot": "a"}]}]))
  assert document.unread == ("the key 'system' of messages is not read",)


@pytest.mark.parametrize(("answers", "text", "unread"), [
  ({"text": ["a", "b"], "answer_start": [0, 1]}, "a", 1), (["a", "a"], "a", 0), ({"text": []}, None, 0), ([], None, 0)])
def test_the_first_of_several_responses_is_read(tmp_path, answers, text, unread):
  rows = [{"context": "c", "question": "q", "answers": answers}, {"question": "q", "answers": "x"}]
  path = jsonl_file(tmp_path, rows)
  columns = {"prompt": "question", "response": "answers"}
  document = next(iter(open_source(config(path, columns=columns)).documents()))
  if text is None:
    assert isinstance(document, Skipped) and document.reason == "there is no response"
    return
  assert document.text == text and document.prompt == "q"
  assert sum("only the first is read" in message for message in document.unread) == unread


@pytest.mark.parametrize(("row", "message"), [
  ({"question": "q", "answers": "a"}, "no column 'response'.*did you mean answers?"),
  ({"inputs": "q", "targets": "a"}, "no column 'response'.*did you mean targets?"),
  ({"text": "q", "role": "prompter"}, "a row is one message, with its 'role', and not a conversation; write one row"),
  ({"messages": [USER, ANSWER], "chat_template_kwargs": ["x"]}, "the column 'chat_template_kwargs' is not an object"),
])
def test_rows_of_another_form_say_what_to_do(tmp_path, row, message):
  with pytest.raises(InputError, match=message):
    open_source(config(jsonl_file(tmp_path, [row])))


def test_equal_answers_are_told(tmp_path):
  rows = [{"prompt": str(n), "response": "yes"} for n in range(10)]
  assert said(tmp_path, jsonl_file(tmp_path, rows)) == "all answers are the same text"
  rows[3]["response"] = "no"
  assert said(tmp_path, jsonl_file(tmp_path, rows)) == ""


def test_quotes_between_tabs_may_be_part_of_the_cells(tmp_path):
  path = tmp_path / "x.tsv"
  path.write_text('question\tanswer\n"Oh" no\t5" wide\n' + "".join(f'"{n}" a\tb\n' for n in range(4)))
  assert (first(path).prompt, first(path).text) == ('"Oh" no', '5" wide')
  path.write_text('question\tanswer\n"Oh\n""no"""\tb\n' + "a\tb\n" * 4)
  assert first(path).prompt == 'Oh\n"no"'


def test_office_documents_are_called_what_they_are(tmp_path):
  path = tmp_path / "x.xlsx"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("[Content_Types].xml", "<Types/>")
  with pytest.raises(InputError, match="is an Office document .*; export it as CSV or text"):
    open_source(config(path))
