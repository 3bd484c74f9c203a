"""Sweeps: their jobs, their packs, that trials equal single runs, and that no trial is lost."""

import csv
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from runs import TINY, command, curve, environment, on_stories, process, rows, summary, train
from safetensors.numpy import load_file

from lora_exp.cli import main as entry
from lora_exp.cli import session
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError
from lora_exp.config.override_grammar import parse
from lora_exp.runtime.saved_config import load_config
from lora_exp.sweep.ledger import Ledger
from lora_exp.sweep.packs.grid_jobs import grid_jobs
from lora_exp.sweep.packs.packing import group_runs
from lora_exp.sweep.packs.planned_run import plan_runs
from lora_exp.sweep.sweep_run import SweepRun

SHORT = [*TINY, "train.steps=12", "train.eval_every=4", "train.save_every=4", "train.eval_tokens=512"]
FAST = ("seconds_compile", "seconds_train", "seconds_total", "tokens_per_s", "peak_memory_bytes", "run")  # and paths


def made(*typed: str, **sweeper) -> list[list[str]]:
  overrides = lambda texts: parse(texts, None)[0]
  return grid_jobs(sweeper, overrides(list(typed)), overrides)


def cfgs(*argv: str):
  return check_command_line(["-m", *argv]).jobs


def sweep(directory, *argv: str, code: int = 0):
  """A packed sweep in `directory`, run in this process."""
  assert entry.run(["-m", "hydra/launcher=packed", f"hydra.sweep.dir={directory}", *argv]) == code
  return directory


def adapter(run_dir) -> bytes:
  return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


# ---- which jobs there are


def test_lists_multiply_zip_and_extra_points_are_added():
  assert made(params={"lora.rank": "1,2", "train.seed": "0,1"}) == [
    ["lora.rank=1", "train.seed=0"], ["lora.rank=1", "train.seed=1"],
    ["lora.rank=2", "train.seed=0"], ["lora.rank=2", "train.seed=1"],
  ]  # fmt: skip
  zipped = made(zip=[{"lora.rank": "1,2", "lora.alpha": "3,5"}], extra=[{"lora": "full", "train.seed": "0,1"}])
  assert zipped == [
    ["lora.rank=1", "lora.alpha=3"], ["lora.rank=2", "lora.alpha=5"],
    ["lora=full", "train.seed=0"], ["lora=full", "train.seed=1"],
  ]  # fmt: skip


def test_what_is_typed_wins_and_no_job_is_there_twice():
  file = {"params": {"lora.rank": "1,2", "train.seed": "0,1"}, "extra": [{"lora": "frozen"}, {"lora": "frozen"}]}
  found = made("lora.rank=8", "train.seed=3,3,4", "train.steps=5", **file)
  assert sorted(map(sorted, found)) == sorted(
    [
      ["lora.rank=8", "train.seed=3", "train.steps=5"],
      ["lora.rank=8", "train.seed=4", "train.steps=5"],
      ["lora.rank=8", "lora=frozen", "train.steps=5"],
    ]
  )


def test_a_setting_typed_with_two_plus_signs_is_the_same_setting():
  assert made("lora.rank=1,2", "++lora.rank=4") == [["++lora.rank=4"]]
  extra = [{"lora.rank": 8}, {"lora": "full", "seed": "0,1,2"}]
  file = {"params": {"lora.rank": "1,2", "seed": "0,1"}, "extra": extra}
  assert made("++lora.rank=4,8", "++seed=5", **file) == [
    ["++seed=5", "++lora.rank=4"], ["++seed=5", "++lora.rank=8"], ["lora=full", "++seed=5"],
  ]  # fmt: skip
  assert made("++lora.alpha=3,5", zip=[{"lora.rank": "1,2", "lora.alpha": "1,2"}]) == made(
    "++lora.alpha=3,5", params={"lora.rank": "1,2"})


@pytest.mark.parametrize(("argv", "count"), [
  (["lora.rank=1,2", "++lora.rank=4"], 1), (["sweep=rank", "++lora.rank=4,8"], 10),
])  # fmt: skip
def test_two_plus_signs_multiply_no_jobs(argv, count):
  plain = [text.lstrip("+") for text in argv]
  assert len(cfgs(*argv)) == len(cfgs(*plain)) == count


def test_zipped_lists_of_other_lengths_are_refused():
  with pytest.raises(Exception, match="lora.rank has 2, lora.alpha has 3"):
    made(zip=[{"lora.rank": "1,2", "lora.alpha": "3,5,7"}])


def test_the_rank_sweep_stands_between_its_two_reference_lines():
  found = cfgs("sweep=rank")
  assert {c.lora.rank for c in found if c.lora.method == "lora"} == {1, 2, 4, 8, 16, 32, 64}
  assert [c.lora.method for c in found].count("frozen") == 1 and [c.lora.method for c in found].count("full") == 3


