"""Sweeps in rounds: each round follows from earlier results, also after a kill."""

import csv
import math
import shutil

import pytest
import yaml
from made_rounds import TUNE, MadeRuns, bowl, ledger_rows, overrides_of, planned, train_made
from runs import ROOT, TINY, on_stories, rows, summary

from lora_exp.cli import main as entry
from lora_exp.config import InputError
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.sweep.rounds.round_plan import Tuning
from lora_exp.sweep.rounds.tuning_rounds import better_neighbour, further_factor, scored_factors

TUNING = Tuning("optim.lr", [0.5, 1, 2], 100, extend=2, neighbour=True)
SHORT = [*TINY, "train.steps=4", "train.eval_every=2", "train.save_every=4", "train.eval_tokens=256"]


# ---- which values are tried and scored


@pytest.mark.parametrize(("penalties", "further", "scored"), [
  ({0.5: 3.0, 1: 2.0, 2: 2.5}, None, [1, 2]),
  ({0.5: 2.2, 1: 2.0, 2: 2.5}, None, [0.5, 1]),
  ({0.5: 3.0, 1: 2.5, 2: 2.0}, 4, [1, 2]),
  ({0.5: 2.0, 1: 2.5, 2: 3.0}, 0.25, [0.5, 1]),
  ({0.5: 3.0, 1: 2.5, 2: math.inf}, None, [0.5, 1]),
  ({0.5: 3.0, 1: math.inf, 2: math.inf}, 0.25, [0.5]),
  ({0.5: math.inf, 1: math.inf, 2: math.inf}, 0.25, [0.5]),
  ({0.5: 3.0, 1: 2.5, 2: 2.0, 4: 1.9, 8: 1.8}, None, [4, 8]),
])  # fmt: skip
def test_the_best_value_and_its_better_neighbour_are_scored(penalties, further, scored):
  assert further_factor(penalties, TUNING) == further
  assert scored_factors(penalties, TUNING) == scored


def test_a_single_value_has_no_neighbour():
  assert better_neighbour({1: 2.0}) is None and further_factor({1: 2.0}, TUNING) is None


# ---- what is typed


def test_a_point_without_seeds_is_a_reference():
  plan = planned("lora.rank=1,4,16", "train.steps=5")
  assert [setting.label for setting in plan.settings] == ["lora.rank=1", "lora.rank=4", "lora.rank=16", "lora=frozen",
                                                         "lora=full"]  # fmt: skip
  assert [setting.seeds for setting in plan.settings[2:4]] == [[["seed=0"], ["seed=1"], ["seed=2"]], []]
  assert all("train.steps=5" in setting.overrides for setting in plan.settings) and len(plan.grid) == 13


def test_typed_seeds_replace_those_of_the_file():
  for typed in (["seed=7,8"], ["seed=7"]):
    plan = planned(*typed)
    wanted = [[text] for text in ("seed=7", "seed=8")[: 2 if "," in typed[0] else 1]]
    assert [setting.seeds for setting in plan.settings] == [wanted, wanted, [], wanted]


