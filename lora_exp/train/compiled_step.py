"""The training step of a job as one compiled program, with its memory and FLOPs."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from lora_exp.data.sources import source_class
from lora_exp.runtime import console
from lora_exp.runtime.flops import MatrixProduct, count_flops, matrix_products
from lora_exp.runtime.native_memory import release_freed_memory
from lora_exp.train.compute.program import State
from lora_exp.train.compute.step import state_shardings, train_step
from lora_exp.train.job import Job, abstract_job
from lora_exp.train.plan import Plan


@dataclass(frozen=True)
class CompiledStep:
  """One optimizer step, (state, batch) -> (state, metrics). It donates the arrays of the given state."""

  job: Job
  compiled: jax.stages.Compiled
  seconds: float  # spent on tracing and compiling
  flops: int  # of all matrix products in one step, for all trials together

  def __call__(self, state: State, batch: Mapping[str, Any]) -> tuple[State, dict[str, jax.Array]]:
    state, metrics = self.compiled(state, self.job.trials, self.job.frozen, batch, self.job.keys)
    return state, metrics

  @cached_property  # the analysis takes a tenth of a second
  def _memory(self) -> Any:
    return self.compiled.memory_analysis()

  @property
  def peak_memory_bytes(self) -> int:
    """Peak memory on one device by XLA's analysis: arguments, outputs that are not donated, and temporaries."""
    return self._memory.argument_size_in_bytes + self.working_bytes

  @property
  def working_bytes(self) -> int:
    """`peak_memory_bytes` without the arguments, which are already allocated."""
    m = self._memory
    return m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def compile_step(job: Job, batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> CompiledStep:
  """Compiles the training step of `job` for batches with the shapes of `batch`."""
  start = time.monotonic()
  release_freed_memory()
  with console.phase("compile the training step"):
    traced = _trace_step(job, batch)
    flops = count_flops(traced.jaxpr.jaxpr)
    compiled = traced.lower().compile()
    release_freed_memory()
  return CompiledStep(job, compiled, time.monotonic() - start, flops)


def _trace_step(job: Job, batch: Mapping[str, Any]) -> jax.stages.Traced:
  """The training step of `job` as a jaxpr, with its shardings."""
  if job.teacher is not None and "teacher" not in batch:
    batch = job.teacher.abstract(batch)

  def step(state, trials, frozen, batch, keys):
    return train_step(job.program, state, trials, frozen, batch, keys)

  shardings = (state_shardings(job.program, job.state), job.program.layout.replicated)
  return jax.jit(step, donate_argnums=0, out_shardings=shardings).trace(
    job.state, job.trials, job.frozen, batch, job.keys
  )


def lower_step(job: Job, batch: Mapping[str, Any]) -> jax.stages.Lowered:
  """The training step of `job` before XLA's optimizations."""
  return _trace_step(job, batch).lower()


def count_step_flops(job: Job, batch: Mapping[str, Any]) -> int:
  """The FLOPs of the step of `job`, whose arrays may be abstract. It is traced, and not compiled."""
  return count_flops(_trace_step(job, batch).jaxpr.jaxpr)


def solo_flops(plan: Plan) -> int:
  """The FLOPs of the step of `plan` in a pack of its own, without allocating weights or compiling."""
  return count_step_flops(abstract_job(plan), abstract_batch(plan))


def step_products(plan: Plan) -> Counter[MatrixProduct]:
  """How often the step of `plan` computes each shape of a matrix product. Allocates and compiles nothing."""
  return matrix_products(_trace_step(abstract_job(plan), abstract_batch(plan)).jaxpr.jaxpr)


def compile_abstract(plan: Plan, trials: int) -> CompiledStep:
  """Compiles the step of `trials` equal trials without allocating weights, to measure its memory and FLOPs."""
  return compile_step(abstract_job(plan, trials), abstract_batch(plan))


def abstract_batch(plan: Plan, orders: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
  """A training batch as ShapeDtypeStructs: shapes, dtypes and shardings. Several `orders` are a leading axis."""
  rows, length = plan.cfg.train.batch_size, plan.cfg.data.seq_len
  shapes = source_class(plan.cfg.data.source).batch_shapes(rows, length)
  lead, sharding = ((), plan.layout.batch) if orders == 1 else ((orders,), plan.layout.order_batch)
  return {
    name: jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()
  }
