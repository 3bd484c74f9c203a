"""Writes the README's transcript and picture from a real run: `python tests/make_readme.py` after `python -m lora_exp`.

Runs the default command with a warm cache, so that the transcript is short, and copies its picture.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
  with tempfile.TemporaryDirectory() as scratch:
    done = subprocess.run([sys.executable, "-m", "lora_exp"], cwd=scratch, capture_output=True, text=True, check=True)
    text = done.stdout.replace(scratch + "/", "")
    lines = [line.rstrip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("Adapted modules"))
    [run] = Path(scratch).glob("outputs/*/*")
    (ROOT / ".readme").mkdir(exist_ok=True)
    shutil.copy(run / "plots" / "loss.png", ROOT / ".readme" / "loss.png")
  block = "\n".join(["```text", "$ python -m lora_exp", "…", *lines[start:], "```"])
  readme = ROOT / "README.md"
  readme.write_text(
    re.sub(
      r"<!-- transcript -->.*<!-- /transcript -->",
      lambda _: f"<!-- transcript -->\n{block}\n<!-- /transcript -->",
      readme.read_text(),
      flags=re.DOTALL,
    )
  )


if __name__ == "__main__":
  main()
