"""Singular values and directions of the update ΔW (I, O) of a kernel, in NumPy and float64.

ΔW = Σ σ·u·vᵀ with singular values σ in descending order, directions u on the kernel's input side and v on its output
side. For a low-rank update they are computed from its thin factors, without forming ΔW. Arrays may have leading axes
for stacked kernels. K is the number of singular values.
"""

from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-13  # singular values below this fraction of the norm are rounding errors and set to 0
ENERGY = 0.9  # default fraction of ‖ΔW‖² for `directions`
INTRUDER = 0.5  # a direction of W + ΔW is an intruder if its |cosine| to all of W's is smaller (arXiv 2410.21228)
EXAMINED = 10  # number of leading directions of W + ΔW that are examined for intruders (ibid., k)
LARGEST = 4096  # maximum of a kernel's smaller side for a full decomposition, which takes half a minute on two cores
Svd = tuple[np.ndarray, np.ndarray, np.ndarray]  # U (…, I, K), σ (…, K), Vᵀ (…, K, O)


def thin_svd(p: np.ndarray, q: np.ndarray) -> Svd:
  """The SVD (U, σ, Vᵀ) of P·Q (…, I, O) without forming the product. K is at most the number of columns of P.

  P·Q has the singular values of R_P·R_Qᵀ, the small factors of the QR decompositions of P and Qᵀ.
  """
  u, core_left = np.linalg.qr(p)
  v, core_right = np.linalg.qr(np.swapaxes(q, -1, -2))
  # If A·B − A₀·B₀ is 0, rounding errors remain, which must not count as an update.
  size = np.linalg.norm(core_left, axis=(-2, -1)) * np.linalg.norm(core_right, axis=(-2, -1))
  left, sigma, right = whole_svd(core_left @ np.swapaxes(core_right, -1, -2), size)
  return u @ left, sigma, right @ np.swapaxes(v, -1, -2)


def whole_svd(w: np.ndarray, size: np.ndarray | None = None) -> Svd:
  """The SVD (U, σ, Vᵀ) of W (…, I, O). Values σ below ROUNDING · `size` (default: ‖W‖) are set to 0."""
  u, sigma, vt = np.linalg.svd(w, full_matrices=False)
  size = np.linalg.norm(w, axis=(-2, -1)) if size is None else size
  return u, np.where(sigma > ROUNDING * size[..., None], sigma, 0), vt


def stable_rank(sigma: np.ndarray) -> np.ndarray:
  """‖ΔW‖²_F / ‖ΔW‖²₂ = Σσ² / σ₁² (Rudelson and Vershynin, 2007); 0 for no update."""
  square = np.square(sigma)
  return _share(square.sum(-1), square.max(-1, initial=0.0))


def effective_rank(sigma: np.ndarray) -> np.ndarray:
  """exp(−Σ p·ln p) with p = σ/Σσ: the number of equal singular values with the same entropy (Roy and
  Vetterli, 2007). 0 for no update.
  """
  total = sigma.sum(-1)
  p = _share(sigma, total[..., None])
  entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
  return np.where(total > 0, np.exp(entropy), 0.0)


def energy(sigma: np.ndarray) -> np.ndarray:
  """The fraction (…, K) of ‖ΔW‖²_F in the 1, 2, … leading directions; 0 for no update."""
  square = np.square(sigma)
  return _share(np.cumsum(square, -1), square.sum(-1, keepdims=True))


def directions(sigma: np.ndarray, share: float = ENERGY) -> np.ndarray:
  """The smallest number of directions with at least the fraction `share` of the energy; 0 for no update."""
  count = (energy(sigma) < share - 1e-12).sum(-1) + 1
  return np.where(sigma.sum(-1) > 0, count, 0)


