"""Eight trials of 100 steps, packed against Hydra's basic launcher: wall-clock time of whole command lines, on this
machine in this minute; what a trial's step costs inside a pack; and what a pack takes of the memory.

    python tests/bench/packed.py            # all of it: half an hour on two quiet cores
    python tests/bench/packed.py small      # or wide, step, memory; or large (V 50,257), twenty minutes by itself

Ranks 1 to 16. Rows and base are made before and shared; each side begins with an empty cache of compiled programs, and
runs once more with the one that it filled (warm). Sides take turns, so that whatever else the machine does slows both
alike. Exit code 1 where a floor is missed: 2 times less time for the small model, 1.2 for the wide one, and a step
of at most 1.1 times that of a run alone at the bucket's rank.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
SMALL = ["model.width=128", "model.ff=128", "model.heads=8", "data.seq_len=64", "train.batch_size=4",
         "model.pretrain.steps=100"]  # fmt: skip
WIDE = ["model.width=256", "model.ff=256", "model.heads=8"]
MODELS = {  # settings, and the required ratio of times
  "small": (SMALL, 2.0),  # 256 tokens a step
  "wide": (WIDE, 1.2),  # 1,024 tokens a step
  # the small one with V 50,257; held out are a fifth of the tokens, or evaluation takes most of the time
  "large": ([*SMALL, "model.tokenizer=gpt2", "train.eval_tokens=4096", "train.retain_tokens=1024"], None),
}
MOST_STEP = 1.1
TURNS = 9


def run(settings: list[str], cache: Path, directory: Path) -> tuple[float, float]:
  """(wall-clock, processor) seconds of one complete command line."""
  command = [sys.executable, "-m", "lora_exp", *settings, "train.steps=100", "logger.mode=offline"]
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir()
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  env = {**os.environ, "PYTHONPATH": path, "LORA_EXP_CACHE": str(cache)}
  worked, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
  done = subprocess.run(command, cwd=directory, env=env, text=True, capture_output=True)
  seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
  if done.returncode:
    sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
  return seconds, after.ru_utime + after.ru_stime - worked.ru_utime - worked.ru_stime


def sweeps(name: str, turns: int, scratch: Path) -> bool:
  """Runs one model's sweep with both launchers, cold and warm, and prints the rows; returns whether its floor holds."""
  settings, floor = MODELS[name]
  made = scratch / "made"
  run([*settings, "sample=none"], made, scratch / "run")  # tokenises, pretrains
  took: dict[tuple[str, str], list[tuple[float, float]]] = {}
  for _ in range(turns):
    for launcher in ("packed", "basic"):
      cache = scratch / f"cache-{launcher}"
      shutil.rmtree(cache, ignore_errors=True)
      cache.mkdir()
      for part in ("rows", "base"):
        (cache / part).symlink_to(made / part)
      for state in ("cold", "warm"):
        argv = ["-m", f"hydra/launcher={launcher}", f"lora.rank={','.join(map(str, RANKS))}", *settings]
        took.setdefault((state, launcher), []).append(run(argv, cache, scratch / "run"))
  ratios = {}
  for state in ("cold", "warm"):
    packed, basic = ([statistics.median(x) for x in zip(*took[state, who], strict=True)] for who in ("packed", "basic"))
    ratios[state] = basic[0] / packed[0]
    promised = f"at least {floor}" if floor and state == "cold" else "-"
    figures = f"{packed[0]:10.1f}{basic[0]:10.1f}{ratios[state]:8.2f}{basic[1] / packed[1]:11.2f}"
    print(f"{name:10}{state:6}{figures}  {promised}", flush=True)
  return floor is None or ratios["cold"] >= floor


