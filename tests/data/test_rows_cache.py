"""Rows are written once, under a key of everything that determines them."""


import pytest
from corpora import BYTES, STORIES, text_config, text_file

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.ngram import bigram_loss
from lora_exp.data.pipeline import train_batches
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenization import get_tokenizer


def test_rows_are_made_once(tmp_path):
  first = make_rows(text_config(tmp_path), BYTES, tmp_path)
  before = first.file("train").stat()
  second = make_rows(text_config(tmp_path, shuffle=False, seed=9, view="code"), BYTES, tmp_path)
  after = second.file("train").stat()
  assert (first, before.st_ino, before.st_mtime_ns) == (second, after.st_ino, after.st_mtime_ns)


def test_rows_are_named_by_what_made_them(tmp_path):
  first = make_rows(text_config(tmp_path), BYTES, tmp_path)
  different = [make_rows(text_config(tmp_path, **{"documents": STORIES, **settings}), tokenizer, tmp_path).fingerprint
               for settings, tokenizer in [
                 ({}, get_tokenizer("gpt2_4096")), ({"seq_len": 17}, BYTES), ({"packing": "pad"}, BYTES),
                 ({"packing": "pad", "pad_in_loss": True}, BYTES), ({"limit": 30}, BYTES),
                 ({"eval_fraction": 0.5}, BYTES), ({"documents": [*STORIES, "more"]}, BYTES)]]
  assert len({first.fingerprint, *different}) == 8
  moved = text_file(tmp_path, STORIES, "moved.txt")
  assert make_rows(text_config(tmp_path, path=moved), BYTES, tmp_path).fingerprint == first.fingerprint


def test_damaged_rows_are_not_trained_on_and_made_again(tmp_path, capfd):
  cfg = text_config(tmp_path)
  rows = make_rows(cfg, BYTES, tmp_path)
  good = rows.file("train").read_bytes()
  content = bytearray(good)
  content[content.index(b"S\0t\0o\0r\0y")] ^= 1
  rows.file("train").write_bytes(content)
  with pytest.raises(InputError, match="is damaged; run the command again to recreate it"):
    next(train_batches(rows, DataConfig(shuffle=False), rows.train_rows))
  with pytest.raises(InputError, match="is damaged"):
    bigram_loss(rows)
  damages = [(bytes(content), "train.array_record"), (good[:100], "train.array_record"), (b"{", "meta.json")]
  for damaged, name in damages:
    (rows.path / name).write_bytes(damaged)
    assert make_rows(cfg, BYTES, tmp_path) == rows
    assert f"is damaged (changed: {name})" in capfd.readouterr().err
    assert rows.file("train").read_bytes() == good


def test_the_same_bytes_in_another_format_are_other_rows(tmp_path):
  """The suffix decides how a table is read, and the content alone names the data."""
  table = "q,a\n" + "".join(f'"question {n}, what?","answer {n}"\n' for n in range(12))
  counts = []
  for suffix in ("txt", "csv"):
    file = tmp_path / f"rows.{suffix}"
    file.write_text(table)
    cfg = DataConfig(source="files", path=str(file), columns={"prompt": "q", "response": "a"}, seq_len=32)
    counts.append(make_rows(cfg, BYTES, tmp_path / "cache").all_documents)
  assert counts == [13, 12]
