"""A sweep that stops when the answer is known: its looks, where it adds seeds, and what it drops."""

import math
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hydra.types import RunMode
from made_rounds import EARLY, STEPS, MadeRuns, ledger_rows, overrides_of, planned, train_made
from runs import ROOT, TINY, on_stories, process, summary
from scipy.stats import norm

from lora_exp.cli import main as entry
from lora_exp.cli.compose import composer
from lora_exp.config.errors import InputError
from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.page.compared import compared
from lora_exp.report.page.document import GroupSection, Report
from lora_exp.report.reading.sweep_ledger import LookLevel, read_sweep_ledger
from lora_exp.report.sweep_report import make_table
from lora_exp.sweep.config_snapshot import read_files_once
from lora_exp.sweep.packs.launched_runs import LaunchedRuns
from lora_exp.sweep.rounds.early_drop import drops, fit_prediction
from lora_exp.sweep.rounds.look_levels import look_levels
from lora_exp.sweep.rounds.round_ledger import RoundLedger
from lora_exp.sweep.rounds.round_plan import RoundPlan

LOOKS = [3, 5, 7, 10]
SHORT = [*TINY, "train.steps=4", "train.eval_every=2", "train.save_every=4", "train.eval_tokens=256"]
LOSSES = {1: 2.6, 2: 2.3, 4: 2.0, 8: 2.0}


def deciding(*typed: str, early: float | None = None, **node) -> RoundPlan:
  """A plan that decides between four ranks."""
  decide = {"looks": LOOKS, "level": 0.05, "early": early}
  return planned(*typed, params={"lora.rank": "1,2,4,8", "seed": "0,1,2"}, extra=[], tune=None, decide=decide, **node)


def noisy(noise: float):
  """Losses by which rank 4 is enough."""
  def loss(method: str, rank: int, rate: float, seed: int) -> float | None:
    return LOSSES[rank] + noise * math.sin(17.0 * rank + 29.0 * seed + rank * seed)

  return loss


def jobs_of(runs: MadeRuns, launch: int) -> set[tuple[str, str]]:
  """(rank, seed) of the jobs of a launch."""
  return {(job[0], job[1]) for job in runs.launches[launch]}


# ---- looks


def test_clear_ranks_are_decided_with_three_seeds(tmp_path, capfd):
  train_made(tmp_path, MadeRuns(tmp_path, noisy(0.004)), deciding())
  assert len(overrides_of(tmp_path)) == 1
  out = " ".join(capfd.readouterr().out.split())
  assert "Decided after 3 seeds: lora.rank=4 is sufficient" in out and "insufficient: lora.rank=1, lora.rank=2" in out
  assert "has 40 trials: 70% of its steps saved" in out


def test_seeds_go_to_open_comparisons_alone(tmp_path):
  runs = MadeRuns(tmp_path, noisy(0.06))
  train_made(tmp_path, runs, deciding())
  assert len(runs.launches[0]) == 12
  assert jobs_of(runs, 1) == {(f"lora.rank={rank}", f"seed={seed}") for rank in (4, 8) for seed in (3, 4)}


def test_a_rank_that_is_already_beaten_gets_no_seeds(tmp_path):
  losses = {1: 2.7, 2: 2.0, 4: 2.0, 8: 2.3}  # 8 is far worse than 2, which has to be compared with 4
  noise = noisy(0.06)
  runs = MadeRuns(tmp_path, lambda *trial: losses[trial[1]] + noise(*trial) - LOSSES[trial[1]])
  train_made(tmp_path, runs, deciding())
  assert {rank for rank, _ in jobs_of(runs, 1)} <= {"lora.rank=1", "lora.rank=2", "lora.rank=4"}


def test_hopeless_noise_ends_the_sweep_early(tmp_path, capfd):
  rng = np.random.default_rng(3)
  noise = {(rank, seed): 0.5 * rng.standard_normal() for rank in LOSSES for seed in range(10)}
  train_made(tmp_path, MadeRuns(tmp_path, lambda _, rank, rate, seed: 2.0 + noise[rank, seed]), deciding())
  out = " ".join(capfd.readouterr().out.split())
  assert "would give an answer with a probability of only" in out
  assert sum(map(len, overrides_of(tmp_path))) < 40


