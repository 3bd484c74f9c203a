"""Loggers: their modes and directories, the numbers that they hold, and that no failure of theirs affects training."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from runs import TINY, on_stories

from lora_exp.cli import main as entry
from lora_exp.config.schema import LoggerConfig
from lora_exp.runtime.json_lines import read_metrics
from lora_exp.runtime.sweep_directory import sweep_trial
from lora_exp.train import background_logger
from lora_exp.train.background_logger import make_logger, wait_for
from lora_exp.train.loggers.wandb_logger import wandb_mode

REPOSITORY = Path(background_logger.__file__).parents[2]
CREDENTIALS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC")


def row(step: int, split: str = "train", loss: float = 2.0) -> dict:
  return {"step": step, "tokens": 8 * step, "split": split, "loss": loss}


# --- which logger, and where to


@pytest.fixture
def no_key(monkeypatch, tmp_path):
  for name in CREDENTIALS:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))


def test_no_logger_does_nothing(tmp_path, no_key, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  for cfg in (LoggerConfig(name="none"), LoggerConfig(mode="disabled")):
    log = make_logger(cfg, tmp_path, "run", {})
    log.log(row(1))
    log.summary({"x": 1})
    log.finish(0)
    wait_for([log])
  assert list(tmp_path.iterdir()) == []


def test_auto_is_offline_until_a_key_is_configured(no_key, monkeypatch, tmp_path, capsys):
  assert wandb_mode("auto") == "offline"
  assert wandb_mode("online") == "offline"
  assert "WANDB_API_KEY" in capsys.readouterr().err
  (tmp_path / ".netrc").write_text("machine elsewhere.org login user password x\n")
  assert wandb_mode("auto") == "offline"
  (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
  assert wandb_mode("auto") == "online"
  assert wandb_mode("offline") == "offline"
  monkeypatch.setenv("WANDB_MODE", "disabled")
  assert wandb_mode("auto") == "disabled"
  monkeypatch.setenv("WANDB_MODE", "dryrun")
  assert wandb_mode("auto") == "offline"
  assert wandb_mode("online") == "online"


def test_auto_is_online_with_a_key_in_the_environment(no_key, monkeypatch):
  monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
  assert wandb_mode("auto") == "online"


# --- the real wandb, in a process of its own

RUN = """
import sys
from pathlib import Path
from lora_exp.train.background_logger import make_logger, wait_for
from lora_exp.train.loggers import wandb_logger
from lora_exp.config.schema import LoggerConfig
wandb_logger.INIT_SECONDS = 2.0
cfg = LoggerConfig(mode=sys.argv[2], tags=["tag"], group="g")
log = make_logger(cfg, Path(sys.argv[1]), "rank 8/demo", {"lora": {"rank": 8}})
for step in range(1, 301):
  log.log({"step": step, "tokens": 8 * step, "split": "train", "loss": 4 / step, "lr": 0.5})
  if step % 100 == 0:
    log.log({"step": step, "tokens": 8 * step, "split": "eval", "loss": 5 / step, "perplexity": 2.0})
log.summary({"parameters": {"trainable": 12}})
log.finish(5)
wait_for([log])
"""


def run_wandb(run_dir: Path, mode: str, port: int) -> subprocess.CompletedProcess:
  """RUN against a server at a port of this machine; any address looked up or called would go there."""
  here = f"http://127.0.0.1:{port}"
  environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
  environment |= {"HOME": str(run_dir / "home"), "WANDB_BASE_URL": here, "WANDB_API_KEY": "0" * 40}
  environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), here)
  environment |= {"NO_PROXY": "", "no_proxy": ""}
  return subprocess.run([sys.executable, "-c", RUN, str(run_dir), mode], cwd=REPOSITORY, env=environment,
                        capture_output=True, text=True, timeout=120)


def inspect(place: Path, *options: str) -> str:
  """What `wandb leet` reads in a run's file, or in the one file of a run directory."""
  [file] = [place] if place.is_file() else (place / "wandb").glob("offline-run-*/*.wandb")
  command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(file)]
  return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
  """(run directory, what it printed, connections made) of a run logged offline."""
  run_dir, connections = tmp_path_factory.mktemp("run"), []
  with socket.create_server(("127.0.0.1", 0)) as server:
    def accept():
      while True:
        try:
          connections.append(server.accept())
        except OSError:
          return
    threading.Thread(target=accept, daemon=True).start()
    done = run_wandb(run_dir, "offline", server.getsockname()[1])
  assert done.returncode == 0, done.stderr
  return run_dir, done.stdout + done.stderr, connections


