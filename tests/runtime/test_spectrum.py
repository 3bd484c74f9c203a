"""Singular values, directions and intruders against plain linear algebra and planted updates."""


import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packs import quickly

from lora_exp import lora
from lora_exp.lora import methods
from lora_exp.lora.kernels import shape as kernel_shape
from lora_exp.lora.resizing import update_svd
from lora_exp.runtime import spectrum
from lora_exp.runtime.spectrum import output_side, thin_svd, update_spectrum, whole_svd

RNG = np.random.default_rng(0)


def orthonormal(n: int, k: int, seed: int = 0) -> np.ndarray:
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0]


class Kinds(nnx.Module):
  """A kernel of each shape: plain, of several axes, a stack."""

  def __init__(self, rngs: nnx.Rngs):
    self.plain = nnx.Linear(12, 7, rngs=rngs)
    self.heads = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
    self.each = nnx.LinearGeneral((4,), (5,), axis=-1, batch_axis={0: 3}, rngs=rngs)
    self.stack = nnx.vmap(lambda key: nnx.Linear(6, 5, rngs=nnx.Rngs(key)))(jnp.stack([rngs.params()] * 2))


def test_stacked_kernels_have_the_means_of_their_matrices():
  with quickly():
    model = Kinds(nnx.Rngs(0))
    shapes = {path: kernel_shape(module) for path, module in lora.modules(model).items()}
    rows = [lora.AdaptedModule(path, *shape, 3, 6.0, 2.0) for path, shape in shapes.items()]
    kernels = {path: np.asarray(w, np.float64) for path, w in lora.kernels_of(model, rows).items()}
  assert {path: w.ndim for path, w in kernels.items()} == {"plain": 2, "heads": 2, "each": 3, "stack": 3}
  for row in rows:
    w = kernels[row.path]
    own = {"lora_a": RNG.normal(size=(*w.shape[:-1], 3)), "lora_b": RNG.normal(size=(*w.shape[:-2], 3, w.shape[-1]))}
    u, sigma, vt = update_svd(methods.get("lora"), own, row.scale)
    whole = row.scale * own["lora_a"] @ own["lora_b"]
    np.testing.assert_allclose(u * sigma[..., None, :] @ vt, whole, atol=1e-12)
    told = update_spectrum(row.path, row.rank, sigma)
    each = whole.reshape(-1, *whole.shape[-2:])
    singular = np.linalg.svd(each, compute_uv=False)
    assert told.norm == pytest.approx(np.linalg.norm(each, axis=(1, 2)).mean(), rel=1e-5)
    assert told.stable_rank == pytest.approx(np.mean(np.square(singular).sum(-1) / singular[:, 0] ** 2), rel=1e-5)
    seen = np.linalg.norm(np.swapaxes(u, -1, -2) @ w @ np.swapaxes(vt, -1, -2), axis=(-2, -1))
    ours = spectrum.amplification((u, sigma, vt), w)
    assert ours == pytest.approx(np.linalg.norm(whole, axis=(-2, -1)) / seen)


@pytest.mark.parametrize(("sigma", "effective", "stable", "most"), [
  ([2.0, 2.0, 2.0, 2.0], 4, 4, 4),
  ([5.0, 0.0, 0.0], 1, 1, 1),
  ([3.0, 1.0], np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)), 10 / 9, 1),  # 9 of 10: just 90 %
  ([0.0, 0.0], 0, 0, 0),
])
def test_ranks_by_hand(sigma, effective, stable, most):
  told = update_spectrum("m", 4, np.array(sigma))
  assert (told.effective_rank, told.stable_rank) == pytest.approx((effective, stable), rel=1e-5)
  assert told.directions == most


