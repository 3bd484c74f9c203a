"""LoRA on one GPU: our step against transformers and PEFT, packed trials against one after another, and a 7B base.

    python tests/bench/gpu.py                    # all parts: under eight minutes on an H100
    python tests/bench/gpu.py smollm2 pack       # some of them: rate, attention, smollm2, llama_1b, pack, mistral_7b

Bases have random weights in bfloat16, adapters are float32 and on all linear layers. Each side of a comparison runs in
a process of its own. They load and compile at the same time; then they take turns of a few steps, and medians are
compared. Prints tables and writes gpu.json. It needs torch, transformers and peft.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = ["model.base=random", "model.dtype=bfloat16", "model.param_dtype=bfloat16", "model.tokenizer=bytes",
        "lora.alpha=16", "lora.targets=all_linear"]  # fmt: skip
SMOLLM2 = ["model=smollm2_135m", *BASE]
CASES = {
  "smollm2": [*SMOLLM2, "lora.rank=8", "data.seq_len=512", "train.batch_size=16"],
  "llama_1b": ["model=llama3_2_1b", *BASE, "model.vocab_size=128256", "lora.rank=8", "data.seq_len=1024",
               "train.batch_size=4"],
  "pack": [*SMOLLM2, "data.seq_len=128"],
  "mistral_7b": ["model=mistral_7b", *BASE, "model.vocab_size=32000", "lora.quant=nf4", "lora.rank=8",
                 "data.seq_len=1024", "train.batch_size=4", "model.remat=true"],
}  # fmt: skip
COMPARED = ("peft", "peft_compiled", "ours")
PACKED = ("alone", "pack_16", "batch_16", "pack_32", "batch_32")
RANKS = (4, 8, 16, 32)  # of packed trials, in turn; the run alone has the highest
ROWS = 4  # of a packed trial
TURNS, STEPS = 7, 10
READY_WITHIN = 150  # seconds for loading and compiling; a side that takes longer is left out


def random_step(side: str, settings: list[str]) -> Any:
  """Our step with random weights: of `alone`, `pack_N` or `batch_N`, or of the settings as they are."""
  from our_side import LENGTH, OurStep, plan_of, random_batch, training_batch

  from lora_exp.train.base import random_base
  from lora_exp.train.job import make_job

  kind, _, count = side.partition("_")
  if kind == "pack":
    plans = [plan_of([*settings, f"train.batch_size={ROWS}", f"lora.rank={RANKS[i % len(RANKS)]}"])
             for i in range(int(count))]  # fmt: skip
  elif kind in ("alone", "batch"):
    rows = ROWS * int(count or 1)
    plans = [plan_of([*settings, f"train.batch_size={rows}", f"lora.rank={max(RANKS)}"])]
  else:
    plans = [plan_of(settings)]
  job = make_job(plans[0], random_base(plans[0]), LENGTH, plans)
  return OurStep(job, training_batch(**random_batch(plans[0])))


def make_step(side: str, directory: Path, settings: list[str]) -> Any:
  """The step of one side, with `run` and `peak_memory_bytes`."""
  if side == "ours":
    from our_side import case_step

    return case_step(directory, settings)
  if not side.startswith("peft"):
    return random_step(side, settings)
  import numpy as np
  import torch
  from peft_side import PeftSettings, peft_step

  batch, device = np.load(directory / "batch.npz"), "cuda" if torch.cuda.is_available() else "cpu"
  given = PeftSettings(batch["tokens"], batch["labels"], adapter=directory / "adapter")
  return peft_step(directory / "model", given, side == "peft_compiled", dtype="bfloat16", device=device)


def serve(side: str, directory: Path, settings: list[str]) -> None:
  """The process of one side: for each number of steps on standard input, a line of JSON with their losses and times."""
  began = time.perf_counter()
  step = make_step(side, directory, settings)
  for line in sys.stdin:
    start = time.perf_counter()
    losses = step.run(int(line))
    seconds = time.perf_counter() - start
    said = {"losses": losses, "seconds": seconds / len(losses), "peak": step.peak_memory_bytes(),
            "start": time.perf_counter() - began, "tflop": getattr(step, "flops", 0) / 1e12}  # fmt: skip
    print(json.dumps(said), flush=True)


class Side:
  """A process that runs steps on request. What it prints is kept in a log, which is shown if it fails."""

  def __init__(self, case: str, name: str, directory: Path):
    command = [sys.executable, __file__, "--side", name, "--case", str(directory), *CASES[case]]
    self.name, self.log = f"{case} {name}", directory / f"{name}.log"
    with self.log.open("w") as log:
      self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

  def run(self, steps: int, within: float = 60) -> dict[str, Any] | None:
    """The result of a turn of `steps`. None if the process failed, or was ended after `within` seconds."""
    timer = threading.Timer(within, self.process.kill)
    timer.start()
    try:
      print(steps, file=self.process.stdin, flush=True)
      line = next((line for line in self.process.stdout or () if line.startswith('{"losses"')), None)
    except BrokenPipeError:
      line = None
    timer.cancel()
    if line is None:
      print(f"{self.name} failed, or was not ready in {within} s:\n{self.log.read_text()[-800:]}", flush=True)
    return None if line is None else json.loads(line)

  def close(self) -> None:
    """Ends the process and frees its memory on the GPU."""
    self.process.kill()
    self.process.wait()


class Comparison:
  """The sides of one case. Creating it starts their processes; `measure` waits for them and takes turns."""

  def __init__(self, case: str, names: tuple[str, ...], directory: Path):
    self.case = case
    directory.mkdir(parents=True)
    if "peft" in names:
      run_part("--write", "--case", str(directory), *CASES[case])
    self.sides = {name: Side(case, name, directory) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
      first = dict(zip(names, pool.map(lambda side: side.run(3, READY_WITHIN), self.sides.values()), strict=True))
    self.first = {name: result for name, result in first.items() if result}
    waited = ", ".join(f"{name} {result['start']:.0f} s" for name, result in self.first.items())
    print(f"({case} is ready: {waited})", flush=True)

  def measure(self) -> dict[str, Any]:
    """Medians of the sides, which take turns."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in self.first}
    for _ in range(TURNS + 1):
      for name, results in turns.items():
        result = self.sides[name].run(STEPS)
        if result:
          results.append(result)
    for side in self.sides.values():
      side.close()
    return {name: self._medians(name, results[1:]) for name, results in turns.items() if len(results) > 1}

  def _medians(self, name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one side."""
    seconds, first = [result["seconds"] for result in results], self.first[name]
    middle = statistics.median(seconds)
    return {"ms": 1e3 * middle, "ms_range": [1e3 * min(seconds), 1e3 * max(seconds)], "start_s": first["start"],
            "peak_gb": results[-1]["peak"] / 1e9, "losses": first["losses"],
            "tflop_per_s": first["tflop"] / middle or None}  # fmt: skip


def show(case: str, found: dict[str, Any]) -> None:
  """Prints the table of a comparison, with speeds relative to the first side."""
  print(f"\n{case}: {' '.join(CASES[case])}")
  print(f"{'':15}{'ms/step':>9}{'range':>17}{'speed':>7}{'TFLOP/s':>9}{'peak GB':>9}{'start s':>9}  first losses")
  slowest = next(iter(found.values()))["ms"] if found else 0
  for name, values in found.items():
    low, high = values["ms_range"]
    rate = f"{values['tflop_per_s']:9.0f}" if values["tflop_per_s"] else " " * 9
    losses = " ".join(f"{loss:.4f}" for loss in values["losses"])
    print(f"{name:15}{values['ms']:9.2f}{f'{low:.2f} to {high:.2f}':>17}{slowest / values['ms']:7.2f}{rate}"
          f"{values['peak_gb']:9.2f}{values['start_s']:9.0f}  {losses}")  # fmt: skip
  for trials in (16, 32):
    if case == "pack" and {"alone", f"pack_{trials}", f"batch_{trials}"} <= found.keys():
      packed, batch = found[f"pack_{trials}"]["ms"], found[f"batch_{trials}"]["ms"]
      print(f"{trials} trials: {trials * found['alone']['ms'] / packed:.2f} times as fast as one after another, "
            f"{batch / packed:.2f} of the speed of one run at the summed batch")  # fmt: skip
  sys.stdout.flush()


def rate() -> dict[str, Any]:
  """The rate of a product of large bfloat16 matrices."""
  import jax
  import jax.numpy as jnp

  x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
  seconds = median_seconds({"product": jax.jit(lambda x: x @ x)}, x)["product"]
  device, tflops = jax.devices()[0].device_kind, 2 * 8192**3 / seconds / 1e12
  print(f"{device}, jax {jax.__version__}: 8192³ in bfloat16 {tflops:.0f} TFLOP/s")
  return {"device": device, "jax": jax.__version__, "tflops": tflops}


def attention() -> dict[str, Any]:
  """Forward and backward pass of attention by XLA and by cuDNN, with a mask of documents."""
  import jax
  import jax.numpy as jnp

  from lora_exp.models.modules import attention as module

  found = {}
  print(f"\nattention, forward and backward, ms\n{'B, T, H, K, h':24}{'XLA':>10}{'cuDNN':>10}{'difference':>12}")
  for B, T, H, K, h in ((16, 512, 9, 3, 64), (8, 1024, 32, 8, 64), (64, 128, 9, 3, 64), (4, 2048, 32, 8, 128)):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (B, T, n, h), jnp.bfloat16) for key, n in zip(keys, (H, K, K), strict=True))
    mask = module.causal_mask(1 + jnp.arange(T)[None] * 3 // T + jnp.zeros((B, 1), jnp.int32))
    kinds = {"XLA": module.attend_with_xla, "cuDNN": module.attend_with_cudnn}
    outputs = {name: jax.jit(kind)(q, k, v, mask) for name, kind in kinds.items()}
    gradients = {name: jax.jit(jax.grad(summed(kind), argnums=(0, 1, 2))) for name, kind in kinds.items()}
    seconds = median_seconds(gradients, q, k, v, mask)
    off = float(jnp.abs(outputs["XLA"].astype(jnp.float32) - outputs["cuDNN"].astype(jnp.float32)).max())
    found[f"{B}, {T}, {H}, {K}, {h}"] = {"ms": {name: 1e3 * s for name, s in seconds.items()}, "difference": off}
    print(f"{f'{B}, {T}, {H}, {K}, {h}':24}{1e3 * seconds['XLA']:10.3f}{1e3 * seconds['cuDNN']:10.3f}{off:12.4f}",
          flush=True)  # fmt: skip
  return found


def summed(function: Callable[..., Any]) -> Callable[..., Any]:
  """The sum of a function's output in float32, whose gradient uses the whole backward pass."""

  def total(*args: Any) -> Any:
    return function(*args).astype("float32").sum()

  return total


def median_seconds(runs: dict[str, Callable[..., Any]], *args: Any) -> dict[str, float]:
  """Median seconds of one call of each function, which take turns. The first turn compiles."""
  import jax

  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(TURNS + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      for _ in range(STEPS):
        result = run(*args)
      jax.block_until_ready(result)
      seconds[name].append((time.perf_counter() - start) / STEPS)
  return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def run_part(*arguments: str) -> None:
  """Runs this file with `arguments` in another process, and ends with its message if it fails."""
  done = subprocess.run([sys.executable, __file__, *arguments], stderr=subprocess.PIPE, text=True)
  if done.returncode:
    print(done.stderr[-2000:], flush=True)


KERNELS = {"rate": rate, "attention": attention}
COMPARISONS = {"smollm2": COMPARED, "llama_1b": COMPARED, "pack": PACKED, "mistral_7b": ("step",)}


def run_all(parts: list[str], out: Path) -> None:
  """Measures the parts and writes what is found after each."""
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  began, found = time.perf_counter(), {}
  with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
    for part in parts:
      if part in KERNELS:
        result = Path(scratch) / f"{part}.json"
        run_part("--kernel", part, "--out", str(result))
        found[part] = json.loads(result.read_text()) if result.exists() else None
      else:
        found[part] = Comparison(part, COMPARISONS[part], Path(scratch) / part).measure()
        show(part, found[part])
      out.write_text(json.dumps(found, indent=1))
      print(f"({time.perf_counter() - began:.0f} s since the start)", flush=True)


def main() -> None:
  """Runs the parts, or one process of them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("words", nargs="*", help="parts; default: all")
  parser.add_argument("--out", type=Path, default=Path("gpu.json"))
  for hidden in ("--side", "--kernel"):
    parser.add_argument(hidden, help=argparse.SUPPRESS)
  parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  sys.path.insert(0, str(ROOT))
  if args.side:
    serve(args.side, args.case, args.words)
  elif args.write:
    from our_side import write_case

    write_case(args.case, args.words)
  elif args.kernel:
    args.out.write_text(json.dumps(KERNELS[args.kernel]()))
  else:
    run_all(args.words or [*KERNELS, *COMPARISONS], args.out)


if __name__ == "__main__":
  main()