def test_the_best_rank_shows_that_smaller_ones_are_short(tmp_path):
  """Rank 2 is 7 % short of rank 8, but not of rank 4, which is the answer."""
  losses = {1: 2.7, 2: 2.07, 4: 2.035, 8: 2.0}
  noise = noisy(0.02)
  runs = MadeRuns(tmp_path, lambda *trial: losses[trial[1]] + noise(*trial) - LOSSES[trial[1]])
  train_made(tmp_path, runs, deciding())
  assert {f"lora.rank={rank}" for rank in (2, 8)} <= {rank for rank, _ in jobs_of(runs, 1)}
  look = ledger_rows(tmp_path, "look")[-1]
  assert look["answer"] == "lora.rank=4" and "lora.rank=2" in look["insufficient"]


def test_a_diverged_setting_gets_no_further_seeds(tmp_path):
  noise = noisy(0.06)
  runs = MadeRuns(tmp_path, lambda *trial: None if (trial[1], trial[3]) == (2, 1) else noise(*trial))
  train_made(tmp_path, runs, deciding())
  assert len(runs.launches) > 1
  assert not any("lora.rank=2" in job for jobs in runs.launches[1:] for job in jobs)


def test_identical_losses_count_once_at_a_look(tmp_path):
  noise = noisy(0.004)
  runs = MadeRuns(tmp_path, lambda *trial: 2.0 if trial[1] == 8 else noise(*trial))
  train_made(tmp_path, runs, deciding())
  [look] = ledger_rows(tmp_path, "look")
  assert look["answer"] is None, "as in the report, rank 8 has one seed, and three are needed"
  assert len(runs.launches) == 1, "further seeds would not change that"


@pytest.mark.parametrize("looks", [LOOKS, [3, 4, 5, 6, 8, 10], [3]])
def test_all_looks_together_have_the_level(looks):
  draws = np.random.default_rng(0).standard_normal((200_000, looks[-1])).cumsum(1)
  z = draws[:, np.array(looks) - 1] / np.sqrt(looks)
  assert np.mean((z > norm.isf(look_levels(looks, 0.05))).any(1)) == pytest.approx(0.05, abs=0.002)


def test_other_looks_are_refused_with_the_flags_to_continue(tmp_path):
  train_made(tmp_path, MadeRuns(tmp_path, noisy(0.004)), deciding())
  other = planned(params={"lora.rank": "1,2,4,8", "seed": "0,1,2"}, extra=[], tune=None,
                  decide={"looks": [3, 4, 16], "level": 0.05, "early": 0.5})  # fmt: skip
  with pytest.raises(InputError) as error:
    train_made(tmp_path, MadeRuns(tmp_path, noisy(0.004)), other)
  assert ("add hydra.sweeper.decide.looks=[3,5,7,10] hydra.sweeper.decide.early=null to continue it"
          in str(error.value))  # fmt: skip


# ---- dropped during training


def test_a_setting_that_will_be_far_short_is_dropped():
  rng = np.random.default_rng(0)
  early = np.linspace(0.2, 0.6, 8)
  exact = fit_prediction(EARLY, STEPS, [(x, 2 * x) for x in early])
  noisy_pairs = fit_prediction(EARLY, STEPS, [(x, 2 * x + 0.2 * rng.standard_normal()) for x in early])
  seen = {0: [0.3, 0.31], 1: [0.5, 0.51], 2: [0.5, 0.49]}
  assert exact and noisy_pairs and noisy_pairs.error > 0.1 > exact.error
  assert list(drops(seen, exact, 0.05)) == [0] and drops(seen, exact, 0.05)[0].short == pytest.approx(0.396, abs=0.001)
  assert drops(seen, noisy_pairs, 0.05) == {}, "the error of the prediction does not allow it"
  assert fit_prediction(EARLY, STEPS, [(0.3, 1.0)] * 8) is None


