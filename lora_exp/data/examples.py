"""Sources of numbers, for models that read no tokens: the toy problems of two LoRA tutorials.

A row is one example, and counts as one token wherever tokens are counted. Both splits hold every example: what these
problems ask is whether the adapter can fit them. On disk a row is float32: the features, the target, and a weight of 1,
so that a row of zero bytes is padding.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_exp.config.schema import EXAMPLES, DataConfig
from lora_exp.data.records import Batch
from lora_exp.runtime.cache import fingerprint

Table = tuple[np.ndarray, np.ndarray]  # x (N, I) float32, and y: classes (N,) int32, or numbers (N, O) float32


def xor() -> Table:
  """The four corners of a square; class 1 where the signs differ."""
  x = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
  return x, np.array([0, 1, 1, 0], np.int32)


def regression() -> Table:
  """32 examples of 16 features and 10 numbers, all from N(0, 1): noise to learn by heart, that of blox's notebook."""
  import jax  # not above: reading text needs no jax

  inputs, outputs = EXAMPLES["regression"]
  draw = lambda seed, width: np.asarray(jax.random.normal(jax.random.key(seed), (32, width)))
  return draw(0, inputs), draw(1, outputs)


TABLES: Mapping[str, Callable[[], Table]] = {"xor": xor, "regression": regression}


def table(cfg: DataConfig) -> Table:
  """The examples of `cfg`: the first `limit` of its source."""
  x, y = TABLES[cfg.source]()
  return x[: cfg.limit], y[: cfg.limit]


def table_key(cfg: DataConfig, version: int) -> str:
  """Hash of the examples themselves; `version` is that of `Rows`."""
  x, y = table(cfg)
  return fingerprint(format=[1, version], source=cfg.source, records=[record.hex() for record in encode(x, y)])


def write_meta(directory: Path, cfg: DataConfig, key: str) -> None:
  """meta.json with the counts of `Rows`; an example is counted as one token that spells no text."""
  x, y = table(cfg)
  counts = {f"{split}_{unit}": len(x) for split in ("train", "eval") for unit in ("rows", "tokens")}
  meta = {
    "fingerprint": key, "seq_len": 1, "vocab_size": 0, **counts, "train_bytes": 0, "eval_bytes": 0,
    "documents": len(x), "eval_documents": len(x), "truncated": 0, "eval_examples": 0,
    "features": x.shape[1], "classes": y.ndim == 1}
  (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def encode(x_NI: np.ndarray, y: np.ndarray) -> list[bytes]:
  """A record for each example."""
  columns = [x_NI, y.reshape(len(y), -1), np.ones((len(y), 1))]
  return [row.tobytes() for row in np.concatenate(columns, axis=1).astype("<f4")]


def decode(records: Sequence[bytes], features: int, classes: bool) -> Batch:
  """B records as x (B, I) float32, y (B,) int32 classes or (B, O) float32, and weights (B,) float32."""
  rows = np.frombuffer(b"".join(records), "<f4").reshape(len(records), -1).astype(np.float32)
  x, y, weights = rows[:, :features], rows[:, features:-1], rows[:, -1]
  return {"x": x, "y": y[:, 0].astype(np.int32) if classes else y, "weights": weights}


def batch_shapes(source: str, batch_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
  """name -> (shape, dtype) of a batch."""
  x, y = TABLES[source]()
  x, y = x[:1], y[:1]
  return {
    "x": ((batch_size, *x.shape[1:]), str(x.dtype)), "y": ((batch_size, *y.shape[1:]), str(y.dtype)),
    "weights": ((batch_size,), "float32")}