def test_an_offline_run_is_written_whole_and_says_nothing(offline):
  run_dir, printed, connections = offline
  assert printed == ""
  assert connections == [], "offline touches no network"
  told = json.loads(inspect(run_dir, "--summary"))
  assert told["name"] == "rank 8/demo" and told["tags"] == ["tag"] and told["config"]["lora"] == {"rank": 8}
  assert told["step"] == 300 and told["exit_code"] == 5
  summary = told["summary"]
  assert summary["parameters"] == {"trainable": 12}
  assert summary["train/loss"] == summary["loss_by_tokens/train"] == pytest.approx(4 / 300)
  assert summary["eval/loss"] == pytest.approx(5 / 300) and summary["eval/perplexity"] == 2.0
  assert summary["train/lr"] == 0.5 and summary["tokens"] == 2400


def test_losses_are_curves_against_steps_and_against_tokens(offline):
  records = [json.loads(line) for line in inspect(offline[0]).splitlines()]
  axes = {r["metric"]["glob_name"]: r["metric"]["step_metric"] for r in records
          if r["type"] == "metric" and "glob_name" in r["metric"]}
  assert axes == {"train/*": "step", "eval/*": "step", "retain/*": "step", "loss_by_tokens/*": "tokens"}
  history = [r["history"]["item"] for r in records if r["type"] == "history"]
  assert [item["step"] for item in history] == list(range(1, 301))
  assert [item["tokens"] for item in history if "eval/loss" in item] == [800, 1600, 2400]


