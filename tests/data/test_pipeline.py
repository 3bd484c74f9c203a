"""Batches contain every row once per epoch, and are the same after a resume."""

import contextlib
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from corpora import BYTES, STORIES, assert_equal, every_row, text_config, text_file

from lora_exp.config.schema import DataConfig
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows, make_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
  folder = tmp_path_factory.mktemp("rows")
  return make_rows(text_config(folder), BYTES, folder)


def batches(rows: Rows, count: int, size: int = 8, start: int = 0, **settings) -> list[dict[str, np.ndarray]]:
  return list(itertools.islice(train_batches(rows, DataConfig(**settings), size, start), count))


def row_ids(rows: Rows, batch: dict[str, np.ndarray]) -> list[int]:
  """The index of each row of the batch in the order in which rows were written."""
  numbers = {row["tokens"].tobytes(): n for n, row in enumerate(each_row(every_row(rows, "train")))}
  assert len(numbers) == rows.train_rows  # no two are equal
  return [numbers[row["tokens"].tobytes()] for row in each_row(batch)]


def each_row(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
  return [{name: array[n] for name, array in batch.items()} for n in range(len(batch["tokens"]))]


def test_a_batch_has_its_documented_arrays(rows):
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


def test_evaluation_takes_all_rows_and_pads_the_last_batch(rows):
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
from lora_exp.data.tokenization import get_tokenizer
cfg = DataConfig(source="text", path=sys.argv[1], eval_fraction=0.25)
rows = make_rows(cfg, get_tokenizer("bytes"), sys.argv[2])
assert "jax" not in sys.modules, "rows need no jax"
from lora_exp.data.pipeline import train_batches
batches = train_batches(rows, DataConfig(), 8)
next(batches)
from jax._src import xla_bridge
assert not xla_bridge._backends, "the pipeline started a device"
"""


def test_leaving_early_ends_and_starts_no_device(tmp_path):
  done = subprocess.run([sys.executable, "-c", LEAVE_EARLY, text_file(tmp_path, STORIES), tmp_path], timeout=60,
                        capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("seeds", [(), (0, 1)])
def test_the_parts_of_processes_make_up_the_batches(rows, seeds):
  parts = [train_batches(rows, DataConfig(), 4, start=3, seeds=seeds, part=part) for part in ([0, 1], [2], [3])]
  whole = train_batches(rows, DataConfig(), 4, start=3, seeds=seeds)
  with contextlib.ExitStack() as stack:
    for stream in (*parts, whole):
      stack.callback(stream.close)
    for _ in range(2 * rows.train_rows // 4):  # two epochs
      batch, pieces = next(whole), [next(part) for part in parts]
      for name, x in batch.items():
        np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces], axis=1 if seeds else 0), x)
