"""`task=data`: shows a few training rows, which of their tokens are learned, and counts."""

import math
from collections.abc import Iterator

import numpy as np

from lora_exp.config import Config
from lora_exp.config.typed_command import training_command
from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import train_rows
from lora_exp.data.rows import Rows, make_rows
from lora_exp.data.sources import data_facts, is_numeric
from lora_exp.data.tokenization import Tokenizer, get_tokenizer
from lora_exp.runtime import console

SHOWN_ROWS = 3
SHOWN_DOCUMENTS = 6  # per row; the others are counted
MOST_TOKENS = 240  # a longer span is shortened to SHOWN_TOKENS
SHOWN_TOKENS = 160
STYLES = {"document": "dim", "read": "", "learn": "bold green"}  # in a terminal with colours


def run(cfg: Config) -> None:
  """Makes the rows of `cfg.data`, and shows counts and the first, middle and last training row."""
  tokenizer = get_tokenizer(cfg.model.tokenizer, cfg.model.weights)
  rows = make_rows(cfg.data, tokenizer, cfg.cache)
  for warning in rows.warnings:
    console.show_warning(warning)
  console.show_facts(f"Data: {cfg.data.path or cfg.data.source}", {**data_facts(cfg.data), **_facts(cfg, rows)})
  if is_numeric(cfg.data):
    return
  shown = sorted({round(n * (rows.train_rows - 1) / max(1, SHOWN_ROWS - 1)) for n in range(SHOWN_ROWS)})
  batch = train_rows(rows, shown)
  for place, number in enumerate(shown):
    row = {name: values[place] for name, values in batch.items()}
    learned, filled = int(row["weights"].sum()), int((row["segments"] > 0).sum())
    title = f"Row {number + 1:,} of {rows.train_rows:,}: {filled:,} of {rows.seq_len:,} positions, {learned:,} learned"
    spans = _spans(row, tokenizer, padded=cfg.data.packing == "pad")
    console.show_labelled(title, [(kind, text, STYLES[kind]) for kind, text in spans])
  command = training_command("data")
  if command is not None:
    console.show_command("\nTrain on it:", command)


def _facts(cfg: Config, rows: Rows) -> dict[str, str]:
  """Sizes of the data, for the table."""
  batches = math.ceil(rows.train_rows / cfg.train.batch_size)
  epoch = f"{batches:,} step{'s' if batches > 1 else ''} of {cfg.train.batch_size} rows"
  if is_numeric(cfg.data):
    return {"examples": f"{rows.train_rows:,}", "an epoch": epoch}
  positions = rows.train_rows * rows.seq_len
  lengths = rows.document_tokens
  return {
    "documents": f"{rows.documents:,} with a token to learn, {rows.eval_documents:,} of them held out",
    "tokens of a document": f"{lengths[0]:,} to {lengths[3]:,}; median {lengths[1]:,}, 90th percentile {lengths[2]:,}",
    "cut off": f"{rows.truncated:,} documents are longer than a row ({rows.truncated / rows.all_documents:.1%})",
    "training rows": f"{rows.train_rows:,} of {rows.seq_len:,} positions, {1 - rows.train_positions / positions:.1%} "
                     f"of them padding (data.packing={cfg.data.packing})",
    "an epoch": f"{rows.train_tokens:,} tokens learned of {rows.train_positions:,} read, in {epoch}",
    "held out": f"{rows.eval_tokens:,} tokens to predict in {rows.eval_rows:,} rows",
  }


def _spans(row: Batch, tokenizer: Tokenizer, padded: bool) -> Iterator[tuple[str, str]]:
  """(kind, text) of each document in a row, and of its spans of tokens that are learned, or only read.

  `padded`: the row is one document, whose last position has no target.
  """
  segments, tokens, targets = row["segments"], row["tokens"], row["targets"]
  count = int(segments.max())
  for segment in range(1, min(count, SHOWN_DOCUMENTS) + 1):
    here = segments == segment
    ids = tokens[here].tolist() if padded else [int(tokens[here][0]), *targets[here].tolist()]
    learned = np.concatenate([[False], row["weights"][here] > 0])[: len(ids)]
    yield "document", f"{segment} of {count} in this row: {len(ids):,} tokens, {int(learned.sum()):,} learned"
    edges = [0, *(np.flatnonzero(np.diff(learned.astype(int))) + 1).tolist(), len(ids)]
    for begin, end in zip(edges, edges[1:], strict=False):
      yield "learn" if learned[begin] else "read", _text(tokenizer, ids[begin:end])
  if count > SHOWN_DOCUMENTS:
    yield "document", f"{SHOWN_DOCUMENTS + 1} to {count} are not shown"


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
  """The text of `ids`, with visible line breaks; the middle of a long text is left out."""
  if len(ids) <= MOST_TOKENS:
    return _visible(tokenizer.decode(ids, start=False))
  half = SHOWN_TOKENS // 2
  first, last = (tokenizer.decode(part, start=False) for part in (ids[:half], ids[-half:]))
  return f"{_visible(first)} [{len(ids) - 2 * half:,} more tokens] {_visible(last)}"


def _visible(text: str) -> str:
  return text.replace("\n", "\\n\n")
