"""The energy of the loss's gradient with respect to each kernel of the base, without forming that gradient.

A LoRA with scale 1, B = 0 and orthonormal columns in A (I, R) has the gradient ∂L/∂B = Aᵀ·G (R, O), where G (I, O) is
the gradient of the kernel. It needs the memory of an adapter, whatever the size of the base. Where R ≥ I, A·Aᵀ is the
identity and ‖Aᵀ·G‖ = ‖G‖; otherwise ‖Aᵀ·G‖² is R/I · ‖G‖² on average.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import Config, LoraConfig
from lora_exp.data.encoding.records import Batch
from lora_exp.lora import methods
from lora_exp.runtime import console
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.step import gradient
from lora_exp.train.job import Job, make_job
from lora_exp.train.plan import make_plan

PROJECTED = 64  # R, rows of a projected gradient
METHOD = "lora"  # whose gradient is the projection


@dataclass(frozen=True)
class KernelGradient:
  """The expected gradient G of one kernel (…, I, O)."""

  module: str
  fan_in: int
  fan_out: int
  parameters: int  # of the kernel
  energy: float  # ‖G‖², free of the batches' noise; 0 where there is only noise


def kernel_gradients(cfg: Config, base: Tree, batches: Iterable[Batch], count: int) -> list[KernelGradient]:
  """The gradients at the base of the modules that `cfg` adapts, from `count` training batches without dropout.

  The batches are split in two halves, whose mean gradients share only the expected gradient and no noise: ⟨G₁, G₂⟩ is
  an unbiased estimate of ‖E G‖². Raises InputError if `cfg` adapts no module.
  """
  plan = make_plan(_projection(cfg))
  job = make_job(plan, base, 1)
  [name] = [name for name, leaf in methods.get(METHOD).leaves.items() if leaf.axes == "RO"]
  halves = _mean_gradients(job, batches, count)
  gradients = []
  for row in plan.table:
    first, second = (half[f"{row.path}.{name}"] for half in halves)
    energy = float((first * second).sum()) * max(1.0, row.fan_in / PROJECTED)
    kernels = first.size // (PROJECTED * row.fan_out)  # in a stack
    size = kernels * row.fan_in * row.fan_out
    gradients.append(KernelGradient(row.path, row.fan_in, row.fan_out, size, max(0.0, energy)))
  return gradients


def _projection(cfg: Config) -> Config:
  """`cfg` with the adapter whose gradient is the projection."""
  same = {name: getattr(cfg.lora, name) for name in ("targets", "exclude", "layers", "quant")}
  adapter = LoraConfig(method=METHOD, rank=PROJECTED, alpha=float(PROJECTED), init="orthogonal", **same)
  return replace(cfg, lora=adapter, model=replace(cfg.model, dropout=0.0))


def _mean_gradients(job: Job, batches: Iterable[Batch], count: int) -> list[dict[str, np.ndarray]]:
  """The mean gradients of the even and of the odd batches, float64, by dotted path."""
  projected = _projected_gradient(job)
  sums: list[Tree | None] = [None, None]
  with console.progress("gradients at the base", count, "batches") as bar:
    for number, batch in zip(range(count), batches, strict=False):
      grads, total = projected(job.put(batch)), sums[number % 2]
      sums[number % 2] = grads if total is None else jax.tree.map(jnp.add, total, grads)
      bar.advance()
  return [{path: np.asarray(x, np.float64) / (count // 2) for path, x in flatten(half).items()} for half in sums]


def _projected_gradient(job: Job) -> Callable[[Mapping[str, jax.Array]], Tree]:
  """The compiled function of a batch on the devices that gives the gradient of the first trial's leaves."""
  params, trial = jax.tree.map(_first, (job.state.params, job.trials))

  def projected(params: Tree, frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
    return gradient(job.program, params, trial, frozen, dict(batch), job.keys[0])[0]

  compiled = jax.jit(projected)
  return lambda batch: compiled(params, job.frozen, batch)


def _first(x: jax.Array) -> jax.Array:
  return x[0]
