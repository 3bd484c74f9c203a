"""Data files as people have them: the right rows from each format, and what a path is that holds no data."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from corpora import BYTES, PAIRS, jsonl_file, text_file
from tokenizer_files import CHATML, byte_level

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.documents import Document, Skipped
from lora_exp.data.formats.data_files import find_files
from lora_exp.data.rows import make_rows, rows_key
from lora_exp.data.sources import data_facts, open_source, prompt_separator
from lora_exp.data.tokenization import get_tokenizer

TEXTS = [(pair["prompt"], pair["response"]) for pair in PAIRS]
LINES = "\n".join(map(json.dumps, PAIRS))


def config(path: object, **settings) -> DataConfig:
  path = list(map(str, path)) if isinstance(path, list) else str(path)
  return DataConfig(**{"source": "files", "path": path, "eval_fraction": 0.5, **settings})


def documents(path: object, **settings) -> list[Document]:
  """The documents of a source; fails if a row is skipped."""
  found = list(open_source(config(path, **settings)).documents())
  assert not [item for item in found if isinstance(item, Skipped)]
  return [item for item in found if isinstance(item, Document)]


def texts(path: object, **settings) -> list[tuple[str, str]]:
  return [(document.prompt, document.text) for document in documents(path, **settings)]


def write(path: Path, content: str | bytes) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


CSV = "prompt,response\n" + "".join(f"{a},{b}\n" for a, b in TEXTS)
COLUMNS = {"prompt": [a for a, _ in TEXTS], "response": [b for _, b in TEXTS]}
FILES = {
  "lines.jsonl": LINES, "windows.jsonl": "\ufeff" + LINES.replace("\n", "\r\n"), "no_suffix": LINES,
  "array.json": json.dumps(PAIRS, indent=2), "one_line.json": json.dumps(PAIRS), "array.jsonl": json.dumps(PAIRS),
  "objects.json": "\n".join(json.dumps(pair, indent=1) for pair in PAIRS),
  "arrays.json": json.dumps(PAIRS[:4]) + "\n\n" + json.dumps(PAIRS[4:]) + "[]",
  "in_an_object.json": json.dumps({"version": 1, "data": PAIRS}),
  "a_line_each.json": "[\n" + ",\n".join(map(json.dumps, PAIRS)) + "\n]\n",
  "a_line_each.jsonl": "[\n" + ",\n".join(map(json.dumps, PAIRS)) + "\n]\n",
  "lines_inside.json": '{\n"data": [\n' + ",\n".join(map(json.dumps, PAIRS)) + "\n]\n}\n",
  "commas.jsonl": ",\n".join(map(json.dumps, PAIRS)), "columns.json": json.dumps(COLUMNS),
  "pandas.json": json.dumps({name: dict(enumerate(cells)) for name, cells in COLUMNS.items()}),
  "splits.json": json.dumps({"train": PAIRS}),
  "comma.csv": CSV, "semicolon.csv": "\ufeff" + CSV.replace(",", ";"),
  "excel.csv": "sep=;\r\n" + CSV.replace(",", ";"), "tab.tsv": CSV.replace(",", "\t"), "table": CSV,
  "blank_lines.csv": "\n \n" + CSV, "blank_lines_excel.csv": "\r\nsep=;\r\n" + CSV.replace(",", ";"),
  "lines.jsonl.gz": gzip.compress(LINES.encode()), "lines.xz": lzma.compress(LINES.encode()),
  "table.csv.bz2": bz2.compress(CSV.encode()), "array.json.gz": gzip.compress(json.dumps(PAIRS).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_its_rows_whatever_its_format(tmp_path, name):
  assert texts(write(tmp_path / name, FILES[name])) == TEXTS


def test_quoted_cells_hold_line_breaks_and_delimiters(tmp_path):
  table = 'id,Question ,ANSWER\n1,"Who?\nWhy?","He said ""no"", twice"\n\n2,x,y\n'
  found = documents(write(tmp_path / "q.csv", table))
  assert [(d.prompt, d.text) for d in found] == [("Who?\nWhy?", 'He said "no", twice'), ("x", "y")]
  assert found[0].unread == ("the column 'id' is not read",) and [d.where[-1] for d in found] == ["2", "5"]


def test_paths_may_be_patterns_lists_and_directories(tmp_path):
  half = len(PAIRS) // 2
  first = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, PAIRS[:half])))
  second = write(tmp_path / "deep" / "b.csv", "prompt,response\n" + "".join(f"{a},{b}\n" for a, b in TEXTS[half:]))
  write(tmp_path / ".cache" / "hidden.jsonl", "{}")
  for path in ([first, second], tmp_path, tmp_path / "**/[ab].*"):
    found = documents(path)
    assert [(d.prompt, d.text) for d in found] == TEXTS and [d.key for d in found] == list(range(len(PAIRS)))
  keys = {rows_key(cfg, BYTES, open_source(cfg)) for cfg in (config([first, second]), config([second, first]))}
  assert len(keys) == 2
  bracket = write(tmp_path / "x[1].jsonl", LINES)  # a name that is a pattern too
  assert texts(bracket) == TEXTS


def test_a_directory_with_splits_trains_on_train(tmp_path):
  for name, rows in {"train-00000.jsonl": PAIRS[:6], "train-00001.jsonl": PAIRS[6:8], "valid.jsonl": PAIRS[8:]}.items():
    write(tmp_path / "data" / name, "\n".join(map(json.dumps, rows)))
  write(tmp_path / "data" / "README.md", "# about")
  data = tmp_path / "data"
  made = make_rows(config(data), BYTES, tmp_path / "cache")
  assert made.documents == 8
  reasons = {count.reason: count.first for count in made.not_learned}
  advice = "the split 'validation' is not read; data.eval_split=validation evaluates on it"
  assert reasons[advice].endswith("valid.jsonl")
  assert reasons["not a data file"].endswith("README.md")
  (data / "README.md").unlink()
  held = make_rows(config(data, eval_split="valid", eval_fraction=0.9), BYTES, tmp_path / "cache")
  assert (held.documents, held.eval_documents, held.not_learned) == (10, 2, ())
  assert texts(data, train_split="dev") == TEXTS[8:]
  with pytest.raises(InputError, match="no split test; the splits of its files are train, validation"):
    documents(data, train_split="test")


def test_an_object_of_several_splits_needs_a_choice(tmp_path):
  path = write(tmp_path / "all.json", json.dumps({"a": PAIRS[:4], "b": PAIRS[4:]}))
  with pytest.raises(InputError, match="contains the lists a, b; choose one: data.train_split=a"):
    documents(path)
  assert texts(path, train_split="b") == TEXTS[4:]
  for name, content in {"rows.jsonl": LINES, "rows.json": json.dumps(PAIRS)}.items():
    with pytest.raises(InputError, match="no split 'test'.*give data.eval_path=FILE"):
      documents(write(tmp_path / name, content), eval_split="test")


def zipped(content: str) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("a.jsonl", content)
  return file.getvalue()


def tarred(content: str) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w:gz") as archive:
    info = tarfile.TarInfo("a.jsonl")
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content.encode()))
  return file.getvalue()


@pytest.mark.parametrize(("name", "content", "message"), [
  ("a.zip", zipped(LINES), "is a zip archive; unpack it"),
  ("a.tar.gz", tarred(LINES), "is a tar archive; unpack it"),
  ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer .*git lfs pull"),
  ("a.jsonl", b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
  ("a.txt", "text".encode("utf-16"), "is text in UTF-16; convert it to UTF-8"),
  ("a.jsonl", b"\x80\x04\x95\x00", "is a Python pickle"),
  ("a.safetensors", (2).to_bytes(8, "little") + b"{}", r"is a file of tensors .*; give it as model.weights"),
  ("a.bin", b"ab\x00\xff", "is a binary file of unknown kind"),
  ("a.jsonl.gz", gzip.compress(os.urandom(5000))[:-3000], "its gzip data is damaged or truncated"),
  ("a.json", '[{"prompt": "a"\n "response": "b"}]', "line 2: not JSON: Expecting ',' delimiter at column 2; give"),
  ("a.json", json.dumps(PAIRS)[:-1], "line 1: not JSON: Expecting"),
  ("a.gz", gzip.compress(gzip.compress(LINES.encode())), "compressed twice .inside with gzip"),
  ("a.json", json.dumps(PAIRS) + "]", "line 1: not JSON: Expecting value"),
  ("a.csv", "prompt,prompt\na,b\n", "duplicate column 'prompt'"),
  ("a.csv", "Say 0,N 0\nSay 1,N 1\n", "there is no column 'response'; the columns are 'Say 0', 'N 0'.*data.columns="),
  ("a.csv", b"prompt,response\na,\xe9\n", "is not UTF-8"),
  ("a.csv", 'prompt,response\na,"b\n', "after line 1: unexpected end of data; quote cells"),
  ("a.jsonl", "", "contains no text"),
])
def test_what_holds_no_data_is_called_what_it_is(tmp_path, name, content, message):
  with pytest.raises(InputError, match=message):
    make_rows(config(write(tmp_path / name, content)), BYTES, tmp_path / "cache")


def test_devices_pipes_and_empty_directories_are_named(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "empty").mkdir()
  for path, words in {"/dev/zero": "is a device", tmp_path / "pipe": "is a pipe", tmp_path / "x*": "no such file",
                      tmp_path / "empty": "contains no data files"}.items():
    with pytest.raises(InputError, match=words):
      find_files("data.path", str(path))
  with pytest.raises(InputError) as error:
    open_source(config(["/dev/zero", tmp_path / "none"], eval_path=str(tmp_path / "pipe")))
  assert len(error.value.problems) == 3  # all of them are told at once
  write(tmp_path / "a.jsonl", LINES)
  with pytest.raises(InputError, match="a.jsonl is listed twice; list it once"):
    documents([tmp_path / "a.jsonl", tmp_path / "*.jsonl"])


def test_a_text_of_few_documents_is_held_out_in_sections(tmp_path):
  paragraphs = [f"Paragraph {n} says {n * n}.\nIt has two lines." for n in range(40)]
  path = write(tmp_path / "book.txt", "\n\n".join(paragraphs))
  for source in ("files", "text"):
    cfg = config(path, source=source, eval_fraction=0.1)
    found = list(open_source(cfg).documents())
    assert "".join(document.text for document in found) == path.read_text()
    assert all(document.text.startswith("Paragraph") for document in found) and len(found) >= 10
    assert "held out by paragraphs" in str(data_facts(cfg)["sections"])
    assert make_rows(cfg, BYTES, tmp_path / "cache").eval_documents == len(found) // 10
    assert prompt_separator(cfg) is None
  whole = config(path, eval_path=str(path))
  assert "is also trained on" in str(data_facts(whole)["data.eval_path"])
  assert "data.eval_path" not in data_facts(config(path))
  assert [document.text for document in open_source(whole).documents()] == [path.read_text()]


@pytest.mark.parametrize(("text", "unit"), [
  ("\n".join(f"line {n}" for n in range(12)), "lines"), (" ".join(f"Sentence {n}." for n in range(12)), "sentences"),
  (" ".join(map(str, range(12))), "words"), ("word" * 9, None),
])
def test_a_text_is_divided_at_the_first_boundary_there_is(tmp_path, text, unit):
  cfg = config(write(tmp_path / "x.txt", text), eval_fraction=0.1)
  assert open_source(cfg).reader.text_files.boundary == unit
  if unit is None:
    with pytest.raises(InputError, match="nothing is held out"):
      make_rows(cfg, BYTES, tmp_path / "cache")


def test_rows_that_are_read_as_text_are_named(tmp_path):
  cfg = config(write(tmp_path / "a.jsonl", LINES), source="text")
  assert data_facts(cfg)["format"] == "plain text; it looks like JSON lines, whose rows data=files reads"


def test_a_text_that_begins_with_a_bracket_is_text(tmp_path):
  path = write(tmp_path / "song.txt", "[Verse 1]\nla la\n")
  assert [document.text for document in documents(path, eval_path=str(path))] == [path.read_text()]


def test_text_and_rows_may_be_mixed(tmp_path):
  mixed = [Path(text_file(tmp_path, ["one", "two"])), Path(jsonl_file(tmp_path, [PAIRS[0], {"text": "three"}]))]
  found = documents(mixed, eval_path=str(mixed[0]))
  assert [(d.key, d.prompt, d.text) for d in found] == [
    (0, "", "one"), (1, "", "two"), (2, *TEXTS[0]), (3, "", "three")]


def test_the_name_jsonl_reads_the_same_and_keeps_its_keys(tmp_path):
  path = jsonl_file(tmp_path, PAIRS)
  old = DataConfig(source="jsonl", path=path, eval_fraction=0.5)
  source = open_source(old)
  assert source.settings() == {"prompt_field": "prompt", "response_field": "response"}
  assert re.fullmatch("[0-9a-f]{64}", source.digest()) and source.digest() != open_source(
    config(write(tmp_path / "a.json", FILES["array.json"]))).digest()
  assert [(d.prompt, d.text) for d in source.documents()] == TEXTS


def test_a_conversation_that_the_template_refuses_is_counted(tmp_path):
  refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
  tokenizer = get_tokenizer(str(byte_level(tmp_path, chat_template=refusing)))
  turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "x"}, *turns]}, {"messages": turns}] * 2
  made = make_rows(config(jsonl_file(tmp_path, rows), seq_len=64), tokenizer, tmp_path / "cache")
  [count] = [count for count in made.not_learned if "no system" in count.reason]
  assert (count.count, count.total, made.documents) == (2, 6, 4) and count.first.endswith("line 2")
  refused = jsonl_file(tmp_path, rows[1:2] * 4, "refused.jsonl")
  with pytest.raises(InputError, match="^the chat template of .* fails: no system"):
    make_rows(config(refused), tokenizer, tmp_path / "cache")


def test_a_key_that_stands_twice_costs_one_row(tmp_path):
  content = '[{"prompt": "a", "prompt": "b", "response": "c"},\n' + json.dumps(PAIRS)[1:]
  skipped, *rest = open_source(config(write(tmp_path / "a.json", content))).documents()
  assert isinstance(skipped, Skipped) and skipped.reason == "duplicate key 'prompt'"
  assert skipped.where == "a.json, row 1" and len(rest) == len(PAIRS)


def test_a_copy_that_is_held_out_is_named(tmp_path):
  learned, copy, other = (write(tmp_path / f"{name}.jsonl", LINES) for name in ("learned", "copy", "other"))
  other.write_text(LINES.upper())
  for held_out, said in ((learned, True), (copy, True), (other, False)):
    facts = data_facts(config(learned, eval_path=str(held_out)))
    assert ("data.eval_path" in facts) == said
