"""Parameters, bytes and FLOPs of a config before anything is allocated."""

import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_exp import screen
from lora_exp.build import Plan, check_built, make_job
from lora_exp.config import Config
from lora_exp.loop import Job
from lora_exp.mesh import flatten, keep_programs
from lora_exp.step import train_step


def run(cfg: Config) -> None:
  """Prints the plan of `cfg`: parameters, the step's memory and FLOPs by XLA's analysis, and the largest pack."""
  keep_programs(cfg.cache)
  plan = check_built(cfg)
  show_parameters(plan)
  sizes = {arms: step_bytes(plan, arms) for arms in (1, 2)}
  per_arm, memory = sizes[2] - sizes[1], device_memory()
  tokens = cfg.train.batch_size * cfg.data.seq_len
  base_bytes = sum(x.size * x.dtype.itemsize for x in flatten(plan.base).values())
  arms = max(0, 1 + (memory - sizes[1]) // max(1, per_arm))
  screen.show_facts(
    "One optimizer step",
    {
      "tokens": tokens,
      "FLOPs": step_flops(plan),
      "FLOPs a token": step_flops(plan) / tokens,
      "base": nbytes(base_bytes),
      "memory of the step": nbytes(sizes[1]),
      "and for each further arm": nbytes(per_arm),
      "memory there is": nbytes(memory),
      "largest pack that fits": f"{arms:,} arms" if arms else "none: use a smaller batch, accumulate, or a larger mesh",
    },
  )


def show_parameters(plan: Plan) -> None:
  """The tables that every run prints: adapted modules, parameters, and how arrays lie on a mesh of several devices."""
  if plan.table:
    columns = ("module", "kernel", "rank", "alpha", "scale", "trainable")
    rows = [(r.path, f"{r.fan_in}×{r.fan_out}", r.rank, r.alpha, r.scale, r.parameters) for r in plan.table]
    screen.show_table(f"Adapted modules ({len(rows)})", columns, _folded(rows))
  facts = plan.parameters()
  facts["percent"] = f"{facts['percent']:.3g} %"
  screen.show_facts(f"Parameters (lora={plan.cfg.lora.method})", facts)
  if plan.layout.mesh.size > 1:
    split = " × ".join(f"{k} {v}" for k, v in plan.layout.mesh.shape.items() if v > 1)
    screen.show_table(f"Sharding over {split}", ("array", "shape", "split over", "note"), plan.layout.table(plan.base))


def _folded(rows: list[tuple]) -> list[tuple]:
  """Rows that differ only in the number of their block, as one: `blocks.0-3.linear1`."""
  groups: dict[tuple, list[tuple]] = {}
  for row in rows:
    kind = ".".join("*" if s.isdigit() else s for s in row[0].split("."))
    groups.setdefault((kind, *row[1:]), []).append(row)
  folded = []
  for (kind, *rest), members in groups.items():
    numbers = [next((s for s in m[0].split(".") if s.isdigit()), "") for m in members]
    if len(members) == 1:
      folded.append(members[0])
      continue
    whole = [str(n) for n in range(int(numbers[0]), int(numbers[-1]) + 1)] == numbers
    name = f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(numbers)
    folded.append((kind.replace("*", f"{{{name}}}", 1), *rest[:-1], rest[-1] * len(members)))
  return folded


def abstract_batch(plan: Plan) -> dict[str, jax.Array]:
  """The shapes of a batch, in its place on the mesh."""
  rows, length = plan.cfg.train.batch_size, plan.cfg.data.seq_len
  ints = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=plan.layout.batch)
  floats = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=plan.layout.batch)
  return {"tokens": ints, "targets": ints, "segments": ints, "positions": ints, "weights": floats}


def abstract_job(plan: Plan, arms: int = 1) -> Job:
  """A pack of `arms` arms alike over an abstract base: it compiles, and holds no weight."""
  places = plan.layout.shardings(plan.base)
  base = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plan.base, places)
  return make_job(plan, base, steps_of(plan.cfg, 1), [plan.cfg] * arms)


def step_bytes(plan: Plan, arms: int) -> int:
  """XLA's figure for the memory of one compiled step of a pack, on one device."""
  job = abstract_job(plan, arms)
  job.compile(abstract_batch(plan))
  return job.peak_memory_bytes


def step_flops(plan: Plan) -> int:
  """Floating-point operations of the matrix products of one step of one arm, counted in its program."""
  job = abstract_job(plan)
  function = lambda *args: train_step(job.program, *args)
  return count_flops(function, job.state, job.arms, job.frozen, abstract_batch(plan), job.key)


def count_flops(function: Callable, *args) -> int:
  """Twice the multiplications of all matrix products that `function` runs, loops counted as often as they turn."""
  closed = jax.make_jaxpr(jax.jit(function))(*args)
  return _flops(closed.jaxpr)


def _flops(jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    inner = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    total += times * sum(_flops(getattr(v, "jaxpr", v)) for v in inner)
  return total


def steps_of(cfg: Config, train_rows: int) -> int:
  """Optimizer steps of a run: `train.steps`, or `train.epochs` passes over the rows; none for lora=frozen."""
  if cfg.lora.method == "frozen":
    return 0
  return cfg.train.steps or max(1, math.ceil((cfg.train.epochs or 0) * train_rows / cfg.train.batch_size))


def device_memory() -> int:
  """Bytes that programs may use on one device: what an accelerator reports, or the machine's free memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def nbytes(count: float) -> str:
  """A number of bytes as people write it."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if abs(count) < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} TiB"
