"""Spectra of trained updates that need the base's kernels: amplification, intruders, ΔW of full fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from threadpoolctl import threadpool_limits

from lora_exp import lora
from lora_exp.config import Config
from lora_exp.lora import kernels, methods
from lora_exp.lora.resizing import update_svd
from lora_exp.models.weights import store
from lora_exp.models.weights.stored_tensor import Checkpoint
from lora_exp.runtime import console
from lora_exp.runtime.mesh import flatten
from lora_exp.runtime.spectrum import (
  EXAMINED,
  LARGEST,
  Svd,
  UpdateSpectrum,
  amplification,
  intruders,
  output_side,
  round_off,
  update_spectrum,
)
from lora_exp.train.base import make_base
from lora_exp.train.loaded_run import plan_of
from lora_exp.train.plan import Plan

ONE_THREAD_SIZE = 2**20  # largest kernel, in elements, for which BLAS is faster with one thread


@dataclass(frozen=True)
class TrainedKernels:
  """The kernels that one run trained."""

  cfg: Config
  plan: Plan  # with the run's adapter; without one after full fine-tuning

  @property
  def directory(self) -> Path:
    return Path(str(self.cfg.run))

  @property
  def method(self) -> methods.Method:
    return methods.of(self.cfg.lora)

  @cached_property
  def modules(self) -> dict[str, lora.AdaptedModule]:
    """The modules with a trained kernel, by path."""
    if not self.method.trains_everything:
      return {row.path: row for row in self.plan.table}
    shapes = {path: kernels.shape(module) for path, module in lora.modules(self.plan.model()).items()}
    return {path: lora.AdaptedModule(path, *shape, min(shape), 1.0, 1.0) for path, shape in shapes.items()}

  @cached_property
  def _checkpoint(self) -> Checkpoint:
    return store.open_source(self.directory / store.FILE, self.cfg.cache)

  def trained_kernel(self, model: nnx.Module, module: lora.AdaptedModule, base: Mapping[str, Any]) -> np.ndarray:
    """The kernel (…, I, O) of a module after full fine-tuning, float64. `base`: the arrays of the base by path."""
    name = next(f"{module.path}.{end}" for end in ("kernel", "embedding") if f"{module.path}.{end}" in base)
    array = np.empty(base[name].shape, np.float32)
    self._checkpoint.read(name, [((slice(None),) * array.ndim, array)])
    return base_kernel(model, module, {name: array})

  def adapted_kernel(self, module: lora.AdaptedModule, w: np.ndarray) -> tuple[Svd, np.ndarray]:
    """The SVD of an adapter's ΔW and the adapted kernel (…, I, O), float64.

    ΔW excludes a gate such as DoRA's norm; the adapted kernel includes it. `w`: the kernel of the base (…, I, O).
    """
    assert self.plan.start is not None
    adapter = replace(self.plan.start, leaves={module.path: self.plan.start.leaves[module.path]})
    w_f32 = w.astype(np.float32)
    leaves = lora.completed(adapter, {module.path: w_f32})[module.path]
    adapted = adapter.kind.adapted(w_f32, leaves, np.float32(module.scale))
    svd = update_svd(adapter.kind, adapter.leaves[module.path], module.scale, w_f32)
    return svd, np.asarray(adapted, np.float64)


def trained_kernels(cfg: Config) -> TrainedKernels:
  """The trained kernels of `cfg.run`. Raises InputError if the run has not finished."""
  return TrainedKernels(cfg, plan_of(cfg))


def inspect_runs(runs: Sequence[TrainedKernels]) -> list[list[UpdateSpectrum]]:
  """The spectrum of every trained module of each run. All runs must have the same base.

  One kernel is in memory at a time. The singular directions of W are computed once for all runs.
  """
  plan = runs[0].plan
  base, model = flatten(make_base(plan)[0]), plan.model()
  spectra: list[list[UpdateSpectrum]] = [[] for _ in runs]
  with console.progress("inspect", sum(len(run.modules) for run in runs), "kernels") as bar:
    for path in dict.fromkeys(path for run in runs for path in run.modules):
      numbered_runs = [(n, run) for n, run in enumerate(runs) if path in run.modules]
      first = numbered_runs[0][1].modules[path]
      w = base_kernel(model, first, base)
      small = min(first.fan_in, first.fan_out) <= LARGEST
      if not small:
        size = f"{first.fan_in:,}×{first.fan_out:,}"
        bar.print(f"{path} ({size}) is too large: no intruder directions, and no spectrum for lora=full")
      with threadpool_limits(1 if w.size <= ONE_THREAD_SIZE else None, "blas"):
        directions = output_side(w)[1] if small else None
        for n, run in numbered_runs:
          module = run.modules[path]
          if not run.method.trains_everything:
            svd, adapted = run.adapted_kernel(module, w)
            amplified = _finite_mean(amplification(svd, w))
            spectra[n].append(_spectrum(module, svd[1], w, adapted, directions, amplified))
          elif small:
            trained = run.trained_kernel(model, module, base)
            spectra[n].append(_spectrum(module, output_side(trained - w)[0], w, trained, directions, None))
          bar.advance()
  return spectra


def base_kernel(model: nnx.Module, module: lora.AdaptedModule, arrays: Mapping[str, Any]) -> np.ndarray:
  """The kernel (…, I, O) of a module, float64. `arrays`: by dotted path in the abstract `model`."""
  return np.asarray(lora.kernels_of(model, [module], arrays)[module.path], np.float64)


def _spectrum(module: lora.AdaptedModule, sigma: np.ndarray, w: np.ndarray, adapted: np.ndarray,
              directions: np.ndarray | None, amplified: float | None) -> UpdateSpectrum:
  """The spectrum of an update with singular values `sigma` (…, K) that changed a kernel W to `adapted`.

  `directions`: the singular directions of W on the output side (…, O, K); None if they were not computed.
  """
  norm = np.linalg.norm(w, axis=(-2, -1))
  relative = _finite_mean(np.linalg.norm(sigma, axis=-1) / np.where(norm > 0, norm, np.nan))
  new = None if directions is None else _finite_mean(intruders(directions, output_side(adapted, EXAMINED)[1]))
  return update_spectrum(module.path, module.rank, sigma, relative_norm=relative, amplification=amplified,
                         intruders=new)


def _finite_mean(values: np.ndarray) -> float | None:
  """The mean of the finite values; None if there are none."""
  finite = values[np.isfinite(values)]
  return round_off(float(finite.mean())) if finite.size else None
