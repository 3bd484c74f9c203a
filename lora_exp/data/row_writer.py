"""Sequence packing: documents are packed (or padded) into rows of T positions, which are written as files of records.

A document of n tokens (its text and the end-of-text token) gives n - 1 pairs (token, next token).

packing=pack puts several documents into a row, each as a segment of its own. A prompt with its answer, or a
conversation, that fits a row is never split (`best_fit`); a longer one is cut. Plain text is cut into rows as with
packing=stream.
packing=stream cuts the stream of all pairs into rows: no position is wasted, each target is predicted exactly once, and
no pair crosses two documents. A document that continues in the next row is a new segment there.
packing=pad gives each document a row, as the JAX LoRA tutorial does: tokens[:T], with the targets tokens[1:] and a 0.
"""

from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data import examples, records
from lora_exp.data.encode import EncodedDocument, chat_template, encode_documents
from lora_exp.data.sources import NumericSource, TextSource
from lora_exp.data.sources.file_source import FileSource
from lora_exp.data.sources.source import Document, Skipped
from lora_exp.data.split_writer import OPTIONS, SplitWriter, disk_errors, write_document_numbers
from lora_exp.data.tokenizers import Tokenizer
from lora_exp.data.truncation import TruncationCounter
from lora_exp.data.unlearned import Unlearned, UnlearnedTally
from lora_exp.runtime import console

BATCH = 2**20  # characters, or positions of padded rows, per tokeniser call: bounds memory and keeps all threads busy
PLAIN_SOURCES = ("stdlib", "text", "sentences")  # of version 0.1.0, without prompts: their rows stay what they were


@dataclass(frozen=True, kw_only=True)
class RowCounts:
  """Sizes of the written rows. A token is counted if it is a target with loss."""

  train_rows: int
  eval_rows: int
  train_tokens: int
  eval_tokens: int
  train_bytes: int  # bytes of text of the counted tokens; end-of-text tokens and padding have 0 bytes
  eval_bytes: int
  documents: int  # documents with at least one token to learn
  eval_documents: int  # those that are held out
  truncated: int  # documents that are longer than a row, and are cut
  all_documents: int = 0  # including those without a token to learn
  document_tokens: tuple[int, ...] = ()  # tokens per document: minimum, median, 90th percentile, maximum
  train_positions: int = 0  # of the training rows, without padding
  eval_examples: int  # held-out rows that are a prompt and its answer (packing=pad)
  unlearned: tuple[Unlearned, ...] = ()  # the data that is not learned, by reason
  notes: tuple[str, ...] = ()  # sentences about what was done with the documents

  @property
  def warnings(self) -> list[str]:
    """The warnings to print before training, one line each."""
    return [*self.notes, *(f"not everything is learned: {count.sentence}" for count in self.unlearned)]


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


