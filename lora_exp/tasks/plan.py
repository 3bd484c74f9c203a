"""`task=plan`: parameters, bytes and FLOPs of a config, without allocating arrays."""

from lora_exp.config import Config
from lora_exp.config.typed_command import training_command
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compiled_step import compile_abstract
from lora_exp.train.costs.memory import MemoryEstimate, device_memory, estimate, nbytes
from lora_exp.train.costs.plan_tables import show_parameters
from lora_exp.train.plan import make_plan


def run(cfg: Config) -> None:
  """Prints the plan of `cfg`: parameters, memory and FLOPs of the step from XLA's analysis, and the largest pack."""
  start_jax(cfg.cache)
  plan = make_plan(cfg)
  show_parameters(plan)
  solo, memory = compile_abstract(plan, 1), device_memory()
  # The growth from two to four trials per device, because a single trial is compiled without the loop over trials.
  ways = plan.layout.mesh.shape["trial"]
  two, four = (compile_abstract(plan, n * ways).peak_memory_bytes for n in (2, 4))
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
  command = training_command("plan")
  if command is not None:
    console.show_command("Train it:", command)