# ---- which train together


def groups(cfgs, width: int | None = None) -> list[list[int]]:
  """The numbers of the runs that train together."""
  runs, _ = plan_runs([SweepRun(n, cfg, Path(str(n)), "") for n, cfg in enumerate(cfgs)])
  return [pack.numbers for pack in group_runs(runs, width)]


def test_ranks_targets_and_rates_share_a_program():
  found = cfgs(
    *TINY, "model.dropout=0", "lora.rank=1,8", "lora.targets=mlp,attention", "optim.lr=1e-3,1e-2", "train.seed=0,1"
  )
  assert groups(found, 32) == [list(range(16))]
  assert [len(group) for group in groups(found, 5)] == [4, 4, 4, 4]  # alike, so that they share a program too
  assert groups(cfgs(*TINY, "lora.lr_scale=0.5,1,2"), 32) == [[0, 1, 2]]
  for other in ("train.batch_size=4,8", "lora=lora,dora", "optim.warmup=1,2", "lora.dropout=0,0.1",
                "lora.init=kaiming,pissa", "lora.rank=16,17", "lora.bias=none,all", "model.dropout=0,0.1"):  # fmt: skip
    assert groups(cfgs(*TINY, "model.dropout=0", other), 32) == [[0], [1]], other


def test_seeds_share_a_pack_with_dropout_in_the_base():
  argv = [*TINY, "model.dropout=0.1", "seed=0,1", "lora.rank=1,2"]
  assert groups(cfgs(*argv)) == [[0, 1, 2, 3]]
  assert groups(cfgs(*TINY, "data.seed=0,1")) == [[0, 1]]
  assert groups(cfgs(*argv, "lora.dropout=0.1")) == [[0, 1], [2, 3]]  # masks for every adapter and seed cost too much


# ---- a budget of parameters


@pytest.mark.slow
def test_a_budget_chooses_ranks_and_names_the_least_it_needs(tmp_path, capfd):
  short = [*TINY, *on_stories(tmp_path), "train.steps=1", "train.eval_tokens=128", "lora.parameters=300"]
  sweep(tmp_path / "sweep", *short, "lora.targets=qv,attention,all_linear", code=1)  # 128, 256 and 384 for each rank
  assert [load_config(str(tmp_path / "sweep" / n)).lora.rank for n in "01"] == [2, 1]
  assert [summary(tmp_path / "sweep" / n)["parameters"]["trainable"] for n in "01"] == [256, 256]
  assert "rank 1 on lora.targets=all_linear takes 384; give at least that" in capfd.readouterr().err
  alone = train(tmp_path / "run", *short, "lora.targets=qv")
  assert load_config(str(alone)).lora.rank == 2 and adapter(alone) == adapter(tmp_path / "sweep" / "0")
  train(tmp_path / "none", *short, "lora.targets=all_linear", code=2)
  assert not (tmp_path / "none").exists()
  sweep(tmp_path / "sweep", *short, "lora.targets=qv,attention,all_linear", code=1)  # goes on, with nothing left to do


def test_the_budget_sweep_shares_programs_between_ranks():
  found = [c for c in cfgs("sweep=budget") if c.lora.method == "lora"]
  assert {c.lora.parameters for c in found} == {0.03}
  assert {c.lora.targets for c in found} == {"qv", "attention", "mlp", "all_linear"} and len(found) == 12
  for other, said in (("lora=adalora", "AdaLoRA chooses"), ("lora.rank_pattern={query: 2}", "_pattern.* does too")):
    with pytest.raises(InputError, match=said):
      check_command_line(["lora.parameters=0.03", other])


# ---- each is what it would be alone


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  directory = tmp_path_factory.mktemp("packed")
  return sweep(directory / "sweep", *SHORT, *on_stories(directory), "lora.rank=1,2,4", "lora.targets=all_linear,mlp")


@pytest.mark.parametrize(("number", "own"), [
  (0, ["lora.rank=1"]),
  pytest.param(3, ["lora.rank=2", "lora.targets=mlp"], marks=pytest.mark.slow),
  pytest.param(4, ["lora.rank=4"], marks=pytest.mark.slow),
])
def test_a_trial_leaves_what_its_own_run_would_have_left(packed, tmp_path, number, own):
  stories = [f"data.path={packed.parent / 'lora_exp_test_stories.txt'}", "data=text"]
  alone, trial = train(tmp_path / "run", *SHORT, *stories, *own), packed / str(number)
  files = lambda d: {str(p.relative_to(d)) for p in d.rglob("*") if p.is_file() and "checkpoints" not in p.parts}
  assert files(alone) - files(trial) <= {"lora_exp.log", ".hydra/config.yaml", ".hydra/hydra.yaml", ".lock"}
  ours, theirs = (
    load_file(trial / "adapter/adapter_model.safetensors"),
    load_file(alone / "adapter/adapter_model.safetensors"),
  )
  assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
  losses = lambda d: [row["loss"] for row in rows(d)]
  np.testing.assert_allclose(losses(trial), losses(alone), rtol=1e-4)
  assert summary(trial)["targets"] == summary(alone)["targets"]
  names = lambda d: sorted(p.name for p in (d / "checkpoints").iterdir())
  assert names(trial) == names(alone)


