"""Writes the rows of a source: its documents, or its numeric examples."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.documents import Document, Skipped
from lora_exp.data.encoding import examples
from lora_exp.data.encoding.row_counts import RowCounts
from lora_exp.data.encoding.row_writer import RowWriter
from lora_exp.data.encoding.split_writer import OPTIONS, disk_errors
from lora_exp.data.not_learned import NotLearnedTally
from lora_exp.data.sources import NumericSource, TextSource
from lora_exp.data.sources.file_source import FileSource
from lora_exp.data.tokenization import Tokenizer
from lora_exp.runtime import console

BATCH = 2**20  # characters, or positions of padded rows, per tokeniser call: bounds memory and keeps all threads busy
MOST_COUNTED = 100_000  # documents after data.limit that are read to count them


def write_rows(
  directory: Path, cfg: DataConfig, tokenizer: Tokenizer, source: TextSource, progress: bool
) -> RowCounts:
  """Writes the rows of `source` into train.array_record and eval.array_record; `progress` shows a bar.

  The documents of `source.held_out()` are held out or, if it is None, those of every `held_out_every`-th key. Raises
  InputError for bad or too few documents, DiskError if the disk is full.
  """
  held_out = source.held_out()
  every = None if held_out else held_out_every(cfg)
  with closing(RowWriter(directory, cfg, tokenizer, source)) as writer:
    units = _write_documents(source, cfg, writer, every, progress)
    if held_out:
      _write_documents(held_out, cfg, writer, 1, progress)
    counts = writer.finish()
  _check_counts(counts, cfg, source, units, every)
  return counts


def write_examples(directory: Path, source: NumericSource, limit: int | None) -> RowCounts:
  """Writes the first `limit` examples of `source` as the rows of both splits. An example is counted as one token."""
  x_NI, y = examples.first(source, limit)
  for split in ("train", "eval"):
    with disk_errors(), closing(ArrayRecordWriter(str(directory / f"{split}.array_record"), OPTIONS)) as writer:
      for record in examples.encode(x_NI, y):
        writer.write(record)
  n = len(x_NI)
  return RowCounts(train_rows=n, eval_rows=n, train_tokens=n, eval_tokens=n, train_bytes=0, eval_bytes=0, documents=n,
                   eval_documents=n, truncated=0, eval_examples=0)


def held_out_every(cfg: DataConfig) -> int:
  """Returns n such that one of every n documents is held out. Raises InputError if too few are left for training."""
  if not 0 < cfg.eval_fraction <= 0.5:
    raise InputError(f"data.eval_fraction={cfg.eval_fraction:g}: must be above 0 and at most 0.5")
  return round(1 / cfg.eval_fraction)


def is_held_out(document: Document, every: int | None) -> bool:
  """Whether `document` is held out, where one of `every` keys is (None: no key)."""
  return every is not None and document.key % every == every - 1


def _write_documents(
  source: TextSource, cfg: DataConfig, writer: RowWriter, every: int | None, progress: bool
) -> int:
  """Writes all documents, holding out one of `every` keys (None: no key). Returns the number of units."""
  units = read = 0
  with ExitStack() as stack:
    bar = stack.enter_context(console.progress("tokenise", source.size, "bytes")) if progress else None
    documents = source.documents()
    if isinstance(documents, Generator):
      stack.enter_context(closing(documents))  # data.limit stops it early
    unit = "held-out rows" if every == 1 else "rows"
    writer.unit = unit
    for batch in _batches(documents, cfg, writer.not_learned, unit, source.counts_rest):
      writer.add(batch, [is_held_out(document, every) for document in batch])
      units = batch[-1].key + 1
      if bar:
        bar.advance(batch[-1].read - read)
      read = batch[-1].read
  return units


def _batches(
  documents: Iterator[Document | Skipped], cfg: DataConfig, not_learned: NotLearnedTally, unit: str,
  counts_rest: bool
) -> Iterator[list[Document]]:
  """Yields the documents up to data.limit in batches that are tokenised together. Counts what is not read.

  `counts_rest`: whether to count what follows after data.limit.
  """
  batch: list[Document] = []
  size = 0
  for document in documents:
    if isinstance(document, Document) and cfg.limit is not None and document.key >= cfg.limit:
      if counts_rest:
        _count_rest(documents, cfg.limit, not_learned, unit)
      break
    if isinstance(document, Skipped) and document.unit != "rows":
      not_learned.add(document.unit, document.reason, first=document.where)
      continue
    not_learned.add_total(unit)
    if isinstance(document, Skipped):
      not_learned.add(unit, document.reason, first=document.where)
      continue
    for reason in document.unread:
      not_learned.add(unit, reason, first=document.where)
    batch.append(document)
    size += max(document.characters, cfg.seq_len)
    if size >= BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _count_rest(documents: Iterator[Document | Skipped], limit: int, not_learned: NotLearnedTally, unit: str) -> None:
  """Counts the documents that follow after data.limit: the first, which is already read, and at most MOST_COUNTED."""
  count = 1
  try:
    for document in islice(documents, MOST_COUNTED):
      count += isinstance(document, Document)
    is_complete = next(documents, None) is None
  except InputError:  # in data that is not read
    is_complete = False
  not_learned.add_total(unit, count)
  more = "" if is_complete else ", and so do others that were not counted"
  not_learned.add(unit, f"they follow after data.limit={limit}{more}", count)


def _check_counts(counts: RowCounts, cfg: DataConfig, source: TextSource, units: int, every: int | None) -> None:
  """Raises InputError if there is nothing to train or evaluate on."""
  reasons = "".join(f"; {count.sentence}" for count in counts.not_learned)
  if units == 0:
    nothing = f"{source.label} contains no text{reasons}"
    raise InputError(nothing if cfg.limit != 0 else "data.limit=0 reads nothing; raise it")
  if counts.eval_tokens == 0 and every is None:
    where = f"data.eval_path: {cfg.eval_path}" if cfg.eval_path else f"data.eval_split: {cfg.eval_split}"
    raise InputError(f"{where} contains no text to evaluate on{reasons}")
  held_out = units // (every or 1)
  if counts.eval_tokens == 0 and held_out and counts.train_tokens:
    raise InputError(f"nothing to evaluate on: the {held_out} held-out {source.unit} have no token to "
                     f"predict{reasons}")
  if counts.eval_tokens == 0 and not held_out:
    or_file = ", or set data.eval_path" if isinstance(source, FileSource) else ""
    raise InputError(f"nothing is held out: 1 of {every} {source.unit} is (data.eval_fraction={cfg.eval_fraction}) and "
                     f"{source.label} gives {units}; raise data.eval_fraction or data.limit{or_file}{reasons}")
  if counts.train_tokens == 0:
    raise InputError(f"nothing to train on: the {units} {source.unit} of {source.label} have no token to predict"
                     f"{reasons}")