def jobs(settings: list[str], packs: list[tuple[int, ...]]) -> list:
  """A compiled job for each tuple of ranks, on a random base; and its plan."""
  sys.path.insert(0, str(ROOT))
  from lora_exp.cli.compose import composer, conf_directory
  from lora_exp.config import to_config
  from lora_exp.train.base import random_base
  from lora_exp.train.compiled_step import abstract_batch, compile_step
  from lora_exp.train.job import make_job
  from lora_exp.train.plan import make_plan

  found = []
  with composer(conf_directory()) as composing:
    for ranks in packs:
      plans = [make_plan(to_config(composing.compose([*settings, "model.base=random", f"lora.rank={rank}"])))
               for rank in ranks]
      job = make_job(plans[0], random_base(plans[0]), 1000, plans)
      found.append((compile_step(job, abstract_batch(plans[0])), plans[0]))
  return found


def steps() -> bool:
  """A trial's step inside a pack of eight beside that of a run alone at the bucket's rank, in turns."""
  import jax
  import numpy as np

  holds = True
  for name in ("small", "wide"):
    sides = jobs(MODELS[name][0], [RANKS, (max(RANKS),)])
    plan = sides[0][1]
    shape = (plan.cfg.train.batch_size, plan.cfg.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, 257, shape, dtype=np.int32)
    batch = plan.layout.put_batch({
      "tokens": tokens, "targets": tokens, "segments": np.ones_like(tokens), "weights": np.ones(shape, np.float32),
      "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    })  # fmt: skip
    seconds: list[list[float]] = [[], []]
    states = [step.job.state for step, _ in sides]
    for _ in range(TURNS + 1):
      for side, times, count in zip(range(2), seconds, (2, 16), strict=True):
        began = time.perf_counter()
        for _ in range(count):
          states[side], _ = sides[side][0](states[side], batch)
        jax.block_until_ready(states[side])
        times.append((time.perf_counter() - began) / (count * len(sides[side][0].job.trials.lr)))
    packed, solo = (statistics.median(times[1:]) for times in seconds)  # the first turn warms up
    holds &= packed / solo <= MOST_STEP
    print(f"{name}: a trial's step in a pack of {len(RANKS)} {1e3 * packed:.2f} ms, alone at rank {max(RANKS)} "
          f"{1e3 * solo:.2f} ms: {packed / solo:.2f} times, promised at most {MOST_STEP}")  # fmt: skip
  return holds


def memory() -> bool:
  """What packs of 2, 4 and 8 trials take, by XLA's figure: the base once, and for each trial its own state twice."""
  import jax

  sides = jobs(MODELS["wide"][0], [RANKS[-n:] for n in (2, 4, 8)])
  base = sum(x.nbytes for x in jax.tree.leaves(sides[0][0].job.frozen))
  own = sum(x.nbytes for x in jax.tree.leaves((sides[0][0].job.state.params, sides[0][0].job.state.opt))) / 2
  taken = [step.peak_memory_bytes for step, _ in sides]
  each = (taken[-1] - taken[0]) / 6
  print(f"base {base / 1e6:.1f} MB, a trial's adapter and optimizer {own / 1e6:.2f} MB; packs of 2, 4, 8 take "
        f"{', '.join(f'{x / 1e6:.1f}' for x in taken)} MB: {each / 1e6:.2f} MB for each further trial, "
        f"{each / own:.2f} times its own state")  # fmt: skip
  return each < 2.5 * own


def main() -> int:
  """Runs what is asked and prints it; 1 where a promise does not hold."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("parts", nargs="*", default=["small", "wide", "step", "memory"], help="some of these alone")
  parser.add_argument("--turns", type=int, default=1, help="turns of both launchers, of which the median counts")
  parser.add_argument("--scratch", type=Path, help="where rows, bases and runs are made; kept if given")
  args = parser.parse_args()
  holds = []
  if wanted := [part for part in args.parts if part in MODELS]:
    with tempfile.TemporaryDirectory() as directory:
      scratch = args.scratch or Path(directory)
      scratch.mkdir(exist_ok=True)
      print("model     cache   packed s   basic s   ratio  processor  promised", flush=True)
      holds += [sweeps(part, args.turns, scratch) for part in wanted]
  holds += [check() for part, check in (("step", steps), ("memory", memory)) if part in args.parts]
  return int(not all(holds))


if __name__ == "__main__":
  sys.exit(main())