def test_predictions_are_seldom_wrong_about_equal_settings():
  rng, wrong = np.random.default_rng(1), 0
  for _ in range(400):
    final = np.repeat(rng.uniform(0.3, 1.0, 7), 3)
    early = 0.7 * final + 0.05 * rng.standard_normal(21)
    prediction = fit_prediction(EARLY, STEPS, list(zip(early, final, strict=True)))
    assert prediction
    seen = {n: list(0.7 + 0.05 * rng.standard_normal(3)) for n in range(5)}
    wrong += bool(drops(seen, prediction, 0.05))
  assert wrong <= 4


FIVE = {1: 2.8, 2: 2.6, 4: 2.3, 8: 2.0, 16: 2.0}


def dropping(directory, noise: float = 0.004, **launcher) -> MadeRuns:
  """A sweep that may drop after half of the training."""
  def loss(method: str, rank: int, rate: float, seed: int) -> float:
    return FIVE[rank] + noise * math.sin(17.0 * rank + 29.0 * seed + rank * seed)

  runs = MadeRuns(directory, loss, **launcher)
  plan = planned(params={"lora.rank": "1,2,4,8,16", "seed": "0,1,2"}, extra=[], tune=None,
                 decide={"looks": LOOKS, "level": 0.05, "early": 0.5})  # fmt: skip
  train_made(directory, runs, plan)
  return runs


def test_clearly_short_ranks_are_not_trained_to_the_end(tmp_path, capfd):
  dropping(tmp_path)
  rows = ledger_rows(tmp_path, "dropped")
  assert [row["setting"] for row in rows] == ["lora.rank=1", "lora.rank=2", "lora.rank=4"]
  assert all("at step 16 of 32, predicted to be" in row["reason"] and "5 finished trials" in row["reason"]
             for row in rows)  # fmt: skip
  trials = [number for row in rows for number in row["trials"]]
  statuses = [summary(tmp_path / str(number))["status"] for number in trials]
  assert statuses == ["done", "pruned", "pruned"] * 3
  [look] = ledger_rows(tmp_path, "look")
  assert look["answer"] == "lora.rank=8" and look["unjudged"] == ["lora.rank=1", "lora.rank=2", "lora.rank=4"]
  assert "dropped during training and not judged: lora.rank=1" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize("launch", [1, 2])
def test_a_sweep_killed_around_a_drop_drops_the_same(launch, tmp_path):
  dropping(tmp_path / "unbroken")
  with pytest.raises(KeyboardInterrupt):
    dropping(tmp_path / "killed", kill_before=launch)
  dropping(tmp_path / "killed")
  for event in ("round", "dropped", "look"):
    timeless = [[{k: v for k, v in row.items() if k != "time"} for row in ledger_rows(tmp_path / name, event)]
                for name in ("killed", "unbroken")]  # fmt: skip
    assert timeless[0] == timeless[1], event


def test_the_report_names_what_was_dropped_and_the_level(tmp_path):
  dropping(tmp_path)
  runs, [group], _ = make_table(tmp_path)
  section = GroupSection(group, all_findings(group), [], None)
  report = Report("", METRICS["loss"], runs, [section], compared(tmp_path, runs))
  [finding] = [finding for finding in section.findings if finding.topic == "Rank"]
  assert "dropped them during training: rank 1 (at step 16 of 32" in finding.text
  assert not any(word in finding.text for word in ("rank 1 has", "rank 2 has")), finding.text
  level = ledger_rows(tmp_path, "look")[-1]["level"]
  assert f"one-sided at {level * 100:.2g} % (that of look 1 during the sweep; all looks share 5 %)" in finding.evidence
  assert any(f"at the level of the last look, {level * 100:.2g} %" in line for line in report.method)


def test_the_report_decides_as_the_last_look_did(tmp_path):
  noise = noisy(0.06)
  losses = {1: 2.8, 2: 2.3, 4: 2.0, 8: 2.0}
  train_made(tmp_path, MadeRuns(tmp_path, lambda *trial: losses[trial[1]] + noise(*trial) - LOSSES[trial[1]]),
             deciding())  # fmt: skip
  look = ledger_rows(tmp_path, "look")[-1]
  _, [group], _ = make_table(tmp_path)
  [finding] = [finding for finding in all_findings(group) if finding.topic == "Rank"]
  assert look["answer"] == "lora.rank=4" and finding.values["sufficient"][0] == 4
  assert [f"lora.rank={rank}" for rank in finding.values["insufficient"]] == look["insufficient"]