def overlap(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """φ (…, i, j) = ‖UᵢᵀVⱼ‖²_F / min(i, j) of the first i columns of U (…, N, I) and j of V (…, N, J), for all i and j.

  U and V have orthonormal columns. φ is 1 if one subspace contains the other and 0 if they are orthogonal (Hu et al.,
  2021, arXiv 2106.09685, section 7.2).
  """
  square = np.square(np.swapaxes(u, -1, -2) @ v)
  rows, columns = np.arange(1, square.shape[-2] + 1), np.arange(1, square.shape[-1] + 1)
  return square.cumsum(-2).cumsum(-1) / np.minimum(rows[:, None], columns)


def random_overlap(i: int, j: int, n: int) -> float:
  """The expected φ of random subspaces of dimensions i and j in n dimensions: (i·j/n) / min(i, j) = max(i, j) / n."""
  return max(i, j) / n


def amplification(svd: Svd, w: np.ndarray) -> np.ndarray:
  """The amplification factor ‖ΔW‖_F / ‖UᵀWV‖_F, with U and V the directions of ΔW (Hu et al., section 7.3).

  NaN for no update, and if W is 0 in these directions.
  """
  u, sigma, vt = svd
  active = (sigma > 0).astype(float)  # directions with σ = 0 are arbitrary
  projected = (np.swapaxes(u, -1, -2) @ w @ np.swapaxes(vt, -1, -2)) * active[..., None] * active[..., None, :]
  update, base = np.linalg.norm(sigma, axis=-1), np.linalg.norm(projected, axis=(-2, -1))
  return np.where((update > 0) & (base > 0), _share(update, base), np.nan)


def output_side(w: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """σ (…, K) and V (…, O, K), the singular vectors on the output side of W: the leading `most`, or all.

  Computed from the eigenvalues of W·Wᵀ or Wᵀ·W, whichever is smaller, which is five times as fast as an SVD. Singular
  values below 1e-7 of the largest are lost to rounding; they and their directions are set to 0.
  """
  w = np.asarray(w, np.float64)
  wide, w_T = w.shape[-2] < w.shape[-1], np.swapaxes(w, -1, -2)
  value, vectors = np.linalg.eigh(w @ w_T if wide else w_T @ w)
  sigma, vectors = np.sqrt(np.maximum(value[..., ::-1][..., :most], 0)), vectors[..., ::-1][..., :most]
  sigma = np.where(sigma > 1e-7 * sigma[..., :1], sigma, 0)
  if wide:
    vectors = (w_T @ vectors) / np.where(sigma > 0, sigma, 1.0)[..., None, :]
  return sigma, vectors * (sigma > 0)[..., None, :]


def intruders(base: np.ndarray, tuned: np.ndarray, threshold: float = INTRUDER) -> np.ndarray:
  """The number of directions `tuned` (…, O, k) of W + ΔW that are not similar to any direction `base` (…, O, K) of W.

  Two directions are similar if their |cosine| is at least `threshold` (Shuttleworth et al., 2024, arXiv 2410.21228,
  Algorithm 1; its matrices are (out, in), so its left singular vectors are on the output side).
  """
  cosine = np.abs(np.swapaxes(base, -1, -2) @ tuned).max(-2)
  exists = np.linalg.norm(tuned, axis=-2) > 0.5  # columns beyond the rank are 0
  return ((cosine < threshold) & exists).sum(-1)


def _share(part: np.ndarray, total: np.ndarray) -> np.ndarray:
  """part / total; 0 where the total is 0."""
  return np.where(total > 0, part / np.where(total > 0, total, 1.0), 0.0)


@dataclass(frozen=True)
class UpdateSpectrum:
  """Singular values of one module's update and statistics of them; for stacked kernels, their mean."""

  module: str
  rank: int  # as configured; for a fully trained kernel, its smaller side
  singular_values: list[float]
  norm: float  # ‖ΔW‖_F
  effective_rank: float
  stable_rank: float
  directions: float  # number with the fraction ENERGY of ‖ΔW‖²
  energy_first: float  # fraction in the leading direction
  energy_half: float  # fraction in the leading half of the directions
  relative_norm: float | None = None  # ‖ΔW‖_F / ‖W‖_F; this and the next two need W
  amplification: float | None = None
  intruders: float | None = None


def update_spectrum(module: str, rank: int, sigma: np.ndarray, **needing_w: float | None) -> UpdateSpectrum:
  """The spectrum of a module's update from its singular values σ (…, K)."""
  share = energy(sigma)
  half = -(-rank // 2)  # the larger half of the rank
  return UpdateSpectrum(
    module,
    rank,
    [round_off(float(x)) for x in sigma.reshape(-1, sigma.shape[-1]).mean(0)],
    norm=_mean(np.linalg.norm(sigma, axis=-1)),
    effective_rank=_mean(effective_rank(sigma)),
    stable_rank=_mean(stable_rank(sigma)),
    directions=_mean(directions(sigma)),
    energy_first=_mean(_energy_of(share, 1)),
    energy_half=_mean(_energy_of(share, half)),
    **needing_w,
  )


def _energy_of(share: np.ndarray, count: int) -> np.ndarray:
  """The fraction (…) of the energy in the `count` leading directions. `share`: the result of `energy` (…, K)."""
  count = min(count, share.shape[-1])
  return share[..., count - 1] if count else np.zeros(share.shape[:-1])


def _mean(x: np.ndarray) -> float:
  return round_off(float(np.mean(x)))


def round_off(value: float) -> float:
  """Rounds to six significant digits, so that results do not depend on the order of additions."""
  return float(f"{value:.6g}")