@pytest.mark.slow
def test_with_dropout_a_packed_trial_equals_its_solo_run(tmp_path):
  argv = [*SHORT, *on_stories(tmp_path), "model.dropout=0.1"]
  directory = sweep(tmp_path / "sweep", *argv, "train.seed=0,1", "lora.rank=2,16")
  assert sum('"pack"' in line for line in (directory / "sweep.jsonl").read_text().splitlines()) == 1
  alone = train(tmp_path / "run", *argv, "train.seed=1", "lora.rank=2")
  losses = lambda d: [row["loss"] for row in rows(d)]
  np.testing.assert_allclose(losses(directory / "2"), losses(alone), rtol=1e-4)
  assert losses(directory / "2") != pytest.approx(losses(directory / "0"), rel=1e-3)


@pytest.mark.slow
def test_trials_are_spread_over_the_devices_of_a_mesh(tmp_path):
  argv = ["-m", "hydra/launcher=packed", *SHORT, *on_stories(tmp_path), "train.batch_size=4", "lora.rank=1,2,4"]
  for name, mesh in (("one", ["mesh.data=1"]), ("spread", ["mesh.trial=2", "mesh.data=2", "mesh.tensor=2"])):
    done = process(*argv, *mesh, f"hydra.sweep.dir={tmp_path / name}", cwd=tmp_path, devices=1 if name == "one" else 8)
    assert done.returncode == 0, done.stderr
  for n in range(3):  # three over two: a fourth that nobody reads goes along
    one, spread = tmp_path / "one" / str(n), tmp_path / "spread" / str(n)
    assert summary(spread)["mesh"]["trial"] == 2
    np.testing.assert_allclose(*([row["loss"] for row in rows(d)] for d in (spread, one)), rtol=1e-5)
  assert not (tmp_path / "spread" / "3").exists()


def test_a_trial_can_be_used_like_any_run(packed, capfd):
  assert entry.run(["task=evaluate", f"run={packed / '3'}"]) == 0
  assert "below the base" in capfd.readouterr().out


def test_the_sweep_ends_with_its_report(packed):
  assert {"report.html", "report.md", "results.csv", "sweep.jsonl"} <= {p.name for p in packed.iterdir()}
  with open(packed / "results.csv", encoding="utf-8") as file:
    assert len(list(csv.DictReader(file))) == 6


# ---- what goes wrong


@pytest.mark.slow
def test_a_diverged_trial_does_not_change_the_others(tmp_path):
  argv = [*SHORT, *on_stories(tmp_path), "optim.clip=null", "optim=sgd", "train.export=last"]
  healthy = sweep(tmp_path / "healthy", *argv, "optim.lr=1e-3,2e-3,3e-3")
  broken = sweep(tmp_path / "broken", *argv, "optim.lr=1e-3,1e38,3e-3", code=1)
  assert [summary(broken / str(n))["status"] for n in range(3)] == ["done", "diverged", "done"]
  for n in (0, 2):
    assert adapter(broken / str(n)) == adapter(healthy / str(n)) and curve(broken / str(n)) == curve(healthy / str(n))
  [row] = [json.loads(line) for line in (broken / "sweep.jsonl").read_text().splitlines() if "failed" in line]
  assert row["trial"] == 1 and "lower optim.lr" in row["reason"]


@pytest.mark.slow
def test_a_job_that_cannot_be_built_fails_alone_with_its_reason(tmp_path, capfd):
  argv = [*SHORT, *on_stories(tmp_path), "lora.targets=mlp,no_such_module"]
  directory = sweep(tmp_path / "sweep", *argv, code=1)
  assert "run 1: lora.targets=no_such_module matches no module" in capfd.readouterr().err
  assert summary(directory / "0")["status"] == "done" and (directory / "report.html").is_file()


