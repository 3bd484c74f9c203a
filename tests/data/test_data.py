"""Text in, batches out: nothing lost, nothing leaked, the same again after a resume."""

import ast
import io
import itertools
import json
import math
import subprocess
import sys
import tempfile
import tokenize
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.config.errors import DiskError, InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data import python_text, row_writer
from lora_exp.data.ngram import bigram_loss
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows, make_rows
from lora_exp.data.sources import stdlib, text
from lora_exp.data.sources.base import Document
from lora_exp.data.tokenizers import get_tokenizer
from lora_exp.data.tokenizers.tokenizer import ControlTokens, PieceTokenizer

BYTES = get_tokenizer("bytes")
STORIES = [f"Story {n}:\n" + " ".join(str(n * 7919 * k % 10007) for k in range(1, n % 9 + 3)) for n in range(40)]


def text_file(folder: Path, documents: list[str], name: str = "corpus.txt") -> str:
  path = folder / name
  path.write_bytes("<|endoftext|>".join(documents).encode())
  return str(path)


def jsonl_file(folder: Path, lines: list[object], name: str = "corpus.jsonl") -> str:
  path = folder / name
  path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
  return str(path)


def text_config(folder: Path, documents: list[str] = STORIES, **settings) -> DataConfig:
  return DataConfig(**{"source": "text", "path": text_file(folder, documents), "eval_fraction": 0.25, "seq_len": 16,
                       **settings})


def every_row(rows: Rows, split: str) -> dict[str, np.ndarray]:
  """All rows of a split in the order they were made."""
  if split == "eval":
    batches = list(eval_batches(rows, rows.eval_rows, None))
  else:
    batches = list(itertools.islice(train_batches(rows, DataConfig(shuffle=False), rows.train_rows), 1))
  assert len(batches) == 1
  return batches[0]


def documents_in(batch: dict[str, np.ndarray], eot: int) -> list[list[int]]:
  """Packed rows put together again: a piece goes on where the one before it did not end with `eot`."""
  documents: list[list[int]] = []
  open_document = False
  for tokens, targets, segments, positions, weights in zip(
      *(batch[name] for name in ("tokens", "targets", "segments", "positions", "weights")), strict=True):
    assert (weights == (segments > 0)).all()
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      assert here.any()
      assert positions[here].tolist() == list(range(here.sum()))
      assert tokens[here][1:].tolist() == targets[here][:-1].tolist(), "a target is not the next token of its piece"
      if open_document:
        assert documents[-1][-1] == tokens[here][0], "a document goes on with another token"
      else:
        documents.append([int(tokens[here][0])])
      documents[-1] += targets[here].tolist()
      open_document = documents[-1][-1] != eot
  assert not open_document
  return documents


def left_in(cache: Path) -> list[str]:
  """What making rows left in the cache, but for the lock files."""
  return [path.name for path in (cache / "rows").iterdir() if path.suffix != ".lock"]


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# tokenizers


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


# packing


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff<"), min_size=1, max_size=40).filter(str.strip)


