"""Writes the README's transcripts and pictures from real runs.

    python tests/make_readme.py default         after `python -m lora_exp`, so that the base is in the cache
    python tests/make_readme.py rank SWEEP      of a finished `python -m lora_exp -m sweep=rank`
"""

import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / ".readme"
OTHER_PROGRESS = re.compile(r"(?!train:)[a-z ]+: .*\d s\b.*")  # lines that depend on the load


def output_of(arguments: Sequence[str], directory: Path) -> list[str]:
  """The lines that the program prints for `arguments`."""
  command = [sys.executable, "-m", "lora_exp", *arguments]
  done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
  return [line.rstrip() for line in done.stdout.replace(f"{directory}/", "").splitlines()]


def replace_block(name: str, lines: Sequence[str]) -> None:
  """Replaces what is between <!-- name --> and <!-- /name -->."""
  block = "\n".join([f"<!-- {name} -->", "```text", *lines, "```", f"<!-- /{name} -->"])
  readme = ROOT / "README.md"
  text, count = re.subn(rf"<!-- {name} -->.*<!-- /{name} -->", block.replace("\\", r"\\"), readme.read_text(),
                        flags=re.DOTALL)
  assert count == 1, f"README.md has no block {name}"
  readme.write_text(text)


def write_default() -> None:
  """The transcript of the default run, with the progress of training alone, and its picture."""
  with tempfile.TemporaryDirectory() as scratch:
    lines = output_of([], Path(scratch))
    [run] = Path(scratch).glob("outputs/*/*")
    shutil.copy(run / "plots" / "loss.png", PICTURES / "loss.png")
  start = next(n for n, line in enumerate(lines) if line.startswith("Adapted modules"))
  shown = [line for line in lines[start:] if not OTHER_PROGRESS.fullmatch(line)]
  replace_block("transcript", ["$ python -m lora_exp", "…", *shown])


def write_rank(sweep: Path) -> None:
  """The report of a rank sweep as its command prints it at its end, and its first plot."""
  lines = output_of(["task=report", f"run={sweep.resolve()}"], sweep.resolve().parent)
  wrapped = [part for line in lines for part in (textwrap.wrap(line, 118) if len(line) > 118 else [line])]
  replace_block("rank", ["$ python -m lora_exp -m sweep=rank", "…", *wrapped])
  shutil.copy(sweep / "plots" / "pareto.png", PICTURES / "rank.png")


if __name__ == "__main__":
  if sys.argv[1:] == ["default"]:
    write_default()
  elif sys.argv[1:2] == ["rank"] and len(sys.argv) == 3:
    write_rank(Path(sys.argv[2]))
  else:
    sys.exit(__doc__)
