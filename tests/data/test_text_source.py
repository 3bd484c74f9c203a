"""Text files as a source: documents of any length, in bounded memory."""

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from corpora import (
  BYTES,
  STORIES,
  documents_in,
  every_row,
  text_config,
  text_file,
)

from lora_exp.data.encoding import source_writer
from lora_exp.data.rows import make_rows
from lora_exp.data.sources import text


def test_documents_are_split_wherever_the_blocks_end():
  content = b"one<|endoftext|>two<|endo<|endoftext|><|endoftext|>three"
  for block in range(1, len(content) + 1):
    found = [piece for piece, _ in text.split_documents(io.BytesIO(content), block)]
    assert found == [b"one", b"two<|endo", b"", b"three"]


@pytest.mark.parametrize("block", [7, 1000])
def test_a_long_document_is_cut_between_lines_or_characters(monkeypatch, block):
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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(source_writer, "BATCH", 2**16)
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
