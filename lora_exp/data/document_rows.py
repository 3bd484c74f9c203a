"""The documents of each held-out row, and the two halves of the held-out documents.

Records do not store document numbers. With packing=pad, each row is a document, and so is each numeric example. Where
rows are cut from a stream, a row starts with the rest of a document if the previous row does not end with an
end-of-text token. Where rows hold whole documents, the numbers are in a file of their own.
"""

import numpy as np

from lora_exp.config.schema import DataConfig
from lora_exp.data.encoding.records import decode
from lora_exp.data.encoding.split_writer import NUMBERS
from lora_exp.data.rows import Rows, damage_explained, reader

TUNING, REPORT = 0, 1  # values of a document's half
HALVES = ("tuning", "report")  # their names
READ = 4096  # rows decoded at once


def document_numbers(rows: Rows, cfg: DataConfig, chosen: np.ndarray, end: int, segments: int) -> np.ndarray:
  """The number of the document of each segment in the `chosen` held-out rows (n,), (n, S) int64; S = `segments`.

  The numbers of segments that a row does not have are arbitrary. `end` and errors are as in `first_documents`.
  """
  file = rows.path / NUMBERS
  if not file.is_file():
    return first_documents(rows, cfg, chosen, end)[:, None] + np.arange(segments)
  table = np.load(file)[chosen][:, :segments].astype(np.int64)
  return np.pad(table, ((0, 0), (0, segments - table.shape[1])), constant_values=-1)


def first_documents(rows: Rows, cfg: DataConfig, chosen: np.ndarray, end: int) -> np.ndarray:
  """The number of the first document in each of the `chosen` held-out rows (n,), (n,) int64.

  The other segments of a row have the numbers that follow. `end`: the token that ends a document. A chat template may
  end documents with other tokens; these are found where a document ends inside a row. Raises InputError for damaged
  rows.
  """
  if rows.features or cfg.packing == "pad":
    return chosen
  last = int(chosen.max()) + 1
  segments_R, targets_R, ends = np.zeros(last, np.int64), np.zeros(last, np.int64), {end}
  records_reader = reader(rows, "eval")
  for start in range(0, last, READ):
    part = range(start, min(start + READ, last))
    with damage_explained(rows):
      batch = decode(records_reader.read(list(part)), rows.seq_len, rows.vocab_size)
    segments, targets = batch["segments"], batch["targets"]
    segments_R[part.start : part.stop], targets_R[part.start : part.stop] = segments.max(1), targets[:, -1]
    ends |= set(targets[:, :-1][segments[:, 1:] > segments[:, :-1]].tolist())
  continued_R = np.append(False, ~np.isin(targets_R[:-1], list(ends)))
  first_R = np.cumsum(np.append(0, segments_R[:-1]) - continued_R)
  return first_R[chosen]


def halves(tokens_D: np.ndarray) -> np.ndarray:
  """The half of each of D documents with `tokens_D` tokens: TUNING or REPORT, (D,) uint8.

  Documents are paired by length, and a random choice with a fixed seed decides which of a pair goes to which half. The
  halves have similar numbers of tokens and documents, and depend only on the documents.
  """
  by_length = np.argsort(-tokens_D, kind="stable")
  coins = np.random.default_rng(0).integers(2, size=(len(tokens_D) + 1) // 2, dtype=np.uint8)
  half_D = np.zeros(len(tokens_D), np.uint8)
  half_D[by_length] = np.stack([coins, 1 - coins], axis=1).ravel()[: len(tokens_D)]
  return half_D