@pytest.mark.parametrize(("argv", "sentences"), [
  (["hydra.sweeper.tune.factors=[1,-2]", "hydra.sweeper.tune.seed=2"],
   ["tune.factors=[1, -2]: give a list of different positive numbers", "tune.seed=2: is one of the seeds that score"]),
  (["hydra.sweeper.tune.setting=optim.lrr", "hydra.sweeper.tune.extend=-1"],
   ["tune.setting=optim.lrr: no such setting; did you mean optim.lr?", "tune.extend=-1: give an integer"]),
  (["optim.lr=1e-3,2e-3"], ["optim.lr: is tuned for each setting", "hydra.sweeper.tune.setting=null"]),
  (["++optim.lr=1e-3,2e-3"], ["optim.lr: is tuned for each setting"]),
  (["hydra.sweeper.tune.setting=lora.dropout"], ["its default must be a positive number, but it is 0"]),
  (["hydra.sweeper.tune.neighbour=1"], ["tune.neighbour=1: give true or false"]),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_together(argv, sentences, tmp_path, capfd):
  assert entry.run(["sweep=rank", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT, *argv]) == 2
  error = capfd.readouterr().err
  assert all(sentence in error for sentence in sentences), error
  assert not (tmp_path / "sweep").exists()


def test_unknown_keys_of_a_file_are_named():
  with pytest.raises(InputError, match=r"hydra.sweeper.tune.factor: no such setting; did you mean factors\?"):
    planned(tune={**TUNE, "factor": [1]})


def test_full_fine_tuning_gets_the_same_search_as_lora():
  files = {file.stem: yaml.safe_load(file.read_text())["hydra"]["sweeper"] for file in (ROOT / "sweeps").glob("*.yaml")}
  full = {name: next((p for p in node.get("extra", ()) if p["lora"] == "full"), None) for name, node in files.items()}
  assert len([name for name in files if full[name]]) >= 6
  for name, point in full.items():
    if point and "tune" not in files[name]:
      assert point["lora.lr_scale"] == "0.025,0.05,0.1,0.2,0.4", f"{name}: five rates around its own default"


# ---- rounds of made runs, whose results are known


def test_a_deleted_run_of_a_round_is_trained_again(tmp_path):
  train_made(tmp_path, MadeRuns(tmp_path, bowl))
  shutil.rmtree(tmp_path / "11")
  again = MadeRuns(tmp_path, bowl)
  train_made(tmp_path, again)
  assert [len(jobs) for jobs in again.launches] == [1] and (tmp_path / "11" / "summary.json").is_file()
  assert [row["trial"] for row in ledger_rows(tmp_path, "lost")] == [11]


def test_rounds_follow_from_the_results_before_them(tmp_path):
  runs = MadeRuns(tmp_path, bowl)
  outcomes = train_made(tmp_path, runs)
  first, second, third, scores = runs.launches
  assert len(first) == 10 and ["lora=frozen"] in first and ["lora.rank=1", "optim.lr=0.0025", "seed=100"] in first
  assert second == [["lora.rank=4", "optim.lr=0.02", "seed=100"]]  # 0.01 was the highest
  assert third == [["lora.rank=4", "optim.lr=0.04", "seed=100"]]
  rates = {}
  for job in scores:
    rates.setdefault(job[0], set()).add(job[1])
  assert rates == {
    "lora.rank=1": {"optim.lr=0.0025", "optim.lr=0.005"}, "lora.rank=4": {"optim.lr=0.01", "optim.lr=0.02"},
    "lora=full": {"optim.lr=0.005", "optim.lr=0.01"},
  }  # fmt: skip
  assert len(scores) == 18 and {job[2] for job in scores} == {"seed=0", "seed=1", "seed=2"}
  assert {outcome.code for outcome in outcomes.values()} == {0}, "a rate that diverged while tuning is a result"


@pytest.mark.parametrize("launch", [0, 1, 2, 3])
def test_a_sweep_killed_between_rounds_trains_the_same_jobs(launch, tmp_path):
  train_made(tmp_path / "unbroken", MadeRuns(tmp_path / "unbroken", bowl))
  with pytest.raises(KeyboardInterrupt):
    train_made(tmp_path / "killed", MadeRuns(tmp_path / "killed", bowl, kill_before=launch))
  train_made(tmp_path / "killed", MadeRuns(tmp_path / "killed", bowl))
  assert overrides_of(tmp_path / "killed") == overrides_of(tmp_path / "unbroken")
  again = MadeRuns(tmp_path / "killed", bowl)
  train_made(tmp_path / "killed", again)
  assert again.launches == [], "a complete sweep trains nothing"


def test_another_plan_is_refused_in_its_directory(tmp_path):
  train_made(tmp_path, MadeRuns(tmp_path, bowl))
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  for plan, words in ((planned("lora.rank=1,8"), "settings or seeds"), (planned(tune={**TUNE, "extend": 0}), "tune")):
    with pytest.raises(InputError, match=f"started with other .*{words}"):
      train_made(tmp_path, MadeRuns(tmp_path, bowl), plan)
  train_made(tmp_path, MadeRuns(tmp_path, bowl), planned("logger=none"))
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_trials_that_tuned_score_nothing(tmp_path):
  train_made(tmp_path, MadeRuns(tmp_path, bowl))
  runs = read_sweep(tmp_path)
  assert [run.number for run in runs if run.tunes] == [n for n in range(12) if n != 9]
  [group] = make_groups(runs)
  assert sorted(setting.seeds for setting in group.settings if not setting.only_tuned) == [1, 3, 3, 3, 3, 3, 3]
  [best] = [s for s in group.settings if s.values.get("lora.rank") == 4 and s.values["optim.lr"] == 0.02]
  assert set(best.scores.values()) == {2.0, 2.0001, 2.0002}


# ---- a sweep of real runs


@pytest.mark.slow
def test_a_tuned_sweep_runs_in_packs_to_its_report(tmp_path, capfd):
  argv = ["sweep=rank", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT, *on_stories(tmp_path), "lora.rank=1,4",
          "seed=0,1", "hydra.sweeper.tune.factors=[1,1e30]", "hydra.sweeper.tune.extend=0", "optim.clip=null",
          "optim=sgd"]  # fmt: skip
  assert entry.run(argv) == 0
  directory = tmp_path / "sweep"
  first, scores = overrides_of(directory)
  assert len(first) == 7 and len(scores) == 6 and {job[-1] for job in scores} == {"seed=0", "seed=1"}
  status = [summary(directory / str(n))["status"] for n in range(7)]
  assert status == ["done", "diverged"] * 3 + ["done"]
  assert {rows(directory / str(n))[1]["lr"] for n in range(7, 13)} == {rows(directory / "0")[1]["lr"]}
  assert "best" in (shown := capfd.readouterr().out) and "7 trials tuned" not in shown and "6 trials tuned" in shown
  assert entry.run(["task=report", f"run={directory}"]) == 0
  with (directory / "results.csv").open(encoding="utf-8") as file:
    assert [row["purpose"] for row in csv.DictReader(file)] == ["tune"] * 6 + ["score"] * 7