def test_a_look_without_its_level_is_named(tmp_path):
  (tmp_path / "sweep.jsonl").write_text('{"event": "look", "level": 0.01, "of_level": 0.05}\n{"event": "look"}\n')
  ledger = read_sweep_ledger(tmp_path)
  assert ledger.look == LookLevel(0.01, 0.05, 1)
  assert ledger.problems == ("sweep.jsonl: line 2 is a look at the verdicts without the level of its tests",)


# ---- ends that were not planned


def test_a_spent_budget_ends_the_sweep_with_its_reason(tmp_path, capfd):
  train_made(tmp_path, MadeRuns(tmp_path, noisy(0.06)), deciding(budget={"trials": 14}))
  assert len(overrides_of(tmp_path)) == 1
  out = " ".join(capfd.readouterr().out.split())
  assert "Undecided after 3 seeds" in out and "would need 16 trials in all, and the budget is 14" in out


def test_a_killed_decision_continues_with_the_same_jobs(tmp_path):
  train_made(tmp_path / "unbroken", MadeRuns(tmp_path / "unbroken", noisy(0.06)), deciding())
  with pytest.raises(KeyboardInterrupt):
    train_made(tmp_path / "killed", MadeRuns(tmp_path / "killed", noisy(0.06), kill_before=1), deciding())
  train_made(tmp_path / "killed", MadeRuns(tmp_path / "killed", noisy(0.06)), deciding())
  assert overrides_of(tmp_path / "killed") == overrides_of(tmp_path / "unbroken")


@pytest.mark.parametrize("launch", [0, 1])
def test_a_stop_inside_a_round_loses_no_trial(launch, tmp_path):
  unbroken = tmp_path / "unbroken"
  train_made(unbroken, MadeRuns(unbroken, noisy(0.06)), deciding())
  stopped = MadeRuns(tmp_path / "stopped", noisy(0.06), stop_in=launch)
  train_made(tmp_path / "stopped", stopped, deciding())
  assert stopped.stopped and not ledger_rows(tmp_path / "stopped", "failed")
  assert len(ledger_rows(tmp_path / "stopped", "round_done")) == launch
  train_made(tmp_path / "stopped", MadeRuns(tmp_path / "stopped", noisy(0.06)), deciding())
  assert overrides_of(tmp_path / "stopped") == overrides_of(unbroken)
  assert [row["answer"] for row in ledger_rows(tmp_path / "stopped", "look")] == [
    row["answer"] for row in ledger_rows(unbroken, "look")]  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_leaves_a_sweep_to_be_continued(tmp_path, monkeypatch):
  argv = ["sweep=decide", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT, *on_stories(tmp_path), "lora.rank=1,2,4",
          "hydra.sweeper.decide.looks=[3]", "hydra.sweeper.tune.factors=[1,2]", "hydra.sweeper.tune.extend=0",
          "hydra.sweeper.extra=null", "train.steps=100", "train.eval_every=50"]  # fmt: skip
  recorded, trained = RoundLedger.add, LaunchedRuns.train

  def interrupted(ledger, number, following):
    if number == 1:  # Ctrl-C between two rounds
      raise KeyboardInterrupt
    recorded(ledger, number, following)

  def signalled(runs, jobs, *args, **kwargs):
    stop = threading.Thread(target=send_sigint, args=(tmp_path / "sweep" / str(max(jobs)) / "metrics.jsonl",))
    stop.start()
    trained(runs, jobs, *args, **kwargs)
    stop.join()

  # A shell that starts pytest in the background ignores SIGINT, and so would this process.
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  monkeypatch.setattr(RoundLedger, "add", interrupted)
  assert entry.run(argv) == 75
  monkeypatch.setattr(RoundLedger, "add", recorded)
  monkeypatch.setattr(LaunchedRuns, "train", signalled)
  assert entry.run([*argv, "logger=none"]) == 75
  assert ledger_rows(tmp_path / "sweep", "failed") == [] and len(ledger_rows(tmp_path / "sweep", "done")) < 15
  monkeypatch.setattr(LaunchedRuns, "train", trained)
  assert entry.run(argv) == 0
  assert {row["trial"] for row in ledger_rows(tmp_path / "sweep", "done")} == set(range(15))
  signal.signal(signal.SIGINT, previous)


