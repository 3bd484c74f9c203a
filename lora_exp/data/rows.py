"""Rows of T positions, made once and kept in the cache as ArrayRecord files.

A document of n tokens (its text and the end-of-text token) is n - 1 pairs (token, next token). packing=pack cuts the
stream of all pairs into rows: no position is wasted, each target is predicted exactly once and no pair crosses
documents; a document that goes on in the next row is a piece of its own there. packing=pad gives a document a row,
tokens[:T] with the targets tokens[1:] and a 0, as the JAX tutorial does.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lora_exp.config.errors import DiskError, InputError
from lora_exp.config.schema import FILE_SOURCES, DataConfig
from lora_exp.data import examples, records
from lora_exp.data.documents import Document, Source
from lora_exp.data.encode import encode_documents
from lora_exp.data.sources import get_source
from lora_exp.data.tokenizers import Tokenizer
from lora_exp.runtime import console
from lora_exp.runtime.cache import fingerprint, get_or_make

FORMAT = 2  # of the records; part of the cache's key
BATCH = 2**20  # characters, or positions of padded rows, made at once: bounds the memory and feeds every thread
WRITER = "group_size:1,uncompressed"  # read one record at a time; compressing takes longer than all the rest


@dataclass(frozen=True)
class Rows:
  """A corpus as rows of `seq_len` positions; tokens are counted where they are targets with loss."""

  path: Path
  fingerprint: str
  seq_len: int
  vocab_size: int
  train_rows: int
  eval_rows: int
  train_tokens: int
  eval_tokens: int
  train_bytes: int  # of the text that the counted tokens spell; the end of a document and padding spell none
  eval_bytes: int
  documents: int  # that have something to learn
  eval_documents: int  # of them held out
  truncated: int  # documents cut at T tokens (packing=pad)
  eval_examples: int  # held-out rows that are a prompt and its answer (packing=pad)
  features: int = 0  # of an example, where rows are examples of numbers (data/numbers.py)
  classes: bool = False  # the examples' targets are classes

  def file(self, split: str) -> Path:
    """The records of `split`, train or eval."""
    return self.path / f"{split}.array_record"

  def count(self, split: str) -> int:
    """How many there are."""
    return self.train_rows if split == "train" else self.eval_rows


def make_rows(cfg: DataConfig, tokenizer: Tokenizer, cache: str | Path, progress: bool = True) -> Rows:
  """The rows of `cfg` in the ids of `tokenizer`, from the cache or made now. Raises InputError for bad data.

  `limit` holds for `path` and for `eval_path`, each.
  """
  if cfg.numbers:
    return _make_examples(cfg, cache)
  source = get_source(cfg)
  held_out = get_source(cfg, "eval_path") if cfg.eval_path and cfg.source in FILE_SOURCES else None
  every = None if held_out else _every(cfg)
  key = _key(cfg, tokenizer, source, held_out)

  def make(directory: Path) -> None:
    with closing(Maker(directory, cfg, tokenizer)) as maker:
      units = _read_documents(source, cfg, maker, every, progress)
      if held_out:
        _read_documents(held_out, cfg, maker, 1, progress)
    _check_enough(maker, cfg, source, units, every)
    if _key(cfg, tokenizer, source, held_out) != key:
      raise InputError("the data changed while it was read: start again")
    meta = {"fingerprint": key, "seq_len": cfg.seq_len, "vocab_size": tokenizer.vocab_size, **maker.counts()}
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")

  return _open(get_or_make(cache, "rows", key, make))


def _make_examples(cfg: DataConfig, cache: str | Path) -> Rows:
  """The rows of a source of numbers; both splits hold all of them."""
  key = examples.table_key(cfg, FORMAT)

  def make(directory: Path) -> None:
    with _disk_errors():
      for split in ("train", "eval"):
        with closing(ArrayRecordWriter(str(directory / f"{split}.array_record"), WRITER)) as writer:
          for record in examples.encode(*examples.table(cfg)):
            writer.write(record)
    examples.write_meta(directory, cfg, key)

  return _open(get_or_make(cache, "rows", key, make))


def _every(cfg: DataConfig) -> int:
  if not 0 < cfg.eval_fraction <= 0.5:
    raise InputError(f"data.eval_fraction={cfg.eval_fraction}: above 0 and at most 0.5 (or set data.eval_path)")
  return round(1 / cfg.eval_fraction)


def _template(cfg: DataConfig, tokenizer: Tokenizer) -> str | None:
  """The chat template that prompts go through, or None."""
  return tokenizer.chat_template if cfg.chat == "auto" else None


def _key(cfg: DataConfig, tokenizer: Tokenizer, source: Source, held_out: Source | None) -> str:
  """Hash of the content and of the settings that matter to the rows: not of paths, nor of the order of reading."""
  return fingerprint(
    format=FORMAT, tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, source=cfg.source,
    digest=source.digest(), eval_digest=held_out.digest() if held_out else None,
    every=None if held_out else _every(cfg), view=cfg.view if cfg.source == "stdlib" else None,
    fields=[cfg.prompt_field, cfg.response_field] if cfg.source == "jsonl" else None, limit=cfg.limit,
    seq_len=cfg.seq_len, packing=cfg.packing, pad_in_loss=cfg.packing == "pad" and cfg.pad_in_loss,
    prompt_in_loss=cfg.prompt_in_loss,
    chat=[_template(cfg, tokenizer), dict(tokenizer.template_words)] if _template(cfg, tokenizer) else None)


def _read_documents(source: Source, cfg: DataConfig, maker: "Maker", every: int | None, progress: bool) -> int:
  """Give all documents to `maker`, each `every`-th to be held out; returns how many units (files) there were."""
  units = read = 0
  with ExitStack() as stack:
    bar = stack.enter_context(console.progress("tokenise", source.size, "bytes")) if progress else None
    documents = stack.enter_context(closing(source.documents()))
    for batch in _batches(documents, cfg):
      maker.add(batch, [every is not None and document.key % every == every - 1 for document in batch])
      units = batch[-1].key + 1
      if bar:
        bar.advance(batch[-1].read - read)
      read = batch[-1].read
  return units


def _batches(documents: Iterator[Document], cfg: DataConfig) -> Iterator[list[Document]]:
  batch: list[Document] = []
  size = 0
  for document in documents:
    if cfg.limit is not None and document.key >= cfg.limit:
      break
    batch.append(document)
    size += max(len(document.prompt) + len(document.text), cfg.seq_len)
    if size >= BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


class Maker:
  """Turns documents into the records of both splits, in bounded memory."""

  def __init__(self, directory: Path, cfg: DataConfig, tokenizer: Tokenizer):
    self.cfg, self.tokenizer = cfg, tokenizer
    self.truncated = 0
    self.splits = {held: Split(directory / f"{'eval' if held else 'train'}.array_record", cfg.seq_len, tokenizer)
                   for held in (False, True)}

  def add(self, documents: list[Document], held_out: list[bool]) -> None:
    """Tokenise the documents and write the rows that are full."""
    encoded = encode_documents(self.tokenizer, documents, chat=_template(self.cfg, self.tokenizer) is not None)
    for held, split in self.splits.items():
      chosen = [n for n, is_held in enumerate(held_out) if is_held == held]
      if chosen:
        self._add(split, [encoded[n][0] for n in chosen], [encoded[n][1] for n in chosen])

  def _add(self, split: "Split", ids: list[list[int]], prompts: list[int]) -> None:
    if self.cfg.packing == "pack":
      pairs = records.stream(ids, prompts, self.cfg.prompt_in_loss)
      split.add(pairs, pairs, int(pairs["start"].sum()))
      return
    self.truncated += sum(len(document) > self.cfg.seq_len for document in ids)
    rows = records.padded(ids, prompts, self.cfg.seq_len, self.cfg.prompt_in_loss)
    learned = rows["counted"].any(axis=1)
    spelt = rows[learned].ravel()
    if self.cfg.pad_in_loss:
      rows = records.with_padding_in_loss(rows, prompts, self.cfg.prompt_in_loss)
    split.add(rows[learned].ravel(), spelt, int(learned.sum()))

  def close(self) -> None:
    for split in self.splits.values():
      split.close()

  def counts(self) -> dict[str, int]:
    """The counts of Rows."""
    train, held = self.splits[False], self.splits[True]
    return {"train_rows": train.rows, "eval_rows": held.rows, "train_tokens": train.tokens, "eval_tokens": held.tokens,
            "train_bytes": train.bytes, "eval_bytes": held.bytes, "documents": train.documents + held.documents,
            "eval_documents": held.documents, "truncated": self.truncated,
            "eval_examples": held.answers if self.cfg.packing == "pad" else 0}


class Split:
  """One file of records: takes pairs, writes rows of T, keeps the rest for the next ones."""

  def __init__(self, path: Path, seq_len: int, tokenizer: Tokenizer):
    self.writer = ArrayRecordWriter(str(path), WRITER)
    self.seq_len, self.tokenizer = seq_len, tokenizer
    self.rest = np.zeros(0, records.PAIR)
    self.rows = self.tokens = self.bytes = self.documents = self.answers = 0

  def add(self, pairs: np.ndarray, spelt: np.ndarray, documents: int) -> None:
    """Append `pairs`; the bytes of the counted targets in `spelt` are those of the text."""
    self.documents += documents
    self.tokens += int(pairs["counted"].sum())
    self.bytes += int(self.tokenizer.byte_lengths[spelt["target"][spelt["counted"]]].sum())
    pairs = np.concatenate([self.rest, pairs])
    full = len(pairs) - len(pairs) % self.seq_len
    self._write(pairs[:full])
    self.rest = pairs[full:].copy()

  def _write(self, pairs: np.ndarray) -> None:
    rows = pairs.reshape(-1, self.seq_len).copy()
    rows["start"][:, 0] = True  # a document that goes on is a new piece
    with _disk_errors():
      for record in records.encode(rows, self.tokenizer.vocab_size):
        self.writer.write(record)
    self.rows += len(rows)
    self.answers += int(rows["answer"].any(axis=1).sum())

  def close(self) -> None:
    """Write the last row, padded with positions of weight 0."""
    if len(self.rest):
      padding = np.zeros(self.seq_len - len(self.rest), records.PAIR)
      self._write(np.concatenate([self.rest, padding]))
    with _disk_errors():
      self.writer.close()


@contextmanager
def _disk_errors() -> Iterator[None]:
  """ArrayRecord's writer reports a full disk as a RuntimeError, often not before it is closed."""
  try:
    yield
  except RuntimeError as error:
    raise DiskError(f"cannot write the rows to the cache: {error}; free some space there or set cache=") from error


