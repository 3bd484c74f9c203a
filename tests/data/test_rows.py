"""Packing of documents: no token is lost, no pair crosses documents, and only the intended tokens have loss."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES, PAIRS, STORIES, assert_equal, documents_in, every_row, jsonl_file, text_config
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.document_rows import document_numbers
from lora_exp.data.encoding import source_writer
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenization.tokenizer import ControlTokens, PieceTokenizer

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
  monkeypatch.setattr(source_writer, "BATCH", 50)
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


@pytest.mark.parametrize("packing", ["pack", "pad", "stream"])
def test_only_the_response_and_the_end_are_learned(tmp_path, packing):
  cfg = DataConfig(source="jsonl", path=jsonl_file(tmp_path, PAIRS), eval_fraction=0.5, seq_len=16, packing=packing)
  rows = make_rows(cfg, BYTES, tmp_path)
  batch = every_row(rows, "eval")
  learned = batch["targets"][batch["weights"] > 0].tolist()
  assert sorted(learned) == sorted(i for pair in PAIRS[1::2] for i in [*pair["response"].encode(), BYTES.eot])
  assert rows.eval_tokens == len(learned)
  assert rows.eval_bytes == sum(len(pair["response"]) for pair in PAIRS[1::2])
  read = batch["tokens"][batch["segments"] > 0].tolist()
  text = b"".join((pair["prompt"] + pair["response"]).encode() for pair in PAIRS[1::2])
  assert sorted(i for i in read if i < 256) == sorted(text)


@given(lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=2, max_size=30),
       seq_len=st.integers(1, 24))
@settings(max_examples=40, deadline=None)
def test_an_answer_stays_with_its_prompt(lengths, seq_len):
  lines = [{"prompt": chr(97 + n % 26) * question, "response": chr(65 + n % 26) * answer}
           for n, (question, answer) in enumerate(lengths)]
  with tempfile.TemporaryDirectory() as folder:
    path = jsonl_file(Path(folder), [*lines, {"prompt": "", "response": "x"}])
    eval_path = jsonl_file(Path(folder), [*lines, {"prompt": "", "response": "y"}], "eval.jsonl")
    cfg = DataConfig(source="jsonl", path=path, eval_path=eval_path, seq_len=seq_len)
    rows = make_rows(cfg, BYTES, folder)
    batch = every_row(rows, "eval")
    found = []
    for tokens, targets, segments, weights in zip(
        *(batch[name] for name in ("tokens", "targets", "segments", "weights")), strict=True):
      for segment in range(1, segments.max() + 1):
        here = segments == segment
        document = [int(tokens[here][0]), *targets[here].tolist()]
        found.append((document, weights[here].sum()))
    wanted = []
    for (question, answer), line in zip(lengths, lines, strict=True):
      document = [*(line["prompt"] + line["response"]).encode(), BYTES.eot][: seq_len + 1]
      learned = min(question + answer + 1, seq_len + 1) - question
      wanted += [(document, learned)] if learned > 0 else []
    assert sorted(found) == sorted([*wanted, ([ord("y"), BYTES.eot], 1)])
    numbers = document_numbers(rows, cfg, np.arange(rows.eval_rows), BYTES.eot, int(batch["segments"].max()))
    assert sorted(numbers[numbers >= 0]) == list(range(len(found)))
    total = sum(answer + 1 for _, answer in lengths) + 1
    lost = sum(count.count for count in rows.not_learned if count.unit == "tokens")
    assert rows.train_tokens + rows.eval_tokens + lost == 2 * total


def test_packing_pairs_leaves_few_positions_empty(tmp_path):
  lines = [{"prompt": "q" * (n * 37 % 19 + 1), "response": "a" * (n * 53 % 23)} for n in range(400)]
  cfg = DataConfig(source="jsonl", path=jsonl_file(tmp_path, lines), seq_len=64)
  rows = make_rows(cfg, BYTES, tmp_path)
  pairs = sum(len(line["prompt"]) + len(line["response"]) for n, line in enumerate(lines) if n % 10 != 9)
  assert pairs <= 64 * rows.train_rows < 1.02 * pairs


def test_long_text_between_pairs_is_split_and_not_cut(tmp_path):
  text = "".join(chr(97 + n % 26) for n in range(50))
  path = jsonl_file(tmp_path, [*PAIRS, {"text": text}])
  cfg = DataConfig(source="jsonl", path=path, eval_path=path, seq_len=16)
  rows = make_rows(cfg, BYTES, tmp_path)
  assert rows.not_learned == () and rows.truncated == 0
  batch = every_row(rows, "eval")
  numbers = document_numbers(rows, cfg, np.arange(rows.eval_rows), BYTES.eot, int(batch["segments"].max()))
  pieces = [(numbers[row, segment - 1], batch["targets"][row][batch["segments"][row] == segment].tolist())
            for row in range(rows.eval_rows) for segment in range(1, batch["segments"][row].max() + 1)]
  [number] = [number for number, targets in pieces if targets == list(text[1:17].encode())]
  found = [target for of, targets in pieces if of == number for target in targets]
  assert sorted(found) == sorted([*text[1:].encode(), BYTES.eot])


@pytest.mark.parametrize(("packing", "room"), [("pad", 16), ("pack", 17)])
def test_answers_beyond_the_row_are_counted(tmp_path, packing, room):
  lines = [{"prompt": "q" * length, "response": "abc"} for length in range(1, 41)]
  path = jsonl_file(tmp_path, lines)
  cfg = DataConfig(source="jsonl", path=path, eval_path=path, seq_len=16, packing=packing)
  rows = make_rows(cfg, BYTES, tmp_path)
  lost = [max(0, min(4, length + 4 - room)) for length in range(1, 41)]
  counts = {(count.unit, count.reason.split(";")[0].split(",")[0]): count for count in rows.not_learned}
  beyond = counts["answers", "they lie beyond data.seq_len=16"]
  end = counts["answers", "their end lies beyond data.seq_len=16"]
  assert (beyond.count, beyond.total) == (2 * lost.count(4), 80)
  assert end.count == 2 * sum(0 < n < 4 for n in lost) == 6
  tokens = counts["tokens", "they lie beyond data.seq_len=16"]
  assert (tokens.count, tokens.total) == (2 * sum(lost), 2 * 40 * 4)
  assert "the longest document has 44 tokens" in tokens.reason
  assert rows.train_tokens == rows.eval_tokens == 160 - sum(lost)


@pytest.mark.parametrize(("lines", "message"), [
  ([{"prompt": "q" * 50, "response": "a"}] * 4, "nothing to train on: .* 4 of 4 answers: they lie beyond"),
  ([{"prompt": "q", "response": "a"}, {"prompt": "q" * 50, "response": "a"}] * 2,
   "nothing to evaluate on: the 2 held-out documents .* 2 of 4 answers"),
  ([{"prompt": "q" * 50, "response": "a"}, {"prompt": "q", "response": "a"}] * 2, "nothing to train on: .* 2 of 4"),
])
def test_a_run_that_learns_nothing_is_refused(tmp_path, lines, message):
  cfg = DataConfig(source="jsonl", path=jsonl_file(tmp_path, lines), eval_fraction=0.5, seq_len=16)
  with pytest.raises(InputError, match=message):
    make_rows(cfg, BYTES, tmp_path)


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
