"""How often the report finds a planted rank and planted targets: real sweeps of the tiny model.

    python tests/bench/planted.py                      # 30 pairs of rank and targets, about two hours of CPU time
    python tests/bench/planted.py attention:4 mlp:2    # some pairs
    python tests/bench/planted.py --sweeps DIR         # keeps the sweeps in DIR and reads those that are there
    python tests/bench/planted.py mlp:2 --with train.eval_tokens=8192    # with further overrides

A teacher is the base plus an update of known rank on known targets, with equal singular values. For each pair, one
sweep trains five ranks on the teacher's targets, another four targets at a rank that is large enough, three seeds each.
Right is the smallest rank that is at least the teacher's, and the targets with the fewest parameters that contain the
teacher's; the report may also name none. The largest rank is never named, so teachers have at most half of it.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.runtime.run_files import SUMMARY

RANKS = (1, 2, 4, 8, 16)
TARGETS = ("qv", "attention", "mlp", "all_linear")
TEACHER_RANKS = (1, 2, 3, 4, 6, 8)
TEACHER_TARGETS = {"qv": "qv", "attention": "attention", "mlp": "mlp", "all_linear": "all_linear", "mha.value": "qv"}
PAIRS = [f"{targets}:{rank}" for targets in TEACHER_TARGETS for rank in TEACHER_RANKS]
COMMON = ("hydra/launcher=packed", "data=planted", "model=minigpt_tiny", "seed=0,1,2", "logger=none", "sample=none")


def main() -> int:
  """Prints a line for each pair, and how often the report was right. Exit code 1 if it was wrong in over 5 %."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("pairs", nargs="*", default=PAIRS, help="TARGETS:RANK of a teacher")
  parser.add_argument("--sweeps", type=Path, help="directory of the sweeps that are kept")
  parser.add_argument("--with", dest="further", nargs="+", default=[], metavar="OVERRIDE", help="further overrides")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    folder = options.sweeps or Path(scratch)
    verdicts: Counter[str] = Counter()
    print(f"{'teacher':16} {'rank named':>12} {'right':>8}   {'targets named':14} {'right':>10}", flush=True)
    for pair in options.pairs:
      targets, rank = pair.rpartition(":")[0], int(pair.rpartition(":")[2])
      right_rank, right_targets = min(r for r in RANKS if r >= rank), TEACHER_TARGETS[targets]
      named_rank, named_targets = named(folder / f"{targets}-{rank}", targets, rank, right_rank, options.further)
      verdicts[verdict(named_rank, right_rank)] += 1
      verdicts[verdict(named_targets, right_targets)] += 1
      print(f"{pair:16} {named_rank or '-':>12} {right_rank:>8}   {named_targets or '-':14} {right_targets:>10}",
            flush=True)
  total = sum(verdicts.values())
  print(f"of {total} answers {verdicts['right']} are right, {verdicts['wrong']} wrong, {verdicts['none']} none")
  return int(verdicts["wrong"] > 0.05 * total)


def verdict(answer: object, right: object) -> str:
  """right | wrong | none."""
  return "none" if answer is None else "right" if answer == right else "wrong"


def named(
  folder: Path, targets: str, rank: int, enough: int, further: Sequence[str]
) -> tuple[int | None, str | None]:
  """The rank and the targets that the reports of a teacher's two sweeps name; `enough`: a rank that is large enough."""
  teacher = [f"data.teacher.targets={targets}", f"data.teacher.rank={rank}", *further]
  ranks = [f"lora.targets={targets}", f"lora.rank={','.join(map(str, RANKS))}"]
  places = [f"lora.rank={enough}", f"lora.targets={','.join(TARGETS)}"]
  return (answer(folder / "ranks", [*teacher, *ranks], "Rank", "rank"),
          answer(folder / "targets", [*teacher, *places], "Targets", "targets"))


def answer(directory: Path, overrides: list[str], topic: str, key: str) -> Any:
  """What the first finding on `topic` names in the sweep `directory`, which is run if it is not there."""
  if not list(directory.glob(f"*/{SUMMARY}")):
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lora_exp", "-m", *COMMON, *overrides, f"hydra.sweep.dir={directory}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  [group] = make_groups(read_sweep(directory))
  return next(finding.values[key] for finding in all_findings(group) if finding.topic == topic)


if __name__ == "__main__":
  sys.exit(main())
