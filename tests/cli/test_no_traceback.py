"""An error of the user is printed in one line by every task, also where no log file is configured."""

import subprocess
import sys

from checkpoints import write_checkpoint
from runs import QUIET


def test_a_task_without_a_log_file_prints_one_line(tmp_path):
  argv = ["task=evaluate", "model=hf", f"model.weights={write_checkpoint(tmp_path / 'base')}", "lora=frozen", *QUIET]
  done = subprocess.run([sys.executable, "-m", "lora_exp", *argv], capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 2
  assert done.stderr.count("contains no tokenizer") == 1
  assert "Traceback" not in done.stderr
