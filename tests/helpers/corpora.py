"""Small corpora for tests of data, and the expected contents of their rows."""

import itertools
import json
from pathlib import Path

import numpy as np

from lora_exp.config.schema import DataConfig
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows
from lora_exp.data.tokenization import get_tokenizer

BYTES = get_tokenizer("bytes")
STORIES = [f"Story {n}:\n" + " ".join(str(n * 7919 * k % 10007) for k in range(1, n % 9 + 3)) for n in range(40)]
PAIRS = [{"prompt": f"{n}+1=", "response": f"{n + 1}!"} for n in range(10)]


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
  """All rows of a split in the order in which they were written."""
  if split == "eval":
    batches = list(eval_batches(rows, rows.eval_rows, None))
  else:
    batches = list(itertools.islice(train_batches(rows, DataConfig(shuffle=False), rows.train_rows), 1))
  assert len(batches) == 1
  return batches[0]


def documents_in(batch: dict[str, np.ndarray], eot: int) -> list[list[int]]:
  """Reassembles documents from packed rows: a piece continues the previous one if that does not end with `eot`."""
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
  """The files in the cache except lock files."""
  return [path.name for path in (cache / "rows").iterdir() if path.suffix != ".lock"]


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)