def _check_enough(maker: Maker, cfg: DataConfig, source: Source, units: int, every: int | None) -> None:
  train, held = maker.splits[False], maker.splits[True]
  if units == 0:
    raise InputError(f"{source.name} holds no text" if cfg.limit != 0 else "data.limit=0 reads nothing: raise it")
  if held.tokens == 0 and every is None:
    raise InputError(f"data.eval_path: {cfg.eval_path} holds no text to evaluate on")
  if held.tokens == 0:
    own = ", or set data.eval_path" if cfg.source in FILE_SOURCES else ""
    raise InputError(f"nothing is held out: 1 of {every} {source.unit} is (data.eval_fraction={cfg.eval_fraction}) and "
                     f"{source.name} gives {units}; raise data.eval_fraction or data.limit{own}")
  if train.tokens == 0:
    raise InputError(f"nothing to train on: the {units} {source.unit} of {source.name} give no token to predict")


def _open(path: Path) -> Rows:
  """The rows in a directory of the cache; InputError if they are not what was written."""
  try:
    rows = Rows(path=path, **json.loads((path / "meta.json").read_text()))
    whole = all(read(rows, split).num_records() == rows.count(split) for split in ("train", "eval"))
  except (OSError, ValueError, TypeError):
    whole = False
  if not whole:
    raise _damaged(path)
  return rows


def read(rows: Rows, split: str) -> ArrayRecordReader:
  """A reader of the records of `split`."""
  return ArrayRecordReader(str(rows.file(split)))


@contextmanager
def damage_explained(rows: Rows) -> Iterator[None]:
  """Each record carries a checksum: say in words what to do when one does not match."""
  try:
    yield
  except RuntimeError as error:
    if "Corrupted" not in str(error):
      raise
    raise _damaged(rows.path) from error


def _damaged(path: Path) -> InputError:
  return InputError(f"{path} is damaged: delete that directory, and it will be made again")
