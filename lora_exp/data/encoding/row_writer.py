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
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.documents import Document
from lora_exp.data.encoding import records
from lora_exp.data.encoding.duplicates import DuplicateCounter
from lora_exp.data.encoding.encode import EncodedDocument, chat_template, encode_documents
from lora_exp.data.encoding.row_counts import RowCounts
from lora_exp.data.encoding.split_writer import SplitWriter, write_document_numbers
from lora_exp.data.encoding.truncation import TruncationCounter
from lora_exp.data.not_learned import NotLearnedTally
from lora_exp.data.sources import TextSource
from lora_exp.data.sources.file_source import FileSource
from lora_exp.data.text_checks import suspicions
from lora_exp.data.tokenization import Tokenizer

PLAIN_SOURCES = ("stdlib", "text", "sentences")  # of version 0.1.0, without prompts: their rows stay what they were
MOST_LAYOUTS = 4  # sets of columns that are named in a message


def keeps_documents_whole(cfg: DataConfig, source: TextSource) -> bool:
  """Whether rows hold whole documents. Otherwise they are cut from the stream of all tokens, or padded."""
  return cfg.packing == "pack" and source.name not in PLAIN_SOURCES


class RowWriter:
  """Turns documents into the records of both splits, in bounded memory."""

  def __init__(self, directory: Path, cfg: DataConfig, tokenizer: Tokenizer, source: TextSource):
    self.cfg, self.tokenizer, self.separator = cfg, tokenizer, source.prompt_separator or ""
    self.directory, self.keeps_whole = directory, keeps_documents_whole(cfg, source)
    self.prompt_in_loss = cfg.prompt_in_loss or cfg.loss == "all"
    self.not_learned = NotLearnedTally()
    self.unit = "rows"  # the unit of the current source in `not_learned`: rows, or held-out rows
    self.truncation = TruncationCounter(cfg.seq_len)
    self.lengths = array("i")  # tokens of each document
    self.duplicates = DuplicateCounter() if isinstance(source, FileSource) else None  # other sources repeat on purpose
    self.suspicions = NotLearnedTally()
    self.columns = Counter[str]()  # documents by the columns that they were read from
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
    for document, source, is_held_out in zip(encoded, documents, held_out, strict=True):
      self._count(document, source, "eval" if is_held_out else "train")
    for split, wanted in ((self.train, False), (self.eval, True)):
      chosen = [n for n, is_held in enumerate(held_out) if is_held == wanted]
      if chosen:
        self._add(split, [encoded[n] for n in chosen], [documents[n].where for n in chosen])

  def _count(self, document: EncodedDocument, source: Document, split: str) -> None:
    """Counts a document, and its problems."""
    self.lengths.append(len(document.ids))
    self.columns[" and ".join(map(repr, source.columns)) or "no columns (plain text)"] += 1
    if self.duplicates is not None:
      self.duplicates.add(document, split)
      self.suspicions.add_total("documents")
      for suspicion in suspicions(source, self.tokenizer.special_tokens):
        self.suspicions.add("documents", suspicion, first=source.where)
    for unit, count in document.totals.items():
      self.not_learned.add_total(unit, count)
    for (unit, reason), count in document.problems.items():
      self.not_learned.add(unit, reason, count, source.where)

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
      self.not_learned.add(self.unit, str(refusal), first=where)
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
    self.truncation.report_to(self.not_learned)
    return RowCounts(
      train_rows=train.rows, eval_rows=held.rows, train_tokens=train.tokens, eval_tokens=held.tokens,
      train_bytes=train.bytes, eval_bytes=held.bytes, documents=train.documents + held.documents,
      eval_documents=held.documents, truncated=self.truncation.cut, train_positions=train.positions,
      all_documents=len(self.lengths), document_tokens=_quantiles(self.lengths),
      eval_examples=held.answers if self.cfg.packing == "pad" else 0, not_learned=self.not_learned.counted(),
      notes=tuple(self._notes()))

  def _notes(self) -> Iterator[str]:
    """Sentences about what was done with the documents."""
    conversations = self.truncation.documents["conversations"]
    if conversations and chat_template(self.cfg, self.tokenizer) is None:
      has_template = self.tokenizer.chat_template is not None
      reason = "data.chat=none uses no chat template" if has_template else "the tokenizer has no chat template"
      plural = "s" if conversations > 1 else ""
      yield (f"{reason}: the turns of {conversations:,} conversation{plural} are written as lines, 'User: …' and "
             "'Assistant: …'")
    if len(self.columns) > 1:
      mixed = "; ".join(f"{count:,} from {columns}" for columns, count in self.columns.most_common(MOST_LAYOUTS))
      yield f"documents are read from different columns: {mixed}"
    if self.duplicates is not None:
      yield from self.duplicates.notes()
    yield from (count.sentence for count in self.suspicions.counted())

  def close(self) -> None:
    """Closes both files."""
    self.train.close()
    self.eval.close()


def _quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
  """The minimum, median, 90th percentile and maximum of `lengths`."""
  if not len(lengths):
    return ()
  return tuple(int(x) for x in np.quantile(lengths, (0, 0.5, 0.9, 1), method="higher"))