@given(documents=st.lists(TEXT, min_size=2, max_size=12), seq_len=st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_packed_rows_hold_every_document_exactly_and_nothing_else(documents, seq_len):
  with tempfile.TemporaryDirectory() as folder:
    rows = make_rows(text_config(Path(folder), documents, eval_fraction=0.5, seq_len=seq_len), BYTES, folder)
    for split, expected in (("train", documents[::2]), ("eval", documents[1::2])):
      batch = every_row(rows, split)
      assert documents_in(batch, BYTES.eot) == [BYTES.encode(text) + [BYTES.eot] for text in expected]
      targets = sum(len(text.encode()) for text in expected)  # every token but the first, and the end
      assert batch["weights"].sum() == targets == (rows.train_tokens if split == "train" else rows.eval_tokens)
      assert len(batch["tokens"]) == -(-targets // seq_len)  # no position is wasted
    assert rows.eval_bytes == sum(len(text.encode()) - 1 for text in documents[1::2])
    assert (rows.documents, rows.eval_documents) == (len(documents), len(documents) // 2)


def test_rows_do_not_depend_on_how_much_is_tokenised_at_once(tmp_path, monkeypatch):
  whole = make_rows(text_config(tmp_path), BYTES, tmp_path / "a")
  monkeypatch.setattr(row_writer, "BATCH", 50)
  parts = make_rows(text_config(tmp_path), BYTES, tmp_path / "b")
  for split in ("train", "eval"):
    assert_equal(every_row(whole, split), every_row(parts, split))


def test_a_vocabulary_above_uint16_is_kept(tmp_path):
  class Wide(PieceTokenizer):
    def encode_batch(self, texts, start=True):
      return [[99_000 + byte for byte in text.encode()] for text in texts]

  wide = Wide("wide", "wide", [b"x"] * 100_000, ControlTokens({}, 99_999))
  batch = every_row(make_rows(text_config(tmp_path), wide, tmp_path), "eval")
  assert documents_in(batch, wide.eot) == [wide.encode(text) + [wide.eot] for text in STORIES[3::4]]


# padding


def tutorial(text: str, seq_len: int) -> tuple[list[int], list[int]]:
  """A row of the JAX tutorial: cut at seq_len, padded with 0; targets moved by one."""
  tokens = (BYTES.encode(text) + [BYTES.eot])[:seq_len]
  tokens += [0] * (seq_len - len(tokens))
  return tokens, tokens[1:] + [0]


@pytest.mark.parametrize("pad_in_loss", [False, True])
def test_padded_rows_are_the_tutorials(tmp_path, pad_in_loss):
  cfg = text_config(tmp_path, packing="pad", pad_in_loss=pad_in_loss, seq_len=40)
  rows = make_rows(cfg, BYTES, tmp_path)
  held = STORIES[3::4]
  batch = every_row(rows, "eval")
  assert [tutorial(text, 40) for text in held] == list(
    zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True))
  lengths = [40 if pad_in_loss else min(40, len(text) + 1) for text in held]
  counted = lengths if pad_in_loss else [length - 1 for length in lengths]  # the last target is cut off or none
  for length, count, row in zip(lengths, counted, range(len(held)), strict=True):
    assert batch["segments"][row].tolist() == [1] * length + [0] * (40 - length)
    assert batch["positions"][row].tolist() == list(range(length)) + [0] * (40 - length)
    assert batch["weights"][row].tolist() == [1.0] * count + [0.0] * (40 - count)
  assert rows.eval_tokens == sum(counted)
  assert rows.eval_bytes == sum(min(39, len(text) - 1) for text in held)  # padding spells nothing
  assert rows.truncated == sum(len(text) + 1 > 40 for text in STORIES) > 0


# prompts and responses


PAIRS = [{"prompt": f"{n}+1=", "response": f"{n + 1}!"} for n in range(10)]


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_only_the_response_and_the_end_are_learned(tmp_path, packing):
  cfg = DataConfig(source="jsonl", path=jsonl_file(tmp_path, PAIRS), eval_fraction=0.5, seq_len=16, packing=packing)
  rows = make_rows(cfg, BYTES, tmp_path)
  batch = every_row(rows, "eval")
  learned = batch["targets"][batch["weights"] > 0].tolist()
  assert learned == [i for pair in PAIRS[1::2] for i in [*pair["response"].encode(), BYTES.eot]]
  assert rows.eval_tokens == len(learned)
  assert rows.eval_bytes == sum(len(pair["response"]) for pair in PAIRS[1::2])
  read = batch["tokens"][batch["segments"] > 0].tolist()
  assert bytes(i for i in read if i < 256) == b"".join((p["prompt"] + p["response"]).encode() for p in PAIRS[1::2])


def test_a_prompt_may_be_empty_and_fields_may_have_other_names(tmp_path):
  path = jsonl_file(tmp_path, [{"q": "", "a": "yes", "more": 1}, "", {"q": "", "a": "no"}])
  cfg = DataConfig(source="jsonl", path=path, eval_fraction=0.5, seq_len=8, prompt_field="q", response_field="a")
  batch = every_row(make_rows(cfg, BYTES, tmp_path), "eval")
  assert batch["targets"][batch["weights"] > 0].tolist() == [ord("o"), BYTES.eot]


def test_a_prompt_that_fills_the_row_leaves_nothing_to_learn(tmp_path):
  long = {"prompt": "x" * 50, "response": "y"}
  path = jsonl_file(tmp_path, [PAIRS[0], PAIRS[1], long, long])
  rows = make_rows(DataConfig(source="jsonl", path=path, eval_fraction=0.5, seq_len=16, packing="pad"), BYTES, tmp_path)
  assert (rows.train_rows, rows.eval_rows, rows.documents, rows.truncated) == (1, 1, 2, 2)


# sources


def first_files(view: str, count: int) -> list[Document]:
  """The documents of the first `count` files of the standard library."""
  with closing(stdlib.StandardLibrary(view).documents()) as documents:
    return list(itertools.takewhile(lambda document: document.key < count, documents))


def test_the_librarys_code_has_no_docstring_and_no_comment():
  texts = [document.text for document in first_files("code", 40)]
  assert len(texts) > 30
  for code in texts:
    documented = [n for n in ast.walk(ast.parse(code)) if isinstance(n, python_text.DOCUMENTED)]
    assert [ast.get_docstring(node) for node in documented] == [None] * len(documented)
    assert tokenize.COMMENT not in {token.type for token in tokenize.generate_tokens(io.StringIO(code).readline)}


def test_both_views_of_a_file():
  file = b'"""Module."""\nclass A:\n  """Class.\n\n  More."""\n  async def f(self):\n    """Function."""  # why\n'
  assert python_text.texts_of(file, "docs") == ["Module.", "Class.\n\nMore.", "Function."]
  assert python_text.texts_of(file, "code") == ["class A:\n\n    async def f(self):\n        pass"]
  assert python_text.texts_of(b"print 'python 2'", "code") == []
  assert python_text.texts_of(b"null \0 byte", "code") == []


@pytest.mark.parametrize("workers", [1, 3])
def test_parsing_in_processes_keeps_the_order(workers):
  paths = stdlib.library_files()[:25]
  expected = [python_text.texts_of(path.read_bytes(), "docs") for path in paths]
  assert list(stdlib.parsed(paths, "docs", workers)) == expected


def test_the_library_leaves_out_tests_and_installed_packages():
  root = Path(ast.__file__).parent
  names = [path.relative_to(root).as_posix() for path in stdlib.library_files()]
  assert names == sorted(names)
  assert {"ast.py", "json/decoder.py"} <= set(names)
  assert not [name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]


def test_docstrings_of_a_file_are_held_out_together(tmp_path):
  cfg = DataConfig(view="docs", limit=20, seq_len=64)
  rows = make_rows(cfg, BYTES, tmp_path)
  held = [d.text for d in first_files("docs", 20) if d.key in (9, 19)]
  assert documents_in(every_row(rows, "eval"), BYTES.eot) == [BYTES.encode(text) + [BYTES.eot] for text in held]


def test_documents_are_split_wherever_the_blocks_end():
  content = b"one<|endoftext|>two<|endo<|endoftext|><|endoftext|>three"
  for block in range(1, len(content) + 1):
    found = [piece for piece, _ in text.split_documents(io.BytesIO(content), block)]
    assert found == [b"one", b"two<|endo", b"", b"three"]


@pytest.mark.parametrize("block", [7, 1000])
def test_a_long_document_is_cut_at_newlines_and_between_characters(monkeypatch, block):
  monkeypatch.setattr(text, "LONGEST", 64)
  content = ("word " * 30 + "\n" + "é" * 101 + "<|endoftext|>end\n" * 2).encode()
  pieces = [piece for piece, _ in text.split_documents(io.BytesIO(content), block)]
  assert max(map(len, pieces)) <= 64
  assert b"".join(pieces) == content.replace(b"<|endoftext|>", b"")
  assert pieces == [piece for piece, _ in text.split_documents(io.BytesIO(content))]
  assert "".join(piece.decode() for piece in pieces).count("é") == 101  # each piece decodes by itself


def peak_memory(work: Callable[[], object]) -> int:
  tracemalloc.start()
  try:
    work()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_a_large_file_is_read_in_bounded_memory(tmp_path):
  path = tmp_path / "large.txt"
  with path.open("w") as file:
    for n in range(24):
      file.write(f"{n} word\n" * 2**17 + ("<|endoftext|>" if n % 2 else ""))  # 1.2 to 2.4 MB each: cut
  assert path.stat().st_size > 20 * 2**20
  lengths: list[int] = []
  assert peak_memory(lambda: lengths.extend(len(d.text) for d in text.Text(str(path)).documents())) < 12 * 2**20
  assert text.LONGEST // 2 < max(lengths) <= text.LONGEST


@pytest.mark.thorough
def test_rows_are_made_in_memory_that_does_not_grow_with_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(row_writer, "BATCH", 2**16)
  document = "A line of the story.\n" * 200
  small, large = (text_config(tmp_path, [document] * count, path=text_file(tmp_path, [document] * count, f"{count}"))
                  for count in (600, 1800))
  assert Path(large.path or "").stat().st_size > 7 * 2**20
  first, second = (peak_memory(lambda cfg=cfg: make_rows(cfg, BYTES, tmp_path)) for cfg in (small, large))
  assert second < 1.1 * first


def test_limit_and_an_own_file_of_held_out_documents(tmp_path):
  held = text_file(tmp_path, STORIES[30:], "held.txt")
  rows = make_rows(text_config(tmp_path, STORIES[:30], eval_path=held, limit=4), BYTES, tmp_path)
  for split, texts in (("train", STORIES[:4]), ("eval", STORIES[30:34])):
    assert documents_in(every_row(rows, split), BYTES.eot) == [BYTES.encode(t) + [BYTES.eot] for t in texts]


def test_blank_documents_and_a_byte_order_mark_are_no_text(tmp_path):
  rows = make_rows(text_config(tmp_path, ["\ufeffone", "\n", "two", " "], eval_fraction=0.5), BYTES, tmp_path)
  assert documents_in(every_row(rows, "train"), BYTES.eot) == [[*b"one", BYTES.eot]]
  assert documents_in(every_row(rows, "eval"), BYTES.eot) == [[*b"two", BYTES.eot]]


# errors


@pytest.mark.parametrize(("content", "message"), [
  (b"fine\nfine<|endoftext|>bad \xff byte", r"corpus, line 2: byte 26 is not UTF-8 \(invalid start byte\)"),
  (b"a\n" * 10 + b"\xc3", "line 11: byte 20 is not UTF-8"),
  (b"", "corpus holds no text"),
  (b" \n<|endoftext|>\n", "corpus holds no text"),
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


@pytest.mark.parametrize(("line", "message"), [
  ('{"prompt": "a", "response": }', "line 2: not JSON: Expecting value at column 29"),
  ("[1]", "line 2: a JSON object is expected, this is list"),
  ({"prompt": "a", "respones": "b"}, "line 2: no field 'response'.*did you mean respones"),
  ({"response": "b"}, "line 2: no field 'prompt'"),
  ({"prompt": "a", "response": 3}, "line 2: the field 'response' holds int, a string is expected"),
  ({"prompt": "a", "response": None}, "line 2: the field 'response' holds NoneType"),
  ('{"prompt": "a", "response": "\\ud800"}', "line 2: the field 'response' holds half of a surrogate pair"),
  ("[" * 100_000, "line 2: "),
])
def test_bad_jsonl_names_the_line_and_the_reason(tmp_path, line, message):
  path = jsonl_file(tmp_path, [PAIRS[0], line, PAIRS[1]])
  with pytest.raises(InputError, match=message):
    make_rows(DataConfig(source="jsonl", path=path, eval_fraction=0.5), BYTES, tmp_path)


def test_jsonl_that_is_not_utf8(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "", "response": "a"}\n{"prompt": "\xe9"}')
  with pytest.raises(InputError, match="line 2: byte 44 is not UTF-8"):
    make_rows(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), eval_fraction=0.5), BYTES, tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
  ({"source": "txt"}, "data.source=txt: choose .*, stdlib, text, .*; did you mean text"),
  ({"source": "stdlib"}, "data.view=null: choose code, docs"),
  ({"path": None}, "data.path=null: give data.path=FILE, a text file"),
  ({"path": "FOLDER/corpsu.txt"}, "data.path=.*corpsu.txt: no such file; did you mean corpus.txt"),
  ({"path": "FOLDER"}, "data.path=.*: is a directory; give a file"),
  ({"eval_path": "FOLDER/none.txt"}, "data.eval_path=.*none.txt: no such file"),
  ({"eval_fraction": 0.0}, "data.eval_fraction=0: must be above 0"),
  ({"limit": 3}, "nothing is held out: .*gives 3; raise"),
  ({"source": "stdlib", "view": "docs", "limit": 2}, "1 of 4 files is .*library gives 2; .* or data.limit$"),
  ({"limit": 0}, "data.limit=0 reads nothing"),
  ({"packing": "pad", "seq_len": 1, "eval_path": "FOLDER/corpus.txt"}, "holds no text to evaluate on"),
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

  with pytest.raises(InputError, match="changed while it was read"):
    make_rows(cfg, Changing(), tmp_path)
  assert left_in(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from lora_exp.config.schema import DataConfig
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenizers import get_tokenizer
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


# the cache


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


def test_damaged_rows_are_noticed_and_not_trained_on(tmp_path):
  cfg = text_config(tmp_path)
  rows = make_rows(cfg, BYTES, tmp_path)
  content = bytearray(rows.file("train").read_bytes())
  content[content.index(b"S\0t\0o\0r\0y")] ^= 1
  rows.file("train").write_bytes(content)
  with pytest.raises(InputError, match="is damaged: delete that directory"):
    next(train_batches(rows, DataConfig(shuffle=False), rows.train_rows))
  with pytest.raises(InputError, match="is damaged"):
    bigram_loss(rows)
  rows.file("train").write_bytes(content[:100])
  with pytest.raises(InputError, match="is damaged"):
    make_rows(cfg, BYTES, tmp_path)
  (rows.path / "meta.json").write_text("{")
  with pytest.raises(InputError, match="is damaged"):
    make_rows(cfg, BYTES, tmp_path)


# batches


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
  folder = tmp_path_factory.mktemp("rows")
  return make_rows(text_config(folder), BYTES, folder)


def batches(rows: Rows, count: int, size: int = 8, start: int = 0, **settings) -> list[dict[str, np.ndarray]]:
  return list(itertools.islice(train_batches(rows, DataConfig(**settings), size, start), count))


def row_ids(rows: Rows, batch: dict[str, np.ndarray]) -> list[int]:
  """The number of each of the batch's rows in the order they were made."""
  numbers = {row["tokens"].tobytes(): n for n, row in enumerate(each_row(every_row(rows, "train")))}
  assert len(numbers) == rows.train_rows  # no two are equal
  return [numbers[row["tokens"].tobytes()] for row in each_row(batch)]


def each_row(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
  return [{name: array[n] for name, array in batch.items()} for n in range(len(batch["tokens"]))]


def test_a_batch_has_the_promised_arrays(rows):
  batch, = batches(rows, 1)
  assert {name: (str(array.dtype), array.shape) for name, array in batch.items()} == {
    name: ("float32" if name == "weights" else "int32", (8, 16))
    for name in ("tokens", "targets", "weights", "segments", "positions")}


@pytest.mark.parametrize("start", [1, 7, 11, 12, 40])
def test_starting_at_a_batch_gives_what_iterating_there_gives(rows, start):
  assert 8 * 11 < rows.train_rows * 2 < 8 * 40  # the starts lie in several epochs
  for one, other in zip(batches(rows, 45)[start:], batches(rows, 45 - start, start=start), strict=True):
    assert_equal(one, other)


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(rows):
  epochs = [row_ids(rows, batch) for batch in batches(rows, 3, rows.train_rows)]
  assert [sorted(epoch) for epoch in epochs] == [list(range(rows.train_rows))] * 3
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_and_not_on_the_batch_size(rows):
  def order(size: int, **settings) -> list[int]:
    return [i for batch in batches(rows, 48 // size, size, **settings) for i in row_ids(rows, batch)]

  assert order(4) == order(16) != order(16, seed=1)
  assert order(4, shuffle=False) == [n % rows.train_rows for n in range(48)]


def test_a_batch_may_be_larger_than_the_corpus(tmp_path):
  rows = make_rows(text_config(tmp_path, STORIES[:4]), BYTES, tmp_path)
  batch, = batches(rows, 1, 64)
  assert rows.train_rows < 64
  assert set(Counter(row_ids(rows, batch)).values()) <= {64 // rows.train_rows, 64 // rows.train_rows + 1}


def test_evaluation_takes_all_rows_in_order_and_fills_the_last_batch(rows):
  size = rows.eval_rows // 3 + 1
  found = list(eval_batches(rows, size, None))
  assert [len(batch["tokens"]) for batch in found] == [size] * 3
  assert sum(batch["weights"].sum() for batch in found) == rows.eval_tokens
  joined = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
  assert_equal({name: array[: rows.eval_rows] for name, array in joined.items()}, every_row(rows, "eval"))
  assert len(joined["tokens"]) > rows.eval_rows
  assert not joined["weights"][rows.eval_rows :].any()
  assert not joined["segments"][rows.eval_rows :].any()


def test_evaluation_of_some_tokens_is_spread_over_all_rows(rows):
  ids = [row["tokens"].tobytes() for row in each_row(every_row(rows, "eval"))]
  batch, = eval_batches(rows, 4, 4 * 16)
  chosen = [ids.index(row["tokens"].tobytes()) for row in each_row(batch)]
  assert batch["weights"].sum() == 64
  assert chosen == [n * rows.eval_rows // 4 for n in range(4)]
  assert sum(b["weights"].sum() for b in eval_batches(rows, 4, 10**9)) == rows.eval_tokens
  assert len(list(eval_batches(rows, 4, 1))) == 1


LEAVE_EARLY = """
import sys
from lora_exp.config.schema import DataConfig
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenizers import get_tokenizer
cfg = DataConfig(source="text", path=sys.argv[1], eval_fraction=0.25)
rows = make_rows(cfg, get_tokenizer("bytes"), sys.argv[2])
assert "jax" not in sys.modules, "rows need no jax"
from lora_exp.data.pipeline import train_batches
batches = train_batches(rows, DataConfig(), 8)
next(batches)
from jax._src import xla_bridge
assert not xla_bridge._backends, "the pipeline started a device"
"""


def test_a_program_that_leaves_early_ends_and_no_device_is_started(tmp_path):
  done = subprocess.run([sys.executable, "-c", LEAVE_EARLY, text_file(tmp_path, STORIES), tmp_path], timeout=60,
                        capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")


# counting


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_the_bigram_is_that_of_plain_counting(tmp_path, packing):
  rows = make_rows(text_config(tmp_path, packing=packing), BYTES, tmp_path)

  def pairs(split: str) -> list[tuple[int, int]]:
    batch = every_row(rows, split)
    counted = batch["weights"] > 0
    return list(zip(batch["tokens"][counted].tolist(), batch["targets"][counted].tolist(), strict=True))

  both, ones, firsts = Counter(pairs("train")), Counter(b for _, b in pairs("train")), Counter(
    a for a, _ in pairs("train"))

  def p(a: int, b: int) -> float:
    unigram = (ones[b] + 1) / (ones.total() + 257)
    return 0.7 * both[a, b] / firsts[a] + 0.3 * unigram if firsts[a] else unigram

  assert sum(p(ord("S"), b) for b in range(257)) == pytest.approx(1)
  assert bigram_loss(rows) == pytest.approx(-np.mean([math.log(p(a, b)) for a, b in pairs("eval")]), rel=1e-12)


def test_counting_in_blocks_changes_nothing(rows, monkeypatch):
  whole = bigram_loss(rows)
  monkeypatch.setattr("lora_exp.data.ngram.BLOCK", 3)
  assert bigram_loss(rows) == pytest.approx(whole, rel=1e-12)
