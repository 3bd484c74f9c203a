"""Studies: the search space, distinct trials, pruning that does not change other runs, and continuation."""

import json
import signal
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from runs import TINY, command, curve, environment, on_stories, process, rows, summary, train

from lora_exp.cli import main as entry
from lora_exp.cli import session
from lora_exp.config import InputError
from lora_exp.config.override_grammar import parse
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.plots.trial_history import trial_history
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.sweep.ledger import Ledger
from lora_exp.sweep.packs import packed_sweep
from lora_exp.sweep.study.study_journal import JOURNAL, NAME, StudyJournal
from lora_exp.sweep.study.study_settings import read_study
from lora_exp.sweep.study.study_space import Choice, Interval
from sweeps import ranks, trial

SHORT = [*TINY, "model.dropout=0", "train.steps=12", "train.eval_every=4", "train.eval_tokens=512", "optim.warmup=2"]
SPACE = ["lora.rank=choice(1,2,4,8)", "optim.lr=tag(log,interval(1e-3,1e-1))"]
NODE = {"params": None, "extra": None, "n_trials": 8, "width": 3, "sampler": "tpe", "seed": 0, "objectives": ["loss"],
        "rungs": None, "keep": 0.5}  # fmt: skip


def made(*typed: str, **sweeper):
  overrides = lambda texts: parse(texts, None)[0]
  return read_study(NODE | sweeper, overrides(list(typed)), overrides)


def run_study(directory: Path, *argv: str, launcher: str = "packed", code: int = 0, report: bool = True) -> Path:
  """A study in `directory`, run in this process; without its report, which takes seconds, where nobody reads it."""
  common = ["-m", "hydra/sweeper=study", f"hydra/launcher={launcher}", f"hydra.sweep.dir={directory}"]
  with pytest.MonkeyPatch.context() as patch:
    if not report:
      patch.setattr(session, "_report_sweep", lambda *_: None)
    assert entry.run([*common, *argv]) == code
  return directory


def trials_of(directory: Path) -> list[optuna.trial.FrozenTrial]:
  """What Optuna itself reads from the journal."""
  storage = JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
  return optuna.load_study(study_name=NAME, storage=storage).trials


def adapter(run_dir: Path) -> bytes:
  return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


# ---- what is searched


def test_the_space_is_written_in_hydras_own_syntax():
  found = made("a=choice(qv,mlp)", "b=1,2,2", "c=tag(log,interval(1e-4,1e-2))", "d=range(1,9,2)",
               "e=int(interval(1,4))", "f=range(0.1,0.5,0.2)", "g=tag(log,range(1,65))", "h=7")  # fmt: skip
  assert found.space == {
    "a": Choice(("qv", "mlp")), "b": Choice(("1", "2")), "c": Interval(1e-4, 1e-2, None, True), "d": Interval(1, 7, 2),
    "e": Interval(1, 4), "f": Interval(0.1, pytest.approx(0.3), 0.2), "g": Interval(1, 64, None, True),
  }  # fmt: skip
  assert found.fixed == ["h=7"] and [found.space[k].integer for k in "defg"] == [True, True, False, True]


def test_what_is_typed_wins_and_seeds_repeat_a_trial():
  params = {"lora.rank": "choice(1,2)", "optim.lr": "interval(0.1,1)", "train.seed": "0,1"}
  found = made("lora.rank=8", "data.seed=3,4", params=params, extra=[{"lora": "full", "train.seed": "0,1"}])
  assert list(found.space) == ["optim.lr"]
  assert found.repeats == [["train.seed=0", "data.seed=3"], ["train.seed=0", "data.seed=4"],
                           ["train.seed=1", "data.seed=3"], ["train.seed=1", "data.seed=4"]]  # fmt: skip
  assert found.job({"optim.lr": 0.5}, 3) == ["lora.rank=8", "optim.lr=0.5", "train.seed=1", "data.seed=4"]
  assert found.extra == [["lora.rank=8", "lora=full", "train.seed=0"], ["lora.rank=8", "lora=full", "train.seed=1"]]


