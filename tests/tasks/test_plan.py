"""A plan states the true costs of a run on any hardware, from shapes alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY, command, environment

from lora_exp.cli import main as entry

# One block: B = 4 rows, T = 64, D = F = 32, V = 257, R = 4.
CARD = ["plan.kind=h100", "plan.memory=1GB"]
RUN = [*TINY, "lora.rank=4", "lora.compute=factored", "train.batch_size=4", "task=plan"]
M, T, D, V, R = 4 * 64, 64, 32, 257, 4


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  """The figures of a plan, from plan.json."""
  directory = tmp_path_factory.mktemp("plan")
  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.chdir(directory)
  assert entry.run([*RUN, *CARD, "out=found"]) == 0
  monkeypatch.undo()
  assert [path.name for path in directory.rglob("*")] == ["found", "plan.json"]
  return json.loads((directory / "found" / "plan.json").read_text())


def test_its_parameters_are_those_of_the_model(said):
  block = 4 * (D * D + D) + 2 * (D * D + D) + 2 * 2 * D
  assert said["parameters"] == {"base": V * D + T * D + block + D * V + V, "trained": 6 * R * 2 * D}


def test_its_flops_are_those_counted_by_hand(said):
  linear, attention, head = 2 * M * D * D, 2 * 2 * M * T * D, 2 * M * D * V
  # Nothing below query, key and value is trained: of them no gradient of the input is computed, and of no kernel one.
  backward = 3 * linear + 2 * attention + head
  one = 2 * M * R * D  # x·A, or ·B, or one of their gradients
  assert said["flops"]["forward"] == 6 * linear + attention + head
  assert said["flops"]["backward"] == backward
  assert said["flops"]["adapters"] == 6 * 2 * one + 6 * 3 * one + 3 * one
  assert said["tokens"] == M and said["flops"]["total"] == sum(list(said["flops"].values())[:-1])


def test_its_bytes_add_up_and_its_largest_pack_fits(said):
  memory = said["memory_bytes"]
  assert memory["total"] == sum(memory.values()) - memory["total"]
  assert memory["base"] == 4 * said["parameters"]["base"] and memory["optimizer"] == 8 * said["parameters"]["trained"]
  assert said["usable_bytes"] == 0.95e9 and said["fits"]
  need, further, pack = memory["total"], said["further_trial_bytes"], said["largest_pack"]
  assert need + (pack - 1) * further <= said["usable_bytes"] < need + pack * further
  assert said["largest_batch"] > 4


def test_a_published_model_needs_no_network_and_no_jax(tmp_path):
  argv = ["task=plan", "model=llama3_70b", "plan.devices=256", "plan.kind=h100", "mesh.tensor=8", "data.seq_len=2048",
          "train.batch_size=256"]  # fmt: skip
  code = f"import sys, lora_exp.cli.main as m; code = m.run({argv}); print('jax' in sys.modules, code)"
  env = environment() | {"COLUMNS": "80"}
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, capture_output=True)
  assert done.stdout.endswith("False 0\n"), done.stderr
  words = ("70,553,706,496", "256 × H100 SXM", "data 32 × tensor 8", "Settings with which it fits", "model.remat=true ")
  assert [word for word in words if word not in done.stdout] == []
  assert list(tmp_path.iterdir()) == []


def test_the_command_to_train_is_without_the_hardware(in_tmp_path, capfd):
  assert entry.run([*RUN, *CARD]) == 0
  [line] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Train it:")]
  assert "lora.rank=4" in line and "plan" not in line


def test_the_command_to_train_is_without_its_directory(in_tmp_path, capfd):
  assert entry.run([*RUN, *CARD, "out=found"]) == 0
  [line] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Train it:")]
  assert "found" not in line


def test_full_training_is_not_advised_to_take_more(in_tmp_path, capfd):
  """A sum of gradients over microbatches takes more than they save where everything is trained."""
  assert entry.run(["task=plan", "model=mistral_7b", "lora=full", "plan.kind=h100"]) == 0
  out = capfd.readouterr().out
  assert "No setting makes it fit" in out and "model.remat=true" in out and "optim.accumulate" not in out


def test_compiling_here_keeps_the_memory_of_the_kind(in_tmp_path, capfd):
  assert entry.run([*RUN, "train.batch_size=8", "plan.kind=h100", "plan.compile=true", "out=found"]) == 0
  assert json.loads((in_tmp_path / "found" / "plan.json").read_text())["usable_bytes"] == 0.95 * 80e9
  assert "Compiled by XLA" in capfd.readouterr().out


def test_other_devices_are_refused_before_a_table(in_tmp_path, capfd):
  assert entry.run([*RUN, "plan.devices=1024", "plan.compile=true"]) == 2
  said = capfd.readouterr()
  assert "plan.devices=1024: plan.compile uses all devices" in said.err and "Parameters" not in said.out


@pytest.mark.parametrize("sweep", [["hydra/launcher=packed", "lora.rank=1,2"], ["sweep=rank"]])
def test_a_packed_sweep_of_plans_trains_nothing(sweep, in_tmp_path, capfd):
  assert entry.run(["-m", *RUN, *CARD, *sweep]) == 2
  said = capfd.readouterr()
  assert "task=plan: hydra/launcher=packed only trains; add hydra/launcher=basic" in said.err
  assert len(said.err.splitlines()) == 1 and list(in_tmp_path.iterdir()) == []


def test_where_nothing_fits_it_says_so(in_tmp_path, capfd):
  assert entry.run([*RUN, "plan.kind=h100", "plan.memory=100KB"]) == 0
  out = capfd.readouterr().out
  assert "does not fit" in out and "largest batch" in out and "none" in out
  assert "No setting makes it fit" in out and "optim.accumulate=4" in out


def test_what_a_run_refuses_is_refused(in_tmp_path):
  done = subprocess.run(command(*RUN, *CARD, "lora.targets=quary"), env=environment(), text=True, capture_output=True)
  assert done.returncode == 2 and "blocks.0.mha.query" in done.stderr
  assert len(done.stderr.splitlines()) == 1  # in a process of its own: a task without a log shows no traceback either
  assert list(in_tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("plan.kind=h1000", "did you mean h100?"),
    ("plan.memory=much", "plan.memory=much: must be a size such as 24GB"),
    ("plan.memory=0GB", "plan.memory=0GB: must be at least 1KB"),
    ("plan.memory=24", "plan.memory=24: must be at least 1KB; give a number with a unit"),
    (f"plan.memory={'9' * 400}GB", "must be a size such as 24GB"),
    ("plan.devices=0", "plan.devices=0: must be at least 1"),
    ("plan.devices=8", "4 rows do not divide over the mesh's 8 batch shards"),
    ("mesh.tensor=3", "mesh.tensor=3 needs a multiple of 3 devices, but there are 1"),
    ("lora.budget=3", "lora.budget=3: is only used by lora=adalora"),
  ],
)
def test_hardware_that_does_not_exist_is_refused(override, words, in_tmp_path, capfd):
  argv = [text for text in [*RUN, *CARD] if not text.startswith(override.partition("=")[0])]
  assert entry.run([*argv, override]) == 2
  assert words in capfd.readouterr().err


def test_it_can_be_compared_with_the_compiled_step(in_tmp_path, capfd):
  assert entry.run([*RUN, "train.batch_size=8", "plan.compile=true"]) == 0
  out = capfd.readouterr().out
  assert "Compiled by XLA" in out and re.search(r"FLOPs +\S+ +\S+ +\+0\.0%", out)
  assert re.search(r"memory of a step +\S+ \w+ +\S+ \w+ +[+-]\d", out) and "cores" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
def test_it_allocates_no_base(tmp_path):
  """6.5 GB of weights are planned in a process that stays far below them; compiling takes up to 2 GB."""
  argv = ["task=plan", "model=minigpt", "model.width=8192", "model.ff=8192", "model.layers=4", "plan.compile=true",
          "lora.targets=blocks.3.linear1", "lora.rank=1", "train.batch_size=4", "out=found"]  # fmt: skip
  # Not getrusage's figure, which a process takes over from the one that started it.
  code = (f"import pathlib, re, lora_exp.cli.main as m; assert m.run({argv}) == 0; "
          "status = pathlib.Path('/proc/self/status').read_text(); "
          "print('peak bytes', int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) * 1024)")
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), text=True, capture_output=True,
                        timeout=300)
  assert done.returncode == 0, done.stderr
  base = json.loads((tmp_path / "found" / "plan.json").read_text())["memory_bytes"]["base"]
  assert base == pytest.approx(4 * (4 * 6 * 8192**2 + 2 * 257 * 8192), rel=0.01)
  assert int(done.stdout.split("peak bytes ")[1]) < 0.75 * base
