"""Numeric examples as records on disk, and as batches.

A record is float32: I features, the target (a class, or O numbers), and a weight of 1. A record of zeros is padding.
"""

from collections.abc import Sequence

import numpy as np

from lora_exp.data.encoding.records import Batch
from lora_exp.data.sources import NumericSource


def first(source: NumericSource, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
  """The first `limit` examples of `source`: x (N, I) float32 and y (N,) int32 or (N, O) float32."""
  x_NI, y = source.examples()
  return x_NI[:limit], y[:limit]


def encode(x_NI: np.ndarray, y: np.ndarray) -> list[bytes]:
  """Encodes each example as a record; y is (N,) classes or (N, O) numbers."""
  columns = [x_NI, y.reshape(len(y), -1), np.ones((len(y), 1))]
  return [row.tobytes() for row in np.concatenate(columns, axis=1).astype("<f4")]


def decode(records: Sequence[bytes], features: int, classes: bool) -> Batch:
  """Decodes B records to x (B, I) float32, y (B,) int32 classes or (B, O) float32, and weights (B,) float32."""
  rows = np.frombuffer(b"".join(records), "<f4").reshape(len(records), -1).astype(np.float32)
  x_BI, y_BO, weights_B = rows[:, :features], rows[:, features:-1], rows[:, -1]
  return {"x": x_BI, "y": y_BO[:, 0].astype(np.int32) if classes else y_BO, "weights": weights_B}