def test_a_parameter_with_plus_signs_replaces_that_of_the_file():
  params = {"lora.rank": "choice(1,2)", "optim.lr": "interval(0.1,1)", "seed": "0,1"}
  found = made("++lora.rank=8", "++seed=3,4", params=params, extra=[{"lora": "full", "seed": "0,1"}])
  assert list(found.space) == ["optim.lr"] and found.repeats == [["++seed=3"], ["++seed=4"]]
  assert found.extra == [["++lora.rank=8", "lora=full", "++seed=3"], ["++lora.rank=8", "lora=full", "++seed=4"]]


@pytest.mark.parametrize(("argv", "sentence"), [
  (["hydra.sweeper.objectives=[los]", *SPACE], "no such objective los; choose loss, perplexity,"),
  ([], "no parameter is searched"),
  (["train.seed=0,1"], "no parameter is searched"),
  (["hydra.sweeper.sampler=tpr", *SPACE], "choose tpe, nsga2, random; did you mean tpe"),
  (["hydra.sweeper.n_trials=0", *SPACE], "integer of at least 1"),
  (["optim.lr=interval(1,0.1)"], "needs finite bounds, the smaller one first"),
  (["optim.lr=tag(log,interval(0,1))"], "needs positive bounds"),
  (["lora.rank=range(4,4)"], "the range is empty"),
  (["lora.rank=choice(1,-2)"], "lora.rank=-2"),
  (["lora=choice(lora,dorra)"], "did you mean dora"),
  (["hydra.sweeper.rungs=[4]", "hydra.sweeper.objectives=[loss,trainable]", *SPACE], "from the Pareto front"),
  (["hydra.sweeper.rungs=[8,4]", *SPACE], "increasing steps"),
  (["hydra.sweeper.rungs=[4,6]", *SPACE], "6 is not a multiple of train.eval_every=4"),
  (["hydra.sweeper.rungs=[12]", *SPACE], "not before the last step, train.steps=12"),
  (["hydra.sweeper.rungs=[4]", "hydra.sweeper.width=1", *SPACE], "nothing to compare"),
  (["hydra.sweeper.objectives=[forgetting]", *SPACE], "data@retain=none"),
  (["hydra/sweeper=grid", *SPACE], "to search an interval, use hydra/sweeper=study"),
])  # fmt: skip
def test_a_study_that_cannot_be_is_refused_with_a_sentence(argv, sentence, tmp_path, capfd):
  sweeper = [] if any(text.startswith("hydra/sweeper") for text in argv) else ["hydra/sweeper=study"]
  assert entry.run(["-m", *sweeper, f"hydra.sweep.dir={tmp_path / 'study'}", *SHORT, *argv]) == 2
  assert sentence in capfd.readouterr().err
  assert not (tmp_path / "study").exists()


def test_without_optuna_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'lora_exp\[study\]'"):
    made(*SPACE)


# ---- what is tried


def told(trials: StudyJournal, batch) -> None:
  """Ends a batch with losses that its parameters decide."""
  for suggested in batch:
    loss = sum(float(value) for value in suggested.params.values())
    trials.tell(suggested.number, [loss, -loss][: len(trials.cfg.objectives)], TrialState.COMPLETE)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
@pytest.mark.parametrize("objectives", [["loss"], ["loss", "trainable"]])
def test_a_resumed_study_makes_the_same_choices(sampler, objectives, tmp_path):
  cfg = made(*SPACE, sampler=sampler, objectives=objectives, n_trials=20)
  unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
  for directory in (unbroken, broken):
    directory.mkdir()
  trials = StudyJournal(cfg, unbroken)
  while batch := trials.batch():
    told(trials, batch)
  while True:  # a process for each batch, which is killed once in it
    asked = StudyJournal(cfg, broken).batch()
    (broken / f"{JOURNAL}.lock").symlink_to(broken / JOURNAL)  # as Optuna locks it
    with (broken / JOURNAL).open("a") as file:
      file.write('{"op_code": 4, "wor')
    again = StudyJournal(cfg, broken)
    batch = again.batch()
    assert [(t.number, t.params) for t in batch] == [(t.number, t.params) for t in asked]
    if not batch:
      break
    told(again, batch)
  params = lambda directory: [t.params for t in trials_of(directory)]
  assert params(broken) == params(unbroken) and len({str(p) for p in params(broken)}) == 20
  assert [t.number for t in trials_of(broken)] == list(range(20))