def test_a_torn_last_line_of_the_ledger_is_cut_off(tmp_path):
  ledger = Ledger(tmp_path)
  ledger.add("done", trial=0)
  with ledger.path.open("a") as file:
    file.write('{"event": "do')
  again = Ledger(tmp_path)
  assert again.ended(0) and not again.ended(1)
  again.add("failed", trial=1, reason="why")
  assert [json.loads(line)["trial"] for line in ledger.path.read_text().splitlines()] == [0, 1]
  assert Ledger(tmp_path).reason(1) == "why"


# ---- killed, and gone on with


KILLED = ["train.steps=40", "lora.rank=1,2,4", "train.seed=0,1", "model.dropout=0.1", "hydra.launcher.width=3"]


def results(directory) -> list[dict]:
  with open(directory / "results.csv", encoding="utf-8") as file:
    return [{k: v for k, v in row.items() if k not in FAST} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  directory = tmp_path_factory.mktemp("unbroken")
  return sweep(directory / "sweep", *SHORT, *KILLED, *on_stories(directory))


def killed_at(argv: list[str], directory, enough) -> None:
  started = subprocess.Popen(command(*argv), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 300
  while not enough(directory) and started.poll() is None and time.monotonic() < deadline:
    time.sleep(0.005)
  started.send_signal(signal.SIGKILL)
  started.wait()


MOMENTS = {
  "before the first checkpoint": lambda d: (d / "0" / "metrics.jsonl").exists(),
  "in the first pack": lambda d: (d / "2" / "checkpoints" / "8").exists(),
  "between the ends of two trials": lambda d: (d / "0" / "summary.json").exists(),
  "in the second pack": lambda d: (d / "3" / "checkpoints" / "12").exists(),
  "before the report": lambda d: (d / "5" / "summary.json").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", [
  pytest.param(name, marks=[] if name == "in the first pack" else [pytest.mark.slow]) for name in MOMENTS
])  # fmt: skip
def test_a_killed_sweep_resumes_to_the_same_result(unbroken, tmp_path, moment):
  stories = ["data=text", f"data.path={unbroken.parent / 'lora_exp_test_stories.txt'}"]
  argv = ["-m", "hydra/launcher=packed", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT, *KILLED, *stories]
  killed_at(argv, tmp_path / "sweep", MOMENTS[moment])
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  for n in range(6):
    assert curve(tmp_path / "sweep" / str(n)) == curve(unbroken / str(n)), n
    assert adapter(tmp_path / "sweep" / str(n)) == adapter(unbroken / str(n)), n
  assert results(tmp_path / "sweep") == results(unbroken)
  ends = [
    json.loads(line)["trial"]
    for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()
    if '"done"' in line
  ]
  assert sorted(ends) == list(range(6)), "each trial is trained once"


@pytest.mark.slow
def test_a_sweep_goes_on_only_as_it_began(unbroken, capfd):
  before = {p: p.read_bytes() for p in unbroken.rglob("*") if p.is_file()}
  stories = ["data=text", f"data.path={unbroken.parent / 'lora_exp_test_stories.txt'}"]
  sweep(unbroken, *SHORT, *KILLED, *stories, "optim.warmup=3", code=2)
  assert "run 0 was started with another optim" in capfd.readouterr().err
  assert all(p.read_bytes() == content for p, content in before.items() if p.name in ("config.yaml", "metrics.jsonl"))


def test_a_pack_of_one_trial_has_checkpoints_of_each_step(tmp_path):
  settings = [*TINY, "train.steps=4", "train.eval_every=0", "train.save_every=1", "train.eval_tokens=256"]
  run = sweep(tmp_path / "sweep", "lora.rank=2", *settings, *on_stories(tmp_path)) / "0"
  assert summary(run)["status"] == "done" and [row["step"] for row in curve(run) if row["split"] == "train"][-1] == 4
  assert adapter(run) == adapter(train(tmp_path / "alone", "lora.rank=2", *settings, *on_stories(tmp_path)))


def test_only_a_trial_without_its_directory_is_trained_again(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(session, "_report_sweep", lambda *_: None)  # it takes seconds
  argv = [*TINY, "train.steps=2", "train.eval_every=0", "train.eval_tokens=256", "lora.rank=1,2", *on_stories(tmp_path)]
  directory = sweep(tmp_path / "sweep", *argv)
  other, first = (directory / "0" / "metrics.jsonl").read_bytes(), curve(directory / "1")
  shutil.rmtree(directory / "1")
  capfd.readouterr()
  sweep(directory, *argv)
  shown = capfd.readouterr().out
  assert "1/summary.json is missing; it is trained again" in shown and "2 trials, 1 of them already ended" in shown
  assert curve(directory / "1") == first and (directory / "0" / "metrics.jsonl").read_bytes() == other
  started = [row["trial"] for row in map(json.loads, Ledger(directory).path.read_text().splitlines())
             if row["event"] == "started"]
  assert started == [0, 1, 1]
