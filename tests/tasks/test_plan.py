"""A plan states the true costs of a run, and is cheap itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY, command, environment

from lora_exp.cli import main as entry
from lora_exp.tasks import plan

# One block: B = 4 rows, T = 64, D = F = 32, V = 257, R = 4.
RUN = [*TINY, "lora.rank=4", "lora.compute=factored", "train.batch_size=4", "task=plan"]
M, T, D, V, R = 4 * 64, 64, 32, 257, 4


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  """The values that a plan prints, by name."""
  monkeypatch = pytest.MonkeyPatch()
  directory = tmp_path_factory.mktemp("plan")
  facts = {}
  show = plan.console.show_facts
  monkeypatch.chdir(directory)
  monkeypatch.setattr(plan.console, "show_facts", lambda title, found: (facts.update(found), show(title, found)))
  monkeypatch.setattr(plan, "device_memory", lambda: 2**30)
  assert entry.run(RUN) == 0
  assert list(directory.iterdir()) == []
  monkeypatch.undo()
  return facts


def test_its_parameters_are_those_of_the_model(said):
  block = 4 * (D * D + D) + 2 * (D * D + D) + 2 * 2 * D
  base = V * D + T * D + block + D * V + V
  adapter = 6 * R * 2 * D
  assert (said["frozen"], said["trainable"], said["total"]) == (base, adapter, base + adapter)
  assert said["lora_a"] == said["lora_b"] == adapter // 2


def test_its_flops_are_those_counted_by_hand(said):
  linear, attention, head = 2 * M * D * D, 2 * 2 * M * T * D, 2 * M * D * V
  forward = 6 * linear + attention + head
  # Nothing below query, key and value is trained: of them no gradient of the input is computed, and of no kernel one.
  backward = 3 * linear + 2 * attention + head
  one = 2 * M * R * D  # x·A, or ·B, or one of their gradients
  adapters = 6 * 2 * one + 6 * 3 * one + 3 * one
  assert said["FLOPs"] == pytest.approx(forward + backward + adapters, rel=0.02)
  assert said["tokens"] == M and said["FLOPs a token"] == pytest.approx(said["FLOPs"] / M)


def count(text: str) -> float:
  number, unit = text.split()
  return float(number) * 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)


def test_its_bytes_and_its_largest_pack_fit_each_other(said):
  assert count(said["base"]) == pytest.approx(4 * said["frozen"], rel=1e-3)
  solo, further = count(said["memory of the step"]), count(said["and for each further trial"])
  assert solo > count(said["base"]) and further >= 0.999 * 3 * 4 * said["trainable"]  # A and B, and two moments of Adam
  trials = int(re.sub(r"\D", "", said["largest pack that fits"]))
  assert trials == pytest.approx(1 + (2**30 - solo) / further, rel=0.01)
  assert solo + (trials - 1) * further <= 2**30 * 1.001


def test_where_nothing_fits_it_says_so(monkeypatch, in_tmp_path, capfd):
  monkeypatch.setattr(plan, "device_memory", lambda: 2**20)
  assert entry.run(RUN) == 0
  out = capfd.readouterr().out
  assert "none: try optim.accumulate" in out and "Adapted modules (6)" in out
  assert re.search(r"rank +alpha +scale", out) and re.search(r"blocks\.0\.linear1 +32×32 +4 +16 +4 ", out)


def test_it_needs_no_data_and_refuses_what_a_run_refuses(in_tmp_path):
  done = subprocess.run(command(*RUN, "lora.targets=quary"), env=environment(), text=True, capture_output=True)
  assert done.returncode == 2 and "blocks.0.mha.query" in done.stderr
  assert len(done.stderr.splitlines()) == 1  # in a process of its own: a task without a log shows no traceback either
  assert list(in_tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
def test_it_allocates_no_base(tmp_path):
  """6.5 GB of weights are planned in a process that stays far below them; compiling takes up to 2 GB."""
  argv = ["task=plan", "model=minigpt", "model.width=8192", "model.ff=8192", "model.layers=4",
          "lora.targets=blocks.3.linear1", "lora.rank=1", "train.batch_size=4"]
  # Not getrusage's figure, which a process takes over from the one that started it.
  code = (f"import pathlib, re, lora_exp.cli.main as m; assert m.run({argv}) == 0; "
          "status = pathlib.Path('/proc/self/status').read_text(); "
          "print('peak', int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) * 1024)")
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), text=True, capture_output=True,
                        timeout=300)
  assert done.returncode == 0, done.stderr
  base = 4 * (4 * 6 * 8192**2 + 2 * 257 * 8192)
  assert "6.0" in re.search(r"base +(\S+) GiB", done.stdout)[1]
  assert int(done.stdout.split("peak ")[1]) < 0.75 * base
  assert list(tmp_path.iterdir()) == []