def test_no_point_is_tried_twice_and_a_space_has_an_end(tmp_path):
  trials = StudyJournal(made("a=choice(1,2,3)", "b=range(0,4)", n_trials=50, width=5), tmp_path)
  while batch := trials.batch():
    told(trials, batch)
  assert sorted((t.params["a"], t.params["b"]) for t in trials.all) == [(a, b) for a in "123" for b in range(4)]


def test_a_study_resumes_only_with_its_own_settings(tmp_path):
  params = {}
  for seed in (0, 1):
    (tmp_path / str(seed)).mkdir()
    params[seed] = [t.params for t in StudyJournal(made(*SPACE, seed=seed), tmp_path / str(seed)).batch()]
  assert params[0] != params[1]
  with pytest.raises(InputError, match=r"started with another width, seed"):
    StudyJournal(made(*SPACE, width=4, seed=1), tmp_path / "0")
  with pytest.raises(InputError, match=r"started with another settings"):
    StudyJournal(made(*SPACE, "train.steps=3"), tmp_path / "0")
  StudyJournal(made(*SPACE, "logger=none", n_trials=30), tmp_path / "0")  # which may change


# ---- pruned


@pytest.fixture(scope="module")
def unpruned(tmp_path_factory):
  directory = tmp_path_factory.mktemp("unpruned")
  argv = [*SHORT, *on_stories(directory), *SPACE, "hydra.sweeper.width=4", "hydra.sweeper.n_trials=4"]
  return run_study(directory / "study", *argv, report=False)


def halved(unpruned: Path, directory: Path, rungs: str, launcher: str = "packed") -> Path:
  """The same study, with `rungs`."""
  stories = ["data=text", f"data.path={unpruned.parent / 'lora_exp_test_stories.txt'}"]
  argv = [*SHORT, *stories, *SPACE, "hydra.sweeper.width=4", "hydra.sweeper.n_trials=4", f"hydra.sweeper.rungs={rungs}"]
  return run_study(directory, *argv, launcher=launcher)