def test_planted_rank_three_inside_rank_eight_is_found():
  a, b = RNG.normal(size=(40, 8)), RNG.normal(size=(8, 30))
  a[:, 3:], b[3:] = 0.0, 1e-9 * b[3:]
  _, sigma, _ = thin_svd(orthonormal(40, 3) @ orthonormal(8, 3).T, orthonormal(30, 8).T)
  told = update_spectrum("m", 8, sigma)
  assert (told.effective_rank, told.stable_rank, told.directions) == pytest.approx((3, 3, 3), rel=1e-5)
  assert told.energy_half == 1
  assert update_spectrum("m", 8, thin_svd(a, b)[1]).effective_rank < 3 and (thin_svd(a, b)[1] > 0).sum() == 3


def test_update_that_has_not_moved_is_zero():
  a, b = RNG.normal(size=(20, 4)).astype(np.float32), RNG.normal(size=(4, 9)).astype(np.float32)
  svd = update_svd(methods.get("pissa"), {"lora_a": a, "lora_b": b, "start_a": a, "start_b": b}, 2.0)
  assert update_spectrum("m", 4, svd[1]).norm == 0 and np.isnan(spectrum.amplification(svd, RNG.normal(size=(20, 9))))


def test_overlap_of_equal_orthogonal_and_random_subspaces():
  u, v = orthonormal(24, 6), orthonormal(24, 9, seed=1)
  phi = spectrum.overlap(u, v)
  for i, j in ((1, 1), (4, 9), (6, 2)):
    wanted = np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)
    assert phi[i - 1, j - 1] == pytest.approx(wanted)
  same = spectrum.overlap(u, u)
  assert np.diag(same) == pytest.approx(1) and same[1, 5] == pytest.approx(1)
  draws = [spectrum.overlap(orthonormal(24, 6, s), orthonormal(24, 9, s + 1000))[-1, -1] for s in range(300)]
  error = np.std(draws) / np.sqrt(len(draws))
  assert spectrum.random_overlap(6, 9, 24) == 9 / 24 == pytest.approx(np.mean(draws), abs=4 * error)


def test_amplification_by_hand():
  (u, far_u), (v, far_v) = (np.split(orthonormal(n, 3), [2], axis=1) for n in (10, 8))
  w = 0.5 * np.outer(u[:, 0], v[:, 0]) + 7 * far_u @ far_v.T
  update = (u * [3.0, 4.0]) @ v.T  # ‖ΔW‖ = 5, and of W only 0.5 lies in its directions
  svd = thin_svd(u * [3.0, 4.0], v.T)
  assert spectrum.amplification(svd, w) == pytest.approx(10) and np.linalg.norm(update) == pytest.approx(5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_output_side_equals_the_svd(shape):
  w = RNG.normal(size=(2, *shape))
  _, wanted, vt = whole_svd(w)
  sigma, v = output_side(w)
  assert sigma == pytest.approx(wanted, rel=1e-8)
  assert np.abs((np.swapaxes(v, -1, -2) * vt).sum(-1)) == pytest.approx(1)
  np.testing.assert_array_equal(output_side(w, 4)[1], v[..., :4])


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_intruders_are_directions_that_w_does_not_have(shape):
  u, v = orthonormal(shape[0], 30), orthonormal(shape[1], 30, seed=1)
  size = np.linspace(3, 1, 30)
  w = (u * size) @ v.T
  own = output_side(w)[1]
  count = lambda update: int(spectrum.intruders(own, output_side(w + update, spectrum.EXAMINED)[1]))
  new = np.linalg.qr(np.concatenate([v, RNG.normal(size=(shape[1], 2))], 1))[0][:, 30:]  # outputs that W never writes
  assert count(6 * np.outer(u[:, 5], new[:, 0]) + 5 * np.outer(u[:, 9], new[:, 1])) == 2
  assert count((u[:, :4] * 0.3) @ v[:, :4].T) == 0 == count(0.01 * RNG.normal(size=shape))
  assert count(np.outer(u[:, 5], 1e-3 * new[:, 0])) == 0
  spread = v @ np.full((30, 1), 1 / np.sqrt(30))  # not close to any single direction of W, but in their span
  assert count(20 * np.outer(u[:, 0], spread)) == 1