def _write_documents(
  source: TextSource, cfg: DataConfig, writer: "RowWriter", every: int | None, progress: bool
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
    for batch in _batches(documents, cfg, writer.unlearned, unit):
      writer.add(batch, [every is not None and document.key % every == every - 1 for document in batch])
      units = batch[-1].key + 1
      if bar:
        bar.advance(batch[-1].read - read)
      read = batch[-1].read
  return units


def _batches(
  documents: Iterator[Document | Skipped], cfg: DataConfig, unlearned: UnlearnedTally, unit: str
) -> Iterator[list[Document]]:
  """Yields the documents up to data.limit in batches that are tokenised together. Counts what is not read."""
  batch: list[Document] = []
  size = 0
  for document in documents:
    if isinstance(document, Document) and cfg.limit is not None and document.key >= cfg.limit:
      break
    if isinstance(document, Skipped) and document.unit != "rows":
      unlearned.add(document.unit, document.reason, first=document.where)
      continue
    unlearned.add_total(unit)
    if isinstance(document, Skipped):
      unlearned.add(unit, document.reason, first=document.where)
      continue
    for reason in document.unread:
      unlearned.add(unit, reason, first=document.where)
    batch.append(document)
    size += max(document.characters, cfg.seq_len)
    if size >= BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


class RowWriter:
  """Turns documents into the records of both splits, in bounded memory."""

  def __init__(self, directory: Path, cfg: DataConfig, tokenizer: Tokenizer, source: TextSource):
    self.cfg, self.tokenizer, self.separator = cfg, tokenizer, source.prompt_separator or ""
    self.directory, self.keeps_whole = directory, keeps_documents_whole(cfg, source)
    self.prompt_in_loss = cfg.prompt_in_loss or cfg.loss == "all"
    self.unlearned = UnlearnedTally()
    self.unit = "rows"  # the unit of the current source in `unlearned`: rows, or held-out rows
    self.truncation = TruncationCounter(cfg.seq_len)
    self.lengths = array("i")  # tokens of each document
    self.train, self.eval = (SplitWriter(directory / f"{split}.array_record", cfg.seq_len, tokenizer)
                             for split in ("train", "eval"))

  def add(self, documents: Sequence[Document], held_out: Sequence[bool]) -> None:
    """Tokenises documents and writes every full row. `held_out` marks the documents of the eval split."""
    try:
      encoded = encode_documents(self.tokenizer, documents, self.cfg, self.separator)
    except InputError:
      accepted = self._accepted(documents)
      documents, held_out = [documents[n] for n in accepted], [held_out[n] for n in accepted]
      encoded = encode_documents(self.tokenizer, documents, self.cfg, self.separator)
    self.lengths.extend(len(document.ids) for document in encoded)
    for document, source in zip(encoded, documents, strict=True):
      for unit, count in document.totals.items():
        self.unlearned.add_total(unit, count)
      for (unit, reason), count in document.problems.items():
        self.unlearned.add(unit, reason, count, source.where)
    for split, wanted in ((self.train, False), (self.eval, True)):
      chosen = [n for n, is_held in enumerate(held_out) if is_held == wanted]
      if chosen:
        self._add(split, [encoded[n] for n in chosen], [documents[n].where for n in chosen])

  def _accepted(self, documents: Sequence[Document]) -> list[int]:
    """The indices of the documents that the chat template accepts; the others are counted.

    Raises InputError if none was accepted, and none before.
    """
    accepted, refused = list[int](), list[tuple[InputError, str]]()
    for n, document in enumerate(documents):
      try:
        encode_documents(self.tokenizer, [document], self.cfg, self.separator)
        accepted.append(n)
      except InputError as error:
        refused.append((error, document.where))
    if not accepted and not self.lengths:
      raise refused[0][0]
    for refusal, where in refused:
      self.unlearned.add(self.unit, str(refusal), first=where)
    return accepted

  def _add(self, split: SplitWriter, documents: Sequence[EncodedDocument], where: Sequence[str]) -> None:
    ids = [document.ids for document in documents]
    learned = [document.learned for document in documents]
    if self.cfg.packing == "pad":
      rows = records.padded(ids, learned, self.cfg.seq_len, self.prompt_in_loss)
      within = rows["counted"].sum(axis=1)
      sizes = [min(len(tokens), self.cfg.seq_len) for tokens in ids]
      self.truncation.add(documents, self.prompt_in_loss, within.tolist(), sizes, where)
      kept = within > 0
      text = rows[kept].ravel()
      if self.cfg.pad_in_loss:
        rows = records.with_padding_in_loss(rows, learned, self.prompt_in_loss)
      split.add_stream(rows[kept].ravel(), text, int(kept.sum()))
      return
    pairs = records.stream(ids, learned, self.prompt_in_loss)
    if self.keeps_whole:
      self._add_whole(split, documents, pairs, where)
    else:
      split.add_stream(pairs, pairs, int(pairs["start"].sum()))

  def _add_whole(
    self, split: SplitWriter, documents: Sequence[EncodedDocument], pairs: np.ndarray, where: Sequence[str]
  ) -> None:
    """Packs documents without splitting those that fit a row. A longer one is cut if it has answers, else split."""
    seq_len = self.cfg.seq_len
    ends = np.cumsum([len(document.ids) - 1 for document in documents])
    parts = np.split(pairs, ends[:-1])
    parts = [part if document.learned is None else part[:seq_len]
             for document, part in zip(documents, parts, strict=True)]
    within = [int(part["counted"].sum()) for part in parts]
    self.truncation.add(documents, self.prompt_in_loss, within, [len(part) + 1 for part in parts], where)
    split.add_documents([[part[first : first + seq_len].copy() for first in range(0, len(part), seq_len)]
                         for part, tokens in zip(parts, within, strict=True) if tokens])

  def finish(self) -> RowCounts:
    """Writes the last rows and returns the total counts."""
    train, held = self.train, self.eval
    train.finish()
    held.finish()
    if self.keeps_whole:
      write_document_numbers(self.directory, held.numbers)
    self.truncation.report_to(self.unlearned)
    return RowCounts(
      train_rows=train.rows, eval_rows=held.rows, train_tokens=train.tokens, eval_tokens=held.tokens,
      train_bytes=train.bytes, eval_bytes=held.bytes, documents=train.documents + held.documents,
      eval_documents=held.documents, truncated=self.truncation.cut, train_positions=train.positions,
      all_documents=len(self.lengths), document_tokens=_quantiles(self.lengths),
      eval_examples=held.answers if self.cfg.packing == "pad" else 0, unlearned=self.unlearned.counted(),
      notes=self._notes())

  def _notes(self) -> tuple[str, ...]:
    conversations = self.truncation.documents["conversations"]
    if not conversations or chat_template(self.cfg, self.tokenizer) is not None:
      return ()
    has_template = self.tokenizer.chat_template is not None
    reason = "data.chat=none uses no chat template" if has_template else "the tokenizer has no chat template"
    return (f"{reason}: the turns of {conversations:,} conversations are written as lines, 'User: …' and "
            "'Assistant: …'",)

  def close(self) -> None:
    """Closes both files."""
    self.train.close()
    self.eval.close()


def _quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
  """The minimum, median, 90th percentile and maximum of `lengths`."""
  if not len(lengths):
    return ()
  return tuple(int(x) for x in np.quantile(lengths, (0, 0.5, 0.9, 1), method="higher"))


def keeps_documents_whole(cfg: DataConfig, source: TextSource) -> bool:
  """Whether rows hold whole documents. Otherwise they are cut from the stream of all tokens, or padded."""
  return cfg.packing == "pack" and source.name not in PLAIN_SOURCES


def _check_counts(counts: RowCounts, cfg: DataConfig, source: TextSource, units: int, every: int | None) -> None:
  """Raises InputError if there is nothing to train or evaluate on."""
  reasons = "".join(f"; {count.sentence}" for count in counts.unlearned)
  if units == 0:
    nothing = f"{source.label} contains no text{reasons}"
    raise InputError(nothing if cfg.limit != 0 else "data.limit=0 reads nothing; raise it")
  if counts.eval_tokens == 0 and every is None:
    where = f"data.eval_path: {cfg.eval_path}" if cfg.eval_path else f"data.eval_split: {cfg.eval_split}"
    raise InputError(f"{where} contains no text to evaluate on{reasons}")
  held_out = units // (every or 1)
  if counts.eval_tokens == 0 and held_out and counts.train_tokens:
    raise InputError(f"nothing to evaluate on: the {held_out} {source.unit} that are held out give no token to "
                     f"predict{reasons}")
  if counts.eval_tokens == 0 and not held_out:
    or_file = ", or set data.eval_path" if isinstance(source, FileSource) else ""
    raise InputError(f"nothing is held out: 1 of {every} {source.unit} is (data.eval_fraction={cfg.eval_fraction}) and "
                     f"{source.label} gives {units}; raise data.eval_fraction or data.limit{or_file}{reasons}")
  if counts.train_tokens == 0:
    raise InputError(f"nothing to train on: the {units} {source.unit} of {source.label} give no token to predict"
                     f"{reasons}")