def check_halved(study: Path, unpruned: Path, rungs: list[int]) -> None:
  """At each rung the worse half stops, and what goes on to the end equals its unpruned run."""
  left, reached = list(range(4)), {}
  for rung in rungs:
    at = {n: min(r["loss"] for r in rows(unpruned / str(n), "eval") if 0 < r["step"] <= rung) for n in left}
    left.sort(key=at.get)
    reached |= dict.fromkeys(left[len(left) // 2 :], rung)
    left = left[: len(left) // 2]
  reached |= dict.fromkeys(left, 12)
  for n in range(4):
    assert curve(study / str(n)) == [row for row in curve(unpruned / str(n)) if row["step"] <= reached[n]], n
    assert max(row["step"] for row in rows(study / str(n))) == reached[n]
    assert summary(study / str(n))["status"] == ("done" if n in left else "pruned")
    assert (study / str(n) / "adapter").exists() == (n in left)
  assert [adapter(study / str(n)) for n in left] == [adapter(unpruned / str(n)) for n in left]
  states = {trial.number: trial.state for trial in trials_of(study)}
  assert states == {n: TrialState.COMPLETE if n in left else TrialState.PRUNED for n in range(4)}
  ledger = [json.loads(line) for line in (study / "sweep.jsonl").read_text().splitlines()]
  assert sorted(row["trial"] for row in ledger if row["event"] == "pruned") == sorted({*range(4)} - {*left})


@pytest.mark.slow
def test_pruning_leaves_the_best_trial_unchanged(unpruned, tmp_path, capfd, monkeypatch):
  make_pack, sizes = packed_sweep.make_pack, []
  spy = lambda trials, *rest, **more: sizes.append(len(trials)) or make_pack(trials, *rest, **more)
  monkeypatch.setattr(packed_sweep, "make_pack", spy)
  study = halved(unpruned, tmp_path / "study", "[4]")
  assert sizes[0] == 4 > sizes[1] >= 2, "pruned runs cost nothing, but for one that the pack's shape needs"
  check_halved(study, unpruned, [4])
  shown = capfd.readouterr()
  assert "2 complete, 2 pruned" in shown.out and "warning" not in shown.err
  trials = read_sweep(study)
  assert sorted(trial.status for trial in trials) == ["done", "done", "pruned", "pruned"]
  pruned = [trial for trial in trials if trial.status == "pruned"]
  assert all(trial.result("loss") is None and trial.reason.startswith("at step") for trial in pruned)
  page = (study / "report.md").read_text()
  assert "no result at full length to compare" in page and "leave out the unfinished" not in page


@pytest.mark.slow
def test_of_several_rungs_each_halves_what_is_left(unpruned, tmp_path):
  check_halved(halved(unpruned, tmp_path / "study", "[4,8]"), unpruned, [4, 8])


@pytest.mark.slow
def test_runs_that_are_launched_one_by_one_are_pruned_alike(unpruned, tmp_path):
  stories = ["data=text", f"data.path={unpruned.parent / 'lora_exp_test_stories.txt'}"]
  study = halved(unpruned, tmp_path / "study", "[4,8]", launcher="basic")
  [best] = [t for t in trials_of(study) if t.state == TrialState.COMPLETE]
  own = [f"{key}={value}" for key, value in best.params.items()]
  alone = train(tmp_path / "alone", *SHORT, *stories, *own)
  assert curve(alone) == curve(study / str(best.number)) and adapter(alone) == adapter(study / str(best.number))
  assert sorted(max(row["step"] for row in rows(study / str(n))) for n in range(4)) == [4, 4, 8, 12]


# ---- several objectives, additional runs, failures, resuming


@pytest.mark.slow
def test_a_pareto_study_continues_to_its_total(tmp_path, capfd):
  argv = [*SHORT, *on_stories(tmp_path), "lora.rank=choice(1,2,4)", "lora.targets=choice(mlp,qv,no_such_module)",
          "optim.lr=0.03", "train.steps=4", "hydra.sweeper.objectives=[loss,trainable]",
          "hydra.sweeper.extra=[{lora: frozen}]"]  # fmt: skip
  begun = run_study(tmp_path / "study", *argv, "hydra.sweeper.n_trials=2", code=1, report=False)
  before = {t.number: t.params for t in trials_of(begun)}
  study = run_study(tmp_path / "study", *argv, "hydra.sweeper.n_trials=4", code=1)
  trials = trials_of(study)
  assert [t.number for t in trials] == list(range(4)) and {n: trials[n].params for n in before} == before
  assert len({str(t.params) for t in trials}) == 4
  for ended in trials:
    run = study / str(ended.number + 1)  # after the frozen one
    if ended.params["lora.targets"] == "no_such_module":
      assert ended.state == TrialState.FAIL and "matches no module" in ended.user_attrs["reason"]
    else:
      tuning_loss = summary(run)["halves"]["tuning"]["exported"]["loss"]
      assert ended.values == [tuning_loss, summary(run)["parameters"]["trainable"]]
  points = {t.number: t.values for t in trials if t.state == TrialState.COMPLETE}
  beaten = lambda v: any(w != v and w[0] <= v[0] and w[1] <= v[1] for w in points.values())
  front = [n for n, v in points.items() if not beaten(v)]
  out = capfd.readouterr().out
  assert f"Pareto front of loss and trainable: {len(front)} of 4 trials" in out
  assert (study / "plots" / "pareto.png").is_file() and "frozen" in (study / "report.md").read_text()
  lines = (study / "sweep.jsonl").read_text().splitlines()
  ends = [json.loads(line).get("trial") for line in lines if '"done"' in line]
  assert len(ends) == len(set(ends)), "each run is trained once"
  run_study(tmp_path / "study", *argv, "hydra.sweeper.n_trials=3", code=2)
  assert "already has 4 trials" in capfd.readouterr().err and len(trials_of(study)) == 4


MOMENTS = {
  "before the first checkpoint": lambda d: (d / "0" / "metrics.jsonl").exists(),
  "at a rung": lambda d: (d / "sweep.jsonl").exists() and '"pruned"' in (d / "sweep.jsonl").read_text(),
  "between the ends of two runs": lambda d: any((d / str(n) / "adapter").exists() for n in range(4)),
  "in the second batch": lambda d: (d / "5" / "checkpoints").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_killed_study_resumes_to_the_same_result(moment, tmp_path):
  argv = [*SHORT, *on_stories(tmp_path), *SPACE, "hydra.sweeper.width=4", "hydra.sweeper.n_trials=7",
          "hydra.sweeper.rungs=[4,8]"]  # fmt: skip
  unbroken = run_study(tmp_path / "unbroken", *argv)
  killed = tmp_path / "killed"
  argv = ["-m", "hydra/sweeper=study", "hydra/launcher=packed", f"hydra.sweep.dir={killed}", *argv]
  started = subprocess.Popen(command(*argv), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 300
  while not MOMENTS[moment](killed) and started.poll() is None and time.monotonic() < deadline:
    time.sleep(0.005)
  started.send_signal(signal.SIGKILL)
  started.wait()
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  ended = lambda directory: [(t.number, t.params, t.state, t.values) for t in trials_of(directory)]
  assert ended(killed) == ended(unbroken)
  for n in range(7):
    assert curve(killed / str(n)) == curve(unbroken / str(n)), n


# ---- the report of a study


def said(directory: Path, topic: str) -> list:
  [found] = make_groups(read_sweep(directory))
  return [finding for finding in all_findings(found) if finding.topic == topic]


def test_ranks_that_had_a_rate_of_their_own_each_are_not_ranked(tmp_path):
  for n, (rank, lr, loss) in enumerate([(2, 1e-3, 2.5), (8, 3e-3, 2.4)]):
    ranks(tmp_path, {rank: loss}, first=3 * n, optim__lr=lr)
  [rank] = said(tmp_path, "Rank")
  assert not rank.concluded and "tried at its own values of lr, which were as few as 1" in rank.text


def test_a_pruned_run_is_no_failure_and_no_result(tmp_path):
  ranks(tmp_path, {2: 2.4, 8: 2.4})
  trial(tmp_path, 6, 2.9, status="pruned", lora__rank=4, change={"reason": "at step 4, not among the best 2 of 4"})
  pruned = read_sweep(tmp_path)[6]
  assert (pruned.status, pruned.result("loss")) == ("pruned", None)
  assert pruned.reason == "at step 4, not among the best 2 of 4"
  assert not any("leave out the unfinished" in finding.text for finding in said(tmp_path, "Next"))
  [rank] = said(tmp_path, "Rank")
  assert rank.concluded and rank.values["rank"] == 2


def test_its_history_is_drawn_trial_by_trial_from_the_ledger(tmp_path):
  losses, ledger = [2.5, 2.3, 2.4, 2.2, 2.6], Ledger(tmp_path)
  for n, loss in enumerate(losses):
    trial(tmp_path, n, loss, status="pruned" if n == 4 else "done", lora__rank=n + 1)
    ledger.add("trial", study_trial=n, runs=[n], params={})
  (study,) = make_groups(read_sweep(tmp_path))
  drawn = trial_history(study, tmp_path)
  assert drawn is not None and drawn.title == "Trial 3 of 0-4 has the lowest held-out loss, 2.2000"
  tables = list(drawn.specs[0]["datasets"].values())
  points = {row["x"]: (row["y"], row["done"]) for table in tables for row in table if "done" in row}
  assert {n: value for n, (value, _) in points.items() if n < 4} == dict(enumerate(losses[:4]))
  assert [done for _, done in points.values()] == [True] * 4 + [False]
  [so_far] = [table for table in tables if table[0].keys() == {"x", "y"}]
  assert [row["y"] for row in so_far] == [2.5, 2.3, 2.3, 2.2, 2.2]
  ledger.path.write_text("no JSON\n")
  assert trial_history(study, tmp_path) is None  # and no error
  ledger.path.unlink()
  assert trial_history(study, tmp_path) is None  # a sweep that is no study
