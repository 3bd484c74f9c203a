"""The cache of rows: documents are packed once (`source_writer`), and later runs read the rows from the cache.

    rows = make_rows(cfg.data, tokenizer, cfg.cache)

The name of a cache entry is a hash of everything that determines its rows (`rows_key`): the source's identity, the
tokenizer, and how documents are packed. An entry is an ArrayRecord file per split, and meta.json with the fields of
`Rows`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.encoding import examples
from lora_exp.data.encoding.encode import chat_template
from lora_exp.data.encoding.row_counts import RowCounts
from lora_exp.data.encoding.row_writer import keeps_documents_whole
from lora_exp.data.encoding.source_writer import held_out_every, write_examples, write_rows
from lora_exp.data.not_learned import NotLearned
from lora_exp.data.sources import NumericSource, Source, TextSource, open_source
from lora_exp.data.tokenization import Tokenizer
from lora_exp.runtime.cache import fingerprint, get_or_make

FORMAT = 2  # of the records
ENTRY = 7  # version of a cache entry's files. Not part of `rows_key`, which runs of older versions have stored
WHOLE = 1  # version of the rows that hold whole documents


@dataclass(frozen=True, kw_only=True)
class Rows(RowCounts):
  """A corpus as rows of `seq_len` positions, in two files of records."""

  path: Path
  fingerprint: str  # hash of everything that determines the rows
  seq_len: int  # T; 1 for numeric examples
  vocab_size: int  # V; 0 for numeric examples
  features: int = 0  # I of numeric examples
  classes: bool = False  # whether the targets of numeric examples are classes

  def file(self, split: str) -> Path:
    """The records of `split`: train or eval."""
    return self.path / f"{split}.array_record"

  def count(self, split: str) -> int:
    """The number of rows of `split`: train or eval."""
    return self.train_rows if split == "train" else self.eval_rows


def make_rows(cfg: DataConfig, tokenizer: Tokenizer, cache: str | Path, progress: bool = True) -> Rows:
  """Returns the rows of `cfg` with the ids of `tokenizer`, cached or newly written; `progress` shows a bar.

  `limit` applies to `path` and to `eval_path` separately. Raises InputError with all problems of settings and files,
  and DiskError if the cache cannot be written.
  """
  source = open_source(cfg)
  key = rows_key(cfg, tokenizer, source)

  def write(directory: Path) -> None:
    """Writes the entry. Raises InputError if the data changed after the key was computed."""
    if isinstance(source, TextSource):
      counts = write_rows(directory, cfg, tokenizer, source, progress)
      facts = {"seq_len": cfg.seq_len, "vocab_size": tokenizer.vocab_size}
    else:
      assert isinstance(source, NumericSource)
      counts = write_examples(directory, source, cfg.limit)
      facts = {"seq_len": 1, "vocab_size": 0, "features": source.inputs, "classes": source.classes}
    if rows_key(cfg, tokenizer, source) != key:
      raise InputError("the data changed while it was being read; run the command again")
    meta = {"fingerprint": key, **facts, **asdict(counts)}
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")

  return _open(get_or_make(cache, "rows", fingerprint(rows=key, entry=ENTRY, formats=_formats(source)), write))


# ---- the key


def rows_key(cfg: DataConfig, tokenizer: Tokenizer, source: Source) -> str:
  """SHA-256 (hex) of everything that determines the rows: the source's identity, the tokenizer and the packing.

  Paths and the settings of the reading order are not part of it.
  """
  if isinstance(source, NumericSource):
    records = [record.hex() for record in examples.encode(*examples.first(source, cfg.limit))]
    return fingerprint(format=[1, FORMAT], source=source.name, records=records, **_identity(source))
  assert isinstance(source, TextSource)
  held_out = source.held_out()
  template = chat_template(cfg, tokenizer)
  return fingerprint(
    format=FORMAT, source=source.name, digest=source.digest(), eval_digest=held_out.digest() if held_out else None,
    every=None if held_out else held_out_every(cfg), limit=cfg.limit,
    tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
    chat=[template, dict(tokenizer.template_variables)] if template else None,
    seq_len=cfg.seq_len, **_packing(cfg, source), pad_in_loss=cfg.packing == "pad" and cfg.pad_in_loss,
    prompt_in_loss=cfg.prompt_in_loss or cfg.loss == "all", **_chat(cfg, tokenizer), **_identity(source))


def _formats(source: Source) -> list[str]:
  """The formats in which the files of `source` are read, those of its held-out files last.

  They depend on the suffixes too, which are not part of `rows_key`.
  """
  if not isinstance(source, TextSource):
    return []
  held_out = source.held_out()
  return [*source.file_formats(), *(held_out.file_formats() if held_out else ())]


def _chat(cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, object]:
  """Further parts of the key for chats; {} for rows that version 0.1.0 could make."""
  strips = {str(token): list(sides) for token, sides in tokenizer.strips.items()}
  parts: dict[str, object] = {"loss": "last" if cfg.loss == "last" else None}
  if chat_template(cfg, tokenizer) is not None:
    parts |= {"strips": strips, "tool_template": tokenizer.tool_template}
  return {name: part for name, part in parts.items() if part}


def _packing(cfg: DataConfig, source: TextSource) -> dict[str, object]:
  """The packing as part of the key. Rows cut from a stream keep the name that they had in version 0.1.0."""
  if keeps_documents_whole(cfg, source):
    return {"packing": "pack", "whole": WHOLE}
  return {"packing": "pack" if cfg.packing == "stream" else cfg.packing}


def _identity(source: Source) -> dict[str, object]:
  """The settings of `source` that are part of its identity, and its version.

  The settings of version 0.1.0 keep their place in the hash, so that runs of that version can be resumed.
  """
  settings = source.settings()
  parts: dict[str, object] = {}
  if isinstance(source, TextSource):
    fields = [settings.pop(name) for name in ("prompt_field", "response_field") if name in settings]
    parts = {"view": settings.pop("view", None), "fields": fields or None}
  if settings:
    parts["settings"] = settings
  if source.version != 1:
    parts["version"] = source.version
  return parts


# ---- reading


def _open(path: Path) -> Rows:
  """Opens the rows in a cache entry. Raises InputError if they are damaged."""
  try:
    meta = json.loads((path / "meta.json").read_text())
    not_learned = tuple(NotLearned(**count) for count in meta.pop("not_learned", ()))
    notes, lengths = tuple(meta.pop("notes")), tuple(meta.pop("document_tokens"))
    rows = Rows(path=path, not_learned=not_learned, notes=notes, document_tokens=lengths, **meta)
    complete = all(reader(rows, split).num_records() == rows.count(split) for split in ("train", "eval"))
  except (OSError, ValueError, TypeError, KeyError):
    complete = False
  if not complete:
    raise _damaged(path)
  return rows


def reader(rows: Rows, split: str) -> ArrayRecordReader:
  """A reader of the records of `split`: train or eval."""
  return ArrayRecordReader(str(rows.file(split)))


@contextmanager
def damage_explained(rows: Rows) -> Iterator[None]:
  """Raises InputError with advice if the checksum of a record does not match."""
  try:
    yield
  except RuntimeError as error:
    if "Corrupted" not in str(error):
      raise
    raise _damaged(rows.path) from error


def _damaged(path: Path) -> InputError:
  return InputError(f"{path} is damaged; run the command again to recreate it, or delete it if that does not help")
