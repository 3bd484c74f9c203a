"""Bad files and settings raise an error of one sentence, and leave nothing in the cache."""

import re
import subprocess
import sys

import pytest
from corpora import BYTES, PAIRS, STORIES, jsonl_file, left_in, text_config, text_file

from lora_exp.config.errors import DiskError, InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.not_learned import MOST_REASONS
from lora_exp.data.rows import make_rows


@pytest.mark.parametrize(("content", "message"), [
  (b"fine\nfine<|endoftext|>bad \xff byte", r"corpus, line 2: byte 26 is not UTF-8 \(invalid start byte\)"),
  (b"a\n" * 10 + b"\xc3", "line 11: byte 20 is not UTF-8"),
  (b"", "corpus contains no text"),
  (b" \n<|endoftext|>\n", "corpus contains no text"),
  (b"only one", "1 of 4 documents is .*gives 1; raise data.eval_fraction or data.limit, or set data.eval_path"),
  (b"<|endoftext|>".join([b"x"] * 3 + [b"yy"]), None),
])
def test_bad_text_is_refused_in_words(tmp_path, content, message):
  (tmp_path / "corpus").write_bytes(content)
  cfg = DataConfig(source="text", path=str(tmp_path / "corpus"), eval_fraction=0.25)
  if message is None:
    assert make_rows(cfg, BYTES, tmp_path).documents == 4  # a letter and the end are enough
    return
  with pytest.raises(InputError, match=message):
    make_rows(cfg, BYTES, tmp_path)
  assert left_in(tmp_path) == []


@pytest.mark.parametrize(("line", "reason"), [
  ('{"prompt": "a", "response": }', "not JSON"),
  ("[1]", "expected a JSON object, got (an array|a number)"),
  ({"prompt": "a", "respones": "b"}, "there is no column 'response'.*did you mean respones"),
  ({"response": "b"}, "there is no column 'prompt'"),
  ('{"prompt": "a", "response": "b", "response": "c"}', "duplicate key 'response'"),
  ({"prompt": "a", "response": 3}, "the response has type int, expected a string"),
  ({"prompt": "a", "response": None}, "there is no response"),
  ('{"prompt": "a", "response": "\\ud800"}', "the response contains an unpaired surrogate"),
  ("[" * 100_000, "JSON nested too deeply"),
])
def test_a_bad_row_is_counted_with_its_line(tmp_path, line, reason):
  path = jsonl_file(tmp_path, [PAIRS[0], line, PAIRS[1], line])
  rows = make_rows(DataConfig(source="jsonl", path=path, eval_fraction=0.5), BYTES, tmp_path)
  [count] = rows.not_learned
  assert (count.count, count.total, count.unit, rows.documents) == (2, 4, "rows", 2)
  assert re.match(reason, count.reason) and "line 2" in count.first
  assert count.reason != "not JSON" or count.first.endswith("line 2: Expecting value at column 29")
  assert make_rows(DataConfig(source="jsonl", path=path, eval_fraction=0.5), BYTES, tmp_path) == rows  # from the cache
  alone = jsonl_file(tmp_path, [line, line], "bad.jsonl")
  with pytest.raises(InputError, match=reason):
    make_rows(DataConfig(source="jsonl", path=alone, eval_fraction=0.5), BYTES, tmp_path)


def test_many_reasons_are_counted_together(tmp_path):
  bad = [{f"column_{n}": "x"} for n in range(100)]
  rows = make_rows(DataConfig(source="files", path=jsonl_file(tmp_path, [*PAIRS, *bad])), BYTES, tmp_path)
  assert len(rows.not_learned) == MOST_REASONS + 1 and rows.not_learned[-1].reason == "other reasons"
  assert sum(count.count for count in rows.not_learned) == 100


def test_jsonl_that_is_not_utf8(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "", "response": "a"}\n{"prompt": "\xe9"}')
  with pytest.raises(InputError, match="line 2: byte 44 is not UTF-8"):
    make_rows(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), eval_fraction=0.5), BYTES, tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
  ({"source": "txt"}, "data.source=txt: choose .*, stdlib, text, .*; did you mean text"),
  ({"source": "stdlib"}, "data.view=null: choose code, docs"),
  ({"path": None}, "data.path=null: give data.path=FILE, a text file"),
  ({"path": "FOLDER/corpsu.txt"}, "data.path=.*corpsu.txt: no such file; did you mean corpus.txt"),
  ({"eval_path": "FOLDER/none.txt"}, "data.eval_path=.*none.txt: no such file"),
  ({"eval_fraction": 0.0}, "data.eval_fraction=0: must be above 0"),
  ({"limit": 3}, "nothing is held out: .*gives 3; raise"),
  ({"source": "stdlib", "view": "docs", "limit": 2}, "1 of 4 files is .*library gives 2; .* or data.limit$"),
  ({"limit": 0}, "data.limit=0 reads nothing"),
  ({"packing": "pad", "seq_len": 1, "eval_path": "FOLDER/corpus.txt"}, "contains no text to evaluate on"),
])
def test_bad_settings_are_refused_in_words(tmp_path, settings, message):
  put = {name: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value
         for name, value in settings.items()}
  with pytest.raises(InputError, match=message):
    make_rows(text_config(tmp_path, **put), BYTES, tmp_path)


def test_data_that_changes_while_it_is_read_is_refused(tmp_path):
  cfg = text_config(tmp_path)

  class Changing(type(BYTES)):
    def encode_batch(self, texts, start=True):
      text_file(tmp_path, [*STORIES, "more"])
      return super().encode_batch(texts)

  with pytest.raises(InputError, match="changed while it was being read"):
    make_rows(cfg, Changing(), tmp_path)
  assert left_in(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from lora_exp.config.schema import DataConfig
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenization import get_tokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
make_rows(DataConfig(source="text", path=sys.argv[1], eval_fraction=0.25), get_tokenizer("bytes"), sys.argv[2])
"""


def test_a_disk_that_takes_no_more_is_a_disk_error(tmp_path):
  path = text_file(tmp_path, ["x" * 10_000] * 20)
  done = subprocess.run([sys.executable, "-c", FULL_DISK, path, tmp_path], capture_output=True, text=True)
  assert DiskError.__name__ in done.stderr.splitlines()[-1]
  assert "free some space" in done.stderr
  assert left_in(tmp_path) == []
