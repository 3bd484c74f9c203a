"""Packing of documents: no token is lost, no pair crosses documents, and only the intended tokens have loss."""

import tempfile
from pathlib import Path

import pytest
from corpora import BYTES, PAIRS, STORIES, assert_equal, documents_in, every_row, jsonl_file, text_config
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.config.schema import DataConfig
from lora_exp.data import row_writer
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenizers.tokenizer import ControlTokens, PieceTokenizer

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff<"), min_size=1, max_size=40).filter(str.strip)


@given(documents=st.lists(TEXT, min_size=2, max_size=12), seq_len=st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_packed_rows_hold_every_document_and_nothing_else(documents, seq_len):
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
