"""OLoRA: A and B are initialized from the QR decomposition Wᵀ = Q·R, and subtracted as in PiSSA (arXiv 2406.01775)."""

import numpy as np

from lora_exp.lora.methods.pissa import PiSSA


class OLoRA(PiSSA):
  """LoRA with A and B initialized from the QR decomposition of W."""

  name = "olora"
  title = "OLoRA"
  paper = "2406.01775"
  cost = "R·(I + O) parameters, as many constants, and one QR decomposition of every kernel"

  def decompose(self, w_IO: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns A = Rᵀ[:, :rank] and B = Q[:, :rank]ᵀ of Wᵀ = Q·R."""
    q, r = np.linalg.qr(np.swapaxes(w_IO, -1, -2))
    return np.swapaxes(r[..., :rank, :], -1, -2).copy(), np.swapaxes(q[..., :rank], -1, -2).copy()
