"""The bigram's held-out loss is that of plain counting."""

import math
from collections import Counter

import numpy as np
import pytest
from corpora import BYTES, every_row, text_config

from lora_exp.data.ngram import bigram_loss
from lora_exp.data.rows import Rows, make_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
  folder = tmp_path_factory.mktemp("rows")
  return make_rows(text_config(folder), BYTES, folder)


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
