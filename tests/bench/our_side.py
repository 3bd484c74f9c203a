"""Our training step on a given batch, and the files from which another library starts at the same values.

    settings = ["model=smollm2_135m", "lora.rank=8"]
    write_case(directory, settings)            # model/ and adapter/ for transformers and PEFT, and batch.npz
    losses = case_step(directory, settings).run(3)
"""

import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_exp import lora
from lora_exp.cli.compose import composer, conf_directory
from lora_exp.config import to_config
from lora_exp.train.base import make_base
from lora_exp.train.compiled_step import compile_step
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.job import Job, make_job
from lora_exp.train.merging.model_directory import write_model
from lora_exp.train.plan import Plan, make_plan

# A constant rate of Adam without clipping, so that other libraries need no schedule. The mesh is that of one device.
PLAIN = ["optim.lr=1e-4", "optim.schedule=constant", "optim.warmup=0", "optim.clip=null", "mesh.data=1",
         "data@retain=none", "sample=none", "logger=none"]  # fmt: skip
LENGTH = 100_000  # length of the schedule, which is constant


def plan_of(settings: list[str]) -> Plan:
  """The plan of a command line."""
  with composer(conf_directory()) as composing:
    return make_plan(to_config(composing.compose([*PLAIN, *settings])))


def random_batch(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
  """Random token ids and the token after each, int32 (B, T)."""
  shape = (plan.cfg.train.batch_size, plan.cfg.data.seq_len + 1)
  rows = np.random.default_rng(seed).integers(0, plan.vocab_size, shape, np.int32)
  return {"tokens": rows[:, :-1], "labels": rows[:, 1:]}


def training_batch(tokens: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """A batch of the data pipeline: each row is one document, and every target counts."""
  return {
    "tokens": tokens,
    "targets": labels,
    "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
    "segments": np.ones_like(tokens),
    "weights": np.ones(tokens.shape, np.float32),
  }


def adapter_of(job: Job, plan: Plan, seed: int = 0, std: float = 0.01) -> lora.Adapter:
  """The adapter of a job, with random values instead of zeros in B, so that a loss depends on all of it."""
  adapter = take_trial(jax.device_get(job.state.params), plan.table, plan.full, job.program.method, 0)
  rng = np.random.default_rng(seed)

  def moved(leaves: dict[str, Any]) -> dict[str, Any]:
    b_RO = rng.normal(0, std, leaves["lora_b"].shape).astype(np.float32)
    return {**leaves, "lora_b": b_RO}

  return replace(adapter, leaves={path: moved(leaves) for path, leaves in adapter.leaves.items()})


def write_case(directory: Path, settings: list[str], base: Tree | None = None) -> None:
  """Writes the base as model/ (transformers), an adapter as adapter/ (PEFT) and a batch as batch.npz."""
  plan = plan_of(settings)
  base = make_base(plan)[0] if base is None else base
  (directory / "model").mkdir(parents=True)
  if not write_model(directory / "model", plan, base):
    sys.exit(f"transformers cannot load the model of {' '.join(settings)}")
  adapter = adapter_of(make_job(plan, base, LENGTH), plan)
  lora.save_adapter(directory / "adapter", adapter, plan.naming(), {}, base=None)
  np.savez(directory / "batch.npz", **random_batch(plan))


def case_settings(directory: Path, settings: list[str]) -> list[str]:
  """`settings` on the base and the adapter that `write_case` wrote."""
  return [*settings, "model.base=weights", f"model.weights={directory / 'model'}",
          f"lora.init_from={directory / 'adapter'}"]  # fmt: skip


def case_step(directory: Path, settings: list[str], trials: int = 1) -> "OurStep":
  """The step on the case in a directory, of one trial or of a pack of `trials` equal ones."""
  plan = plan_of(case_settings(directory, settings))
  job = make_job(plan, make_base(plan)[0], LENGTH, [plan] * trials)
  return OurStep(job, training_batch(**np.load(directory / "batch.npz")))


class OurStep:
  """A compiled step and one batch."""

  def __init__(self, job: Job, batch: dict[str, np.ndarray]):
    self.batch = job.put(batch)
    self.step, self.state = compile_step(job, self.batch), job.state

  @property
  def flops(self) -> int:
    """The FLOPs of all matrix products of a step."""
    return self.step.flops

  def run(self, steps: int) -> list[float]:
    """Trains `steps` times, waits for the device, and returns the loss of each step."""
    losses = []
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch)
      losses.append(metrics["loss"])
    jax.block_until_ready(self.state)
    return [float(loss[0]) for loss in losses]

  def peak_memory_bytes(self) -> int:
    """The peak of the device's allocator; on a CPU that of the process, with its libraries."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
      return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
