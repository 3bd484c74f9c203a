"""OLoRA: A and B start as the first rows and columns of Wᵀ = Q·R, taken off again like PiSSA's (arXiv 2406.01775)."""

import numpy as np

from lora_exp.lora.methods.pissa import PiSSA


class OLoRA(PiSSA):
  """LoRA that starts as a part of W's QR decomposition."""

  name = "olora"
  title = "OLoRA"
  paper = "2406.01775"
  cost = "R·(I + O) parameters, as many constants, and a QR decomposition of every kernel at the start"

  def decompose(self, w_IO: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A is the first rows of R, B the first columns of Q."""
    q, r = np.linalg.qr(np.swapaxes(w_IO, -1, -2))
    return np.swapaxes(r[..., :rank, :], -1, -2).copy(), np.swapaxes(q[..., :rank], -1, -2).copy()
