"""Parameters, bytes and FLOPs of a config before anything is allocated."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.config import Config
from lora_exp.config.conversion import shown
from lora_exp.data.examples import batch_shapes
from lora_exp.runtime import console
from lora_exp.runtime.mesh import flatten, keep_programs
from lora_exp.train.build import Plan, check_built, make_job
from lora_exp.train.loop import Job
from lora_exp.train.memory import MemoryEstimate, device_memory, estimate, nbytes


def run(cfg: Config) -> None:
  """Prints the plan of `cfg`: parameters, the step's memory and FLOPs by XLA's analysis, and the largest pack."""
  keep_programs(cfg.cache)
  plan = check_built(cfg)
  show_parameters(plan)
  solo, memory = compiled_job(plan, 1), device_memory()
  # From two trials to four (a device): one alone is compiled without the loop over trials, and is no measure of the next.
  ways = plan.layout.mesh.shape["trial"]
  two, four = (compiled_job(plan, n * ways).peak_memory_bytes for n in (2, 4))
  growth = (four - two) // 2
  need = estimate(plan).at_least(MemoryEstimate(solo.peak_memory_bytes, growth))  # as a sweep's packs are measured
  tokens = cfg.train.batch_size * cfg.data.seq_len
  base_bytes = sum(x.size * x.dtype.itemsize for x in flatten(plan.base).values())
  trials = need.most(memory)
  console.show_facts(
    "One optimizer step",
    {
      "tokens": tokens,
      "FLOPs": solo.flops,
      "FLOPs a token": solo.flops / tokens,
      "base": nbytes(base_bytes),
      "memory of the step": nbytes(solo.peak_memory_bytes),
      "and for each further trial": nbytes(need.further),
      "memory there is": nbytes(memory),
      "largest pack that fits": f"{trials:,} trials" if trials else "none: try optim.accumulate, or a larger mesh",
    },
  )


def show_config(cfg: Config, run_dir: Path) -> None:
  """Every setting of the run that is not null, a line for each group; of further data, what differs from `data`."""
  node = {name: value for name, value in asdict(cfg).items() if name not in ("format", "out", "merge")}
  if cfg.model.base != "pretrain":
    node["pretrain_data"], node["model"]["pretrain"] = None, None
  for name in ("pretrain_data", "retain"):
    if node[name] is not None:
      node[name] = {key: value for key, value in node[name].items() if value != node["data"][key]}
  console.show_facts(str(run_dir), dict(_lines(node, "")))


def _lines(node: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
  words = [f"{key}={shown(value)}" for key, value in node.items() if value is not None and not isinstance(value, dict)]
  if words or path in ("pretrain_data", "retain"):
    yield path or "run", " ".join(words) or "as data"
  for key, value in node.items():
    if isinstance(value, dict):
      yield from _lines(value, f"{path}.{key}" if path else key)


def show_parameters(plan: Plan) -> None:
  """The tables that every run prints: adapted modules, parameters, and how arrays lie on a mesh of several devices."""
  if plan.table:
    columns = ("module", "kernel", "rank", "alpha", "scale", "trainable")
    rows = [(r.path, f"{r.fan_in}×{r.fan_out}", r.rank, r.alpha, r.scale, r.parameters) for r in plan.table]
    console.show_table(f"AdaptedModule modules ({len(rows)})", columns, _folded(rows))
  counts = plan.parameters()
  facts = {**counts, "percent": f"{counts['percent']:.3g} %"}
  console.show_facts(f"Parameters, lora={plan.cfg.lora.method}", facts)
  if plan.layout.mesh.size > 1:
    split = " × ".join(f"{k} {v}" for k, v in plan.layout.mesh.shape.items() if v > 1)
    console.show_table(f"Sharding over {split}", ("array", "shape", "split over", "note"), plan.layout.table(plan.base))


def _folded(rows: list[tuple]) -> list[tuple]:
  """Rows that differ only in the number of their block, as one: `blocks.{0-3}.linear1`, its last column their sum."""
  found = []
  for name, places in folded(rows):
    _, *rest = rows[places[0]]
    found.append((name, *rest[:-1], rest[-1] * len(places)))
  return found


def folded(keys: Sequence[tuple]) -> list[tuple[str, list[int]]]:
  """(name, places) of the keys, a module's path first, that differ only in the number of its block."""
  groups: dict[tuple, list[int]] = {}
  for place, key in enumerate(keys):
    kind = ".".join("*" if s.isdigit() else s for s in key[0].split("."))
    groups.setdefault((kind, *key[1:]), []).append(place)
  found = []
  for (kind, *_), places in groups.items():
    numbers = [next((s for s in keys[p][0].split(".") if s.isdigit()), "") for p in places]
    if len(places) == 1:
      found.append((keys[places[0]][0], places))
      continue
    whole = [str(n) for n in range(int(numbers[0]), int(numbers[-1]) + 1)] == numbers
    name = f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(numbers)
    found.append((kind.replace("*", f"{{{name}}}", 1), places))
  return found


def abstract_batch(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch, in its place on the mesh."""
  rows, length = plan.cfg.train.batch_size, plan.cfg.data.seq_len
  if plan.cfg.data.numbers:
    shapes = batch_shapes(plan.cfg.data.source, rows)
    return {k: jax.ShapeDtypeStruct(*shape, sharding=plan.layout.batch) for k, shape in shapes.items()}
  ints = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=plan.layout.batch)
  floats = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=plan.layout.batch)
  return {"tokens": ints, "targets": ints, "segments": ints, "positions": ints, "weights": floats}


def abstract_job(plan: Plan, trials: int = 1) -> Job:
  """A pack of `trials` trials alike over an abstract base: it compiles, and holds no weight."""
  places = plan.layout.shardings(plan.base)
  base = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plan.base, places)
  return make_job(plan, base, steps_of(plan.cfg, 1), [plan] * trials)


def compiled_job(plan: Plan, trials: int) -> Job:
  """The compiled step of `trials` trials, whose memory and FLOPs XLA and the trace tell."""
  job = abstract_job(plan, trials)
  job.compile(abstract_batch(plan))
  return job


def steps_of(cfg: Config, train_rows: int) -> int:
  """Optimizer steps of a run: `train.steps`, or `train.epochs` passes over the rows; none for lora=frozen."""
  if cfg.lora.method == "frozen":
    return 0
  return cfg.train.steps or max(1, math.ceil((cfg.train.epochs or 0) * train_rows / cfg.train.batch_size))
