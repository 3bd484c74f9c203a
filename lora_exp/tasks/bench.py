"""`task=bench`: measures the speed of steps, data, evaluation, generation, start-up and a pack on this machine.

Sides that are compared take turns, and the median counts. The programs are those that training runs.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lora_exp.config import Config
from lora_exp.config.schema.task_settings import BenchConfig
from lora_exp.config.typed_command import typed_overrides
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.files import write_json
from lora_exp.runtime.program_cache import keep_programs
from lora_exp.train.benchmarks.bench_data import measure_data
from lora_exp.train.benchmarks.bench_evaluation import measure_evaluation
from lora_exp.train.benchmarks.bench_generation import measure_generation
from lora_exp.train.benchmarks.bench_pack import measure_pack
from lora_exp.train.benchmarks.bench_rows import Row, show_rows, to_json
from lora_exp.train.benchmarks.bench_startup import STARTUP, measure_startup
from lora_exp.train.benchmarks.bench_step import measure_step
from lora_exp.train.benchmarks.bench_subject import Subject, make_subject
from lora_exp.train.benchmarks.machine import machine_facts
from lora_exp.train.costs.memory import memory_errors

FILE = "bench.json"  # in the directory `out`
PARTS: dict[str, tuple[str, Callable[[Subject, BenchConfig], list[Row]]]] = {  # by the names of bench.parts
  "step": ("measure the training step", measure_step),
  "data": ("measure the data pipeline", measure_data),
  "eval": ("measure evaluation", measure_evaluation),
  "generate": ("measure generation", measure_generation),
  "pack": ("measure a pack", measure_pack),
}


def run(cfg: Config) -> dict[str, object]:
  """Measures the parts in `bench.parts`, prints a table, writes bench.json into `out`, and returns its content."""
  typed = typed_overrides("bench")
  rows: list[Row] = []
  if STARTUP in cfg.bench.parts:  # before this process uses the devices
    with console.phase("measure start-up"):
      rows += measure_startup(cfg, typed)
  with _empty_program_cache(cfg.cache):
    machine, subject = machine_facts(), make_subject(cfg)
    with memory_errors(subject.plan):
      for name, (title, measure) in PARTS.items():
        if name in cfg.bench.parts:
          with console.phase(title):
            rows += measure(subject, cfg.bench)
  settings = _settings(subject)
  content = {
    "time": datetime.now(UTC).isoformat(timespec="seconds"),
    "machine": machine,
    "settings": settings,
    "typed": typed,
    "turns": cfg.bench.turns,
    "parts": to_json(rows),
  }
  console.show_facts("Machine", machine)
  show_rows(f"Bench: {', '.join(f'{name} {console.cell(value)}' for name, value in settings.items())}", rows)
  if cfg.out is not None:
    path = Path(cfg.out) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    console.show(f"\nWritten: {display_path(path)}. The sides took {cfg.bench.turns} turns each.")
  return content


@contextmanager
def _empty_program_cache(cache: str) -> Iterator[None]:
  """Context in which programs are compiled as in a first run, and are not kept in `cache`."""
  with tempfile.TemporaryDirectory() as programs:
    start_jax(programs, show_device=False)
    try:
      yield
    finally:
      keep_programs(cache)


def _settings(subject: Subject) -> dict[str, object]:
  """The settings that matter for speed."""
  cfg = subject.plan.cfg
  return {
    "model": cfg.model.family,
    "parameters": int(subject.plan.parameters()["frozen"]),
    "rank": cfg.lora.rank,
    "rows": cfg.train.batch_size,
    "tokens": cfg.data.seq_len,
    "dtype": cfg.model.dtype,
  }
