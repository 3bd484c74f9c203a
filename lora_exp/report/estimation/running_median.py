"""The running median of a curve."""

import numpy as np


def running_median(values: np.ndarray, window: int, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
  """(indices, medians of the `window` values around each), at most `points` of them; NaN values are left out.

  A single spike does not move a median.
  """
  places = np.unique(np.linspace(0, len(values) - 1, points).astype(int))
  around = (values[max(0, i - window // 2):i + window // 2 + 1] for i in places)
  finite = (part[np.isfinite(part)] for part in around)
  return places, np.array([np.median(part) if len(part) else np.nan for part in finite])
