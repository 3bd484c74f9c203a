"""The part `step`: tokens per second, memory and compilation of a training step, and its share of the limit."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import jax

from lora_exp.config.schema.task_settings import BenchConfig
from lora_exp.runtime.flops import MatrixProduct
from lora_exp.train.benchmarks.bench_rows import Row
from lora_exp.train.benchmarks.bench_subject import StepRunner, Subject
from lora_exp.train.benchmarks.matrix_rate import largest, limit_seconds, product_side, square
from lora_exp.train.benchmarks.turns import Side, Spread, spread, take_turns
from lora_exp.train.compiled_step import step_products
from lora_exp.train.plan import Plan
from lora_exp.train.run_summary import process_bytes

STEP, SQUARE = "step", "square"  # sides; the others are matrix products
MATRIX_SHARE = 0.1  # of a step's seconds in a turn, for each shape of a matrix product


def measure_step(subject: Subject, settings: BenchConfig) -> list[Row]:
  """The rows of the part."""
  runner = subject.solo
  runner.work(1)
  memory = memory_rows(STEP, runner)
  products, dtype = step_products(subject.plan), subject.plan.cfg.model.dtype
  measured_products = list(largest(products))
  sides = {STEP: Side(runner.work), SQUARE: product_side(square(dtype), MATRIX_SHARE)}
  names = {f"product {i}": product for i, product in enumerate(measured_products)}
  sides |= {name: product_side(product, MATRIX_SHARE) for name, product in names.items()}
  times = take_turns(sides, settings.turns, settings.seconds)
  needed = needed_flops(subject.plan, products)
  limits = [limit_seconds(products, needed, {product: times[name][turn] for name, product in names.items()})
            for turn in range(settings.turns)]
  return [
    *speed_rows(STEP, subject.tokens, times[STEP]),
    Row(STEP, "flops_needed", "needed FLOPs, 1e9", needed, 1e-9),
    Row(STEP, "flops_per_s", "the same a second, 1e9", rates(needed, times[STEP]), 1e-9),
    Row(STEP, "matrix_flops_per_s", "plain products of its shapes, 1e9", rates(needed, limits), 1e-9),
    Row(STEP, "square_flops_per_s", f"square products ({dtype}), 1e9", rates(square(dtype).flops, times[SQUARE]),
        1e-9),
    Row(STEP, "share_of_limit", "share of the limit", shares(limits, times[STEP])),
    *memory,
    Row(STEP, "compile_seconds", "compilation, s", runner.step.seconds),
    Row(STEP, "loss", "last loss", runner.losses()[0]),
  ]  # fmt: skip


def speed_rows(part: str, tokens: int, seconds: list[float]) -> list[Row]:
  """Tokens per second and milliseconds of steps with `tokens` tokens."""
  return [Row(part, "tokens_per_s", "tokens/s", rates(tokens, seconds)),
          Row(part, "step_seconds", "a step, ms", spread(seconds), 1e3)]  # fmt: skip


def memory_rows(part: str, runner: StepRunner) -> list[Row]:
  """The memory of a compiled step, and the peak so far: of the device's allocator, or on a CPU of the process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  peak, name = stats.get("peak_bytes_in_use"), "device"
  if peak is None:
    peak, name = process_bytes(), "process"
  return [Row(part, "step_memory_bytes", "memory of the step, MB", runner.step.peak_memory_bytes, 1e-6),
          Row(part, f"{name}_peak_bytes", f"peak of the {name}, MB", peak, 1e-6)]  # fmt: skip


def needed_flops(plan: Plan, products: Counter[MatrixProduct]) -> int:
  """The FLOPs that the step needs: those that it computes, or fewer if it recomputes or merges."""
  cfg = plan.cfg
  plainest = replace(cfg, model=replace(cfg.model, remat=False), lora=replace(cfg.lora, compute="factored"))
  return min(flops_of(products), flops_of(step_products(replace(plan, cfg=plainest))))


def flops_of(products: Mapping[MatrixProduct, int]) -> int:
  """The FLOPs of all products."""
  return sum(count * product.flops for product, count in products.items())


def rates(amount: float, seconds: list[float]) -> Spread:
  """The spread of `amount` per second."""
  return spread([amount / s for s in seconds])


def shares(limits: list[float], seconds: list[float]) -> Spread:
  """The spread of limits divided by times, turn by turn."""
  return spread([limit / s for limit, s in zip(limits, seconds, strict=True)])
