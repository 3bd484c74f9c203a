"""The memory of packs: the estimate against XLA's figures, the number of trials that fit, and running out of memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packs import small
from runs import TINY, curve, environment, on_stories, summary

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.sweep.ledger import Ledger
from lora_exp.sweep.packs import packing
from lora_exp.sweep.packs.packing import group_runs, split_evenly
from lora_exp.sweep.packs.planned_run import plan_runs
from lora_exp.sweep.sweep_run import SweepRun
from lora_exp.train.compiled_step import compile_abstract
from lora_exp.train.costs import memory
from lora_exp.train.costs.memory import MemoryEstimate, estimate
from lora_exp.train.plan import make_plan


def planned(**settings):
  return make_plan(small(data__seq_len=16, train__batch_size=8, **settings))


@pytest.mark.parametrize("settings", [{"lora__rank": 16}, {"lora__method": "full", "optim__name": "sgd"}])
def test_the_memory_estimate_is_within_a_factor_of_two_of_xla(settings):
  plan = planned(**settings)
  said = compile_abstract(plan, 1).peak_memory_bytes
  assert said / 2 < estimate(plan).solo < 2 * said


@pytest.mark.slow
def test_each_further_trial_adds_its_state_twice_and_no_base():
  plan = planned(lora__rank=16)
  two, four = (compile_abstract(plan, trials).peak_memory_bytes for trials in (2, 4))
  assert (four - two) / 2 == pytest.approx(estimate(plan).further, rel=0.1)


def test_the_most_trials_are_those_that_fit():
  need = MemoryEstimate(solo=100, further=10)
  assert [need.most(memory) for memory in (99, 100, 109, 110, 150)] == [0, 1, 1, 2, 6]
  assert need.of(need.most(157)) <= 157 < need.of(need.most(157) + 1)
  spread = MemoryEstimate(solo=100, further=10, ways=4)  # devices that hold a fourth of the trials each
  assert [spread.most(memory) for memory in (99, 100, 110)] == [0, 4, 8] and spread.of(8) == 110


def test_a_sweep_has_packs_as_wide_as_fit(monkeypatch):
  cfgs = check_command_line(["-m", *TINY, "model.dropout=0", "lora.rank=1,2,4", "optim.lr=1e-3,2e-3,3e-3"]).jobs
  runs, _ = plan_runs([SweepRun(n, cfg, Path(str(n)), "") for n, cfg in enumerate(cfgs)])
  need = memory.widest([run.plan for run in runs])
  for room, sizes in ((need.of(9), [9]), (need.of(9) - 1, [5, 4]), (need.of(4), [3, 3, 3]), (need.solo // 2, [1] * 9)):
    monkeypatch.setattr(packing, "device_memory", lambda room=room: room)
    assert [len(pack.runs) for pack in group_runs(runs)] == sizes
  monkeypatch.undo()
  assert [len(pack.runs) for pack in group_runs(runs, 4)] == [3, 3, 3]  # a typed number is a cap


def test_trials_are_cut_into_parts_alike_that_the_mesh_divides():
  assert split_evenly(range(5), 5) == [[0, 1, 2, 3, 4]] and split_evenly(range(5), 4) == [[0, 1, 2], [3, 4]]
  assert [len(part) for part in split_evenly(range(10), 8, 4)] == [8, 2]


def test_a_width_that_is_no_number_of_trials_is_refused(tmp_path, capfd):
  argv = ["-m", "hydra/launcher=packed", f"hydra.sweep.dir={tmp_path / 's'}", *TINY, "lora.rank=1,2"]
  assert entry.run([*argv, "hydra.launcher.width=0"]) == 2
  assert "hydra.launcher.width=0: give a positive integer" in capfd.readouterr().err


# A process whose address space is bounded, from a moment on, by less than what the step needs beside its arrays: the
# exhaustion is the real one, of XLA's own allocator. The bound is taken away when the next pack is made.
BOUNDED = """
import resource, sys
from lora_exp.cli import main as entry
from lora_exp.sweep.packs import packed_sweep
from lora_exp.train import pack_training
from lora_exp.train.records.background_saves import BackgroundSaves

alone, saved = "alone" in sys.argv, []

def bound(most):
  resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

def compile_step(job, batch, compile_step=pack_training.compile_step):
  step = compile_step(job, batch)
  bound.needed = step.working_bytes
  if len(job.trials.lr) == 1 and alone:
    tighten()
  return step

def tighten():
  held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
  bound(held + bound.needed // 2)

def submit(self, save):  # not in a thread, so that the next step comes after it
  save()
  saved.append(save)
  if len(saved) == 4:  # step 4 of all trials
    tighten()

def make_pack(*args, make_pack=packed_sweep.make_pack, **options):
  bound(resource.RLIM_INFINITY)
  return make_pack(*args, **options)

pack_training.compile_step, BackgroundSaves.submit, packed_sweep.make_pack = compile_step, submit, make_pack
sys.exit(entry.run([word for word in sys.argv[1:] if word != "alone"]))
"""
LARGE = [*TINY, "model.width=448", "model.ff=448", "lora=full", "train.steps=8", "train.save_every=4",
         "train.eval_every=0", "train.eval_tokens=256", "train.export=last"]  # fmt: skip


def bounded(directory, *argv: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run([sys.executable, "-c", BOUNDED, *argv], cwd=directory, env=environment(), text=True,
                        capture_output=True, timeout=600)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not bound a process's memory")
def test_a_pack_out_of_memory_continues_in_halves(tmp_path):
  argv = ["-m", "hydra/launcher=packed", *LARGE, *on_stories(tmp_path), "train.batch_size=4"]
  argv += ["optim.lr=1e-4,2e-4,3e-4,4e-4"]
  done = bounded(tmp_path, *argv, f"hydra.sweep.dir={tmp_path / 'halved'}")
  assert done.returncode == 0, done.stderr
  assert "4 trials do not fit in memory; splitting it into packs of 2 and 2: Out of memory allocating" in done.stderr
  assert done.stdout.count("Resumed at step 4 of 8") == 2
  assert entry.run([*argv, f"hydra.sweep.dir={tmp_path / 'whole'}"]) == 0
  for n in range(4):
    halved, whole = tmp_path / "halved" / str(n), tmp_path / "whole" / str(n)
    assert curve(halved) == curve(whole), n  # bit for bit: the loop over trials runs the same body
    assert summary(halved)["status"] == "done"
  events = [json.loads(line) for line in (tmp_path / "halved" / "sweep.jsonl").read_text().splitlines()]
  assert [row["trials"] for row in events if row["event"] in ("pack", "split")] == [[0, 1, 2, 3]] * 2 + [[0, 1], [2, 3]]
  assert Ledger(tmp_path / "halved").packs() == [[0, 1], [2, 3]]  # so they are made again if the sweep goes on


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not bound a process's memory")
def test_one_trial_that_does_not_fit_fails_with_what_to_do(tmp_path):
  argv = [*LARGE, *on_stories(tmp_path), "train.batch_size=64"]
  done = bounded(tmp_path, "alone", *argv, f"hydra.run.dir={tmp_path / 'run'}")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "does not fit in memory (Out of memory allocating" in done.stderr
  assert "optim.accumulate=2" in done.stderr and "train.batch_size=64" in done.stderr
  assert summary(tmp_path / "run")["status"] == "failed"