def test_an_unreachable_server_is_only_a_warning(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  done = run_wandb(tmp_path, "online", port)
  assert done.returncode == 0
  assert "cannot be reached" in done.stderr and done.stderr.count("warning") == 1
  assert json.loads(inspect(tmp_path, "--summary"))["step"] == 300


# --- the trials of a sweep


def trials(sweep: Path, *argv: str) -> dict[str, list[dict]]:
  """Trains a sweep in this process; what wandb has of each trial, by its name: the records of its one file."""
  short = [*TINY, "logger=wandb", "train.steps=2", "train.eval_every=1", "train.eval_tokens=128", "train.save_every=0"]
  assert entry.run(["-m", f"hydra.sweep.dir={sweep}", *short, *on_stories(sweep.parent), *argv]) == 0
  assert not list(sweep.glob("*/wandb")), "a trial has no directory of its own there"
  found = {}
  for file in (sweep / "wandb").glob("offline-run-*/*.wandb"):
    records = [json.loads(line) for line in inspect(file).splitlines()]
    [run] = [r["run"] for r in records if r["type"] == "run"]
    assert file.parent.name.endswith(run["run_id"]) and run["run_id"].startswith(run["display_name"])
    found[run["display_name"]] = records
  return found


def of_kind(records: list[dict], kind: str) -> list[dict]:
  return [r[kind] for r in records if r["type"] == kind]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  sweep = tmp_path_factory.mktemp("wandb") / "08-29-18-rank"
  return sweep, trials(sweep, "hydra/launcher=packed", "lora.rank=1,4", "lora.targets=mlp,all_linear")


@pytest.mark.slow
def test_a_sweep_is_a_group_with_readable_run_names(packed):
  sweep, found = packed
  assert sorted(found) == ["0-lora-r1-mlp", "1-lora-r1-all_linear", "2-lora-r4-mlp", "3-lora-r4-all_linear"]
  for records in found.values():
    [run] = of_kind(records, "run")
    assert (run["run_group"], run["job_type"], run["project"]) == ("08-29-18-rank", "lora", "lora_exp")
  told = inspect(next((sweep / "wandb").glob("*2-lora-r4-mlp*/*.wandb")), "--summary")
  assert json.loads(told)["config"]["lora"]["rank"] == 4 and json.loads(told)["summary"]["status"] == "done"


@pytest.mark.slow
def test_wandb_gets_metrics_against_steps_and_tokens(packed):
  sweep, found = packed
  for name, records in found.items():
    for split in ("train", "eval"):
      rows = [row for row in read_metrics(sweep / name[0]) if row["split"] == split]
      theirs = [item["item"] for item in of_kind(records, "history") if f"{split}/loss" in item["item"]]
      for key in ("step", "tokens", "loss"):
        names = {"loss": f"{split}/loss"}
        assert [item[names.get(key, key)] for item in theirs] == [row[key] for row in rows], (name, split, key)
      assert [item[f"loss_by_tokens/{split}"] for item in theirs] == [row["loss"] for row in rows]


@pytest.mark.slow
def test_trials_that_are_run_one_after_another_are_a_group_too(tmp_path):
  found = trials(tmp_path / "seeds", "hydra/launcher=basic", "lora=frozen", "model.seed=0,1", "logger.group=mine")
  assert sorted(found) == ["0-frozen-base0", "1-frozen-base1"]
  assert {of_kind(records, "run")[0]["run_group"] for records in found.values()} == {"mine"}


def test_what_is_alike_in_every_trial_is_in_no_name(tmp_path):
  (tmp_path / "3" / ".hydra").mkdir(parents=True)
  hydra = {"sweeper": {"params": {"lora.parameters": 0.03, "train.seed": "0,1"}},
           "overrides": {"task": ["sweep=budget", "lora.targets=qv,mlp", "data=text", 'data.path="a b.txt"']}}
  (tmp_path / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
  own = ["sweep=budget", "data=text", 'data.path="a b.txt"', "lora.parameters=0.03", "lora.targets=qv", "train.seed=1"]
  (tmp_path / "3" / ".hydra" / "overrides.yaml").write_text(json.dumps(own))
  assert sweep_trial(tmp_path / "3").name("dora") == "3-dora-qv-s1"
  assert sweep_trial(tmp_path / "3").sweep == tmp_path
  (tmp_path / "3" / ".hydra" / "overrides.yaml").write_text(json.dumps(["lora=full", "optim.lr=0.1"]))
  assert sweep_trial(tmp_path / "3").name("full") == "3-full-lr0.1"
  assert sweep_trial(tmp_path) is None


# --- a wandb that misbehaves


class FakeRun:
  """Does nothing, as slowly as it is told to."""

  def __init__(self, hang: threading.Event | None = None, where: str = ""):
    self.hang, self.where, self.rows, self.summary, self.step = hang, where, [], {}, 0

  def wait(self, place: str) -> None:
    if self.where == place:
      self.hang.wait(30)

  def define_metric(self, *_, **__):
    pass

  def log(self, *values):
    self.wait("log")
    self.rows.append(values)

  def finish(self, exit_code):
    self.wait("finish")


@pytest.fixture
def fake(monkeypatch, tmp_path):
  """Installs a wandb whose `init` is the given function, and returns a logger on it."""
  hang = threading.Event()

  def install(init, **limits):
    module = types.SimpleNamespace(init=init, Settings=lambda **_: None, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name, value in {"finish_seconds": 0.2, **limits}.items():
      monkeypatch.setattr(background_logger.BackgroundLogger, name, value)
    return make_logger(LoggerConfig(mode="offline"), tmp_path, "run", {})

  install.hang = hang
  yield install
  hang.set()


def use(log: background_logger.Logger, rows: int = 3) -> None:
  for step in range(rows):
    log.log(row(step))
  log.summary({"x": 1})
  log.finish(0)
  wait_for([log])


def test_a_wandb_that_works_gets_every_row(fake):
  run = FakeRun()
  use(fake(lambda **_: run))
  assert [step for _, step in run.rows] == [0, 1, 2]
  assert run.summary == {"x": 1}


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(28, "No space left on device"), SystemExit(1)])
def test_an_init_that_raises_costs_one_warning(fake, capsys, error):
  def init(**_):
    raise error

  log = fake(init)
  log.parts[0].thread.join(10)
  use(log)
  told = capsys.readouterr().err
  assert told.count("warning") == 1 and type(error).__name__ in told and "training continues" in told


def test_a_wandb_that_is_not_installed_costs_one_warning(fake, capsys, monkeypatch, tmp_path):
  fake(lambda **_: FakeRun()).finish(0)
  monkeypatch.setitem(sys.modules, "wandb", None)
  log = make_logger(LoggerConfig(mode="offline"), tmp_path, "run", {})
  log.parts[0].thread.join(10)
  use(log)
  assert capsys.readouterr().err.count("warning") == 1


def test_a_log_that_raises_costs_one_warning(fake, capsys):
  run = FakeRun()
  run.log = lambda *_: 1 / 0
  log = fake(lambda **_: run)
  log.log(row(1))
  log.parts[0].thread.join(10)
  use(log)
  assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("where", ["log", "finish", "init"])
def test_a_wandb_that_hangs_is_left_behind(fake, capsys, where):
  run = FakeRun(fake.hang, where)

  def init(**_):
    run.wait("init")
    return run

  use(fake(init))  # returns, or the test hangs
  told = capsys.readouterr().err
  assert told.count("warning") == 1 and "did not finish" in told


def test_rows_that_wandb_rejects_give_one_warning(fake, capsys):
  log = fake(lambda **_: FakeRun(fake.hang, "log"), queue_rows=10)
  began = time.monotonic()
  use(log, rows=5000)
  assert time.monotonic() - began < 20, "no call waits for wandb"
  assert capsys.readouterr().err.count("warning") == 1
