"""Compares our training step with those of other libraries: equal losses first, then times and memory.

    python tests/bench/peers.py                                   # SmolLM2-135M, rank 8, all linear layers, 1 × 128
    python tests/bench/peers.py --settings lora.targets=qv train.batch_size=2 --sides ours eager
    python tests/bench/peers.py --tutorial                        # the JAX tutorial: tests/bench/tutorial.py

Sides: ours; eager and compiled (transformers and PEFT, without and with torch.compile); qwix (its LoRA on our decoder);
pack and ragged (N adapters in one step: ours, and with jax.lax.ragged_dot as in SkyRL's tx). All start from the same
weights, adapter and batch, which ours writes. Each runs in a process of its own. They take turns, so that other work
on the machine slows all alike; "CPU" is the ratio of processor times, for a machine with other work. Exit code 1
where the first loss differs by more than 1e-4, or one of the next three by more than 1e-3. Needs the extra [parity],
and for qwix `pip install qwix`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = ["model=smollm2_135m", "lora.rank=8", "lora.targets=all_linear", "data.seq_len=128", "train.batch_size=1"]
SIDES = ("ours", "eager", "compiled", "qwix", "pack", "ragged")
PACKED = ("pack", "ragged")  # sides with several adapters, which are compared with each other
FIRST, LATER = 1e-4, 1e-3  # differences of the first and of later losses
CHECKED = 4  # steps whose losses are compared
TURN = 2.0  # seconds of a turn, at least one step


def step_of(side: str, directory: Path, settings: list[str], adapters: int) -> Any:
  """The step of a side; each imports only its own libraries."""
  if side in ("eager", "compiled"):
    import numpy as np
    from peft_side import PeftSettings, peft_step

    case = PeftSettings(**np.load(directory / "batch.npz"), adapter=directory / "adapter")
    return peft_step(directory / "model", case, side == "compiled")
  if side in ("ours", "pack"):
    from our_side import case_step

    return case_step(directory, settings, adapters if side == "pack" else 1)
  from jax_sides import qwix_step, ragged_step

  return qwix_step(directory, settings) if side == "qwix" else ragged_step(directory, settings, adapters)


def serve(side: str, directory: Path, settings: list[str], adapters: int) -> None:
  """The process of one side: for each number of steps on standard input, a line of JSON with their losses and times."""
  step = step_of(side, directory, settings, adapters)
  for line in sys.stdin:
    began, worked = time.perf_counter(), time.process_time()
    losses = step.run(int(line))
    seconds, worked = (time.perf_counter() - began) / len(losses), (time.process_time() - worked) / len(losses)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "worked": worked, "losses": losses, "resident": resident}), flush=True)


class Side:
  """A process that runs steps on request."""

  def __init__(self, name: str, directory: Path, settings: list[str], adapters: int):
    self.name, self.turns, self.steps = name, list[dict[str, Any]](), 1
    command = [sys.executable, __file__, "--serve", name, "--case", str(directory), "--adapters", str(adapters),
               "--settings", *settings]  # fmt: skip
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

  def run(self, steps: int) -> dict[str, Any]:
    """The answer to one request."""
    print(steps, file=self.process.stdin, flush=True)
    for line in self.process.stdout:
      if line.startswith("{"):  # and not a line of progress
        return json.loads(line)
    sys.exit(f"{self.name}: its process ended with exit code {self.process.wait()}")

  def begin(self) -> list[float]:
    """The first losses; sets the number of steps of a turn."""
    losses = self.run(CHECKED)["losses"]
    self.steps = max(1, round(TURN / self.run(1)["seconds"]))
    return losses

  def turn(self) -> None:
    self.turns.append(self.run(self.steps))

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()

  def median(self, key: str) -> float:
    """The median over all turns."""
    return statistics.median(turn[key] for turn in self.turns)


def differences(losses: list[float], reference: list[float]) -> tuple[float, float]:
  """The difference of the first losses, and the largest of the others."""
  first, *later = (abs(a - b) for a, b in zip(losses, reference, strict=True))
  return first, max(later)


def compare(directory: Path, names: list[str], settings: list[str], adapters: int, turns: int) -> bool:
  """Runs the sides, prints the table, and returns whether all losses are equal."""
  sides = [Side(name, directory, settings, adapters) for name in names]
  first = [side.begin() for side in sides]
  gaps = [differences(losses, first[0]) for losses in first]
  for _ in range(turns):
    for side in sides:
      side.turn()
  for side in sides:
    side.close()
  print(f"{'side':10}{'ms a step':>10}{'range':>16}{'ours faster':>12}{'CPU':>6}{'peak MB':>9}{'losses differ':>17}")
  by_name = {side.name: side for side in sides}
  for side, (gap, later) in zip(sides, gaps, strict=True):
    times = sorted(1e3 * turn["seconds"] for turn in side.turns)
    mine = by_name.get("pack" if side.name in PACKED else "ours", side)
    ratio, worked = (side.median(key) / mine.median(key) for key in ("seconds", "worked"))
    print(f"{side.name:10}{1e3 * side.median('seconds'):10.1f}{f'{times[0]:.0f} to {times[-1]:.0f}':>16}{ratio:12.2f}"
          f"{worked:6.2f}{side.turns[-1]['resident'] / 1e6:9.0f}{f'{gap:.0e}, {later:.0e}':>17}")  # fmt: skip
  return all(gap <= FIRST and later <= LATER for gap, later in gaps)


def main() -> int:
  """Writes the case, compares the sides, and returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
  parser.add_argument("--settings", nargs="*", default=[], help="overrides of lora_exp, after those of SmolLM2")
  parser.add_argument("--adapters", type=int, default=4, help="of pack and ragged")
  parser.add_argument("--turns", type=int, default=5, help="turns of each side, of which the median counts")
  parser.add_argument("--tutorial", action="store_true", help="run tests/bench/tutorial.py instead")
  parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.tutorial:
    command = [sys.executable, str(Path(__file__).with_name("tutorial.py")), "--turns", str(args.turns)]
    return subprocess.run(command).returncode
  if args.serve:
    serve(args.serve, args.case, args.settings, args.adapters)
    return 0
  settings = [*MODEL, *args.settings]
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  with tempfile.TemporaryDirectory() as scratch:
    from our_side import write_case

    case = Path(scratch) / "case"
    write_case(case, settings)
    print(f"{' '.join(settings)}; {args.adapters} adapters in pack and ragged", flush=True)
    return int(not compare(case, args.sides, settings, args.adapters, args.turns))


if __name__ == "__main__":
  sys.exit(main())