def send_sigint(file: Path) -> None:
  """Sends SIGINT to this process once `file` exists, at most a minute later."""
  for _ in range(6000):
    if file.exists():
      os.kill(os.getpid(), signal.SIGINT)
      return
    time.sleep(0.01)


def test_config_files_are_read_once(tmp_path):
  shutil.copytree(ROOT / "conf", tmp_path / "conf")
  with composer(tmp_path / "conf") as composing:
    loader = composing.loader
    read_files_once(loader)
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    first = loader.load_sweep_config(master, ["lora.rank=2"])
    (tmp_path / "conf" / "optim" / "adamw.yaml").write_text("weight_decay: [")
    for again in (loader, pickle.loads(pickle.dumps(loader))):
      later = again.load_sweep_config(master, ["lora.rank=4"])
      assert later.optim == first.optim and (first.lora.rank, later.lora.rank) == (2, 4)


@pytest.mark.slow
def test_an_edited_conf_does_not_reach_later_rounds(tmp_path, monkeypatch, capfd):
  conf = tmp_path / "conf"
  shutil.copytree(ROOT / "conf", conf)
  default = conf / "optim" / "adamw.yaml"
  text = default.read_text()
  argv = [f"--config-path={conf}", "sweep=decide", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT,
          *on_stories(tmp_path), "lora.rank=1,2", "hydra.sweeper.decide.looks=[3]", "hydra.sweeper.tune.factors=[1,2]",
          "hydra.sweeper.tune.extend=0", "hydra.sweeper.extra=null"]  # fmt: skip
  recorded = RoundLedger.add

  def edited(ledger, number, following):
    recorded(ledger, number, following)
    default.write_text("weight_decay: [")

  monkeypatch.setattr(RoundLedger, "add", edited)
  assert entry.run(argv) == 0
  assert len(overrides_of(tmp_path / "sweep")) == 2
  default.write_text(text.replace("weight_decay: ", "weight_decay: 0.1  # "))
  assert entry.run(argv) == 2
  assert "run 0 was started with another optim.weight_decay" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_rounds_are_trained_by_joblib_as_in_this_process(tmp_path):
  pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
  argv = ["sweep=decide", *SHORT, *on_stories(tmp_path), "lora.rank=1,2", "hydra.sweeper.decide.looks=[3]",
          "hydra.sweeper.tune.factors=[1]", "hydra.sweeper.tune.extend=0", "hydra.sweeper.extra=null"]  # fmt: skip
  losses = {}
  for launcher in ("packed", "packed_joblib"):
    directory = tmp_path / launcher
    done = process(f"hydra/launcher={launcher}", f"hydra.sweep.dir={directory}", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses[launcher] = [summary(directory / str(n))["losses"]["best"] for n in range(8)]
    assert len(overrides_of(directory)) == 2
  assert losses["packed_joblib"] == losses["packed"]


@pytest.mark.parametrize(("argv", "sentence"), [
  (["hydra.sweeper.decide.looks=[5,3]"], "give ascending numbers of seeds from 3 to 10,000"),
  (["hydra.sweeper.decide.looks=[3,1000000000]"], "give ascending numbers of seeds from 3 to 10,000"),
  (["hydra.sweeper.decide.level=2"], "between 0 and 1"),
  (["hydra.sweeper.decide.early=1.5"], "decide.early=1.5: give a share of the training such as 0.5, or null"),
  (["hydra.sweeper.tune.neighbour=true"], "one value of each setting is scored; give false"),
  (["lora.rank=4"], "only one setting, so nothing to compare; give a list"),
  (["hydra.sweeper.budget.steps=-1"], "budget.steps=-1: give a positive whole number, or null"),
])  # fmt: skip
def test_a_decision_that_cannot_be_is_refused(argv, sentence, tmp_path, capfd):
  assert entry.run(["sweep=decide", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SHORT, "lora.rank=1,2", *argv]) == 2
  assert sentence in " ".join(capfd.readouterr().err.split())
