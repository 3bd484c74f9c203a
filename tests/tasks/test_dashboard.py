"""task=dashboard builds and saves a workspace of logged runs; wandb's sweeps and agents run our files."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub, serving
from runs import ROOT, TINY, environment, on_stories

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config.setting_names import all_settings
from lora_exp.report import wandb_workspace
from sweeps import ranks, references

FILES = sorted((ROOT / "sweeps" / "wandb").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # of wandb_workspaces
TASK = """
import sys
from lora_exp.cli import main as entry
from lora_exp.tasks import dashboard
dashboard.SECONDS = float(sys.argv[1])
sys.exit(entry.run(sys.argv[2:]))
"""


def online(url: str, home: Path) -> dict[str, str]:
  """The environment of a person with a key for the server at `url`."""
  kept = {key: value for key, value in environment().items() if not key.startswith("WANDB")}
  return kept | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false", "HOME": str(home)}


def wandb(hub: Hub, home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
  """Runs wandb's command line against `hub`, in `home`."""
  done = subprocess.run([sys.executable, "-m", "wandb", *argv], cwd=home, env=online(hub.url, home), text=True,
                        capture_output=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  return done


def task(run: Path, url: str, home: Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
  return subprocess.run([sys.executable, "-c", TASK, str(seconds), "task=dashboard", f"run={run}"], cwd=ROOT,
                        env=online(url, home), text=True, capture_output=True, timeout=120)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
  """A rank sweep with its reference lines, as its files tell of it."""
  directory = tmp_path / "08-29-18-rank"
  references(ranks(directory, {1: 2.5, 4: 2.3}, forgetting=0.1, retain={"source": "stdlib"}), 2.2, first=6)
  return directory


def written(directory: Path) -> dict[str, Any]:
  return json.loads((directory / "wandb" / "dashboard.json").read_text())


def panels(spec: dict) -> dict[str, list[dict]]:
  """Kind -> the settings of each panel."""
  found: dict[str, list[dict]] = {}
  for section in spec["section"]["panelBankConfig"]["sections"]:
    for panel in section["panels"]:
      found.setdefault(panel["viewType"], []).append(panel["config"])
  return found


# ---- what is on it


def test_workspace_has_curves_tradeoffs_and_settings(sweep, capsys):
  assert entry.run(["task=dashboard", f"run={sweep}"]) == 0
  told = written(sweep)
  assert (told["name"], told["project"]) == ("08-29-18-rank", "lora_exp")
  found, section = panels(told["spec"]), told["spec"]["section"]
  curves = {(panel["xAxis"], *panel["metrics"]) for panel in found["Run History Line Plot"]}
  assert curves == {(axis, name.format(split)) for split in ("eval", "train", "retain")
                    for axis, name in (("step", "{}/loss"), ("tokens", "loss_by_tokens/{}"))}
  runs = section["runSets"][0]
  assert [key["name"] for key in runs["grouping"]] == ["lora.value.method", "lora.value.rank"], "a line each"
  assert [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]] == [("group", "08-29-18-rank")]
  pareto = found["Scatter Plot"][0]
  assert (pareto["xAxis"], pareto["yAxis"]) == ("summary:parameters.trainable", "summary:eval/loss")
  [parallel] = found["Parallel Coordinates Plot"]
  columns = [column["accessor"] for column in parallel["columns"]]
  assert {"config:lora.value.rank", "config:lora.value.targets", "config:optim.value.lr"} <= set(columns)
  assert columns[-1] == "summary:eval/loss"
  assert found["Parameter Importance"][0]["targetKey"] == "eval/loss"
  assert {"config:lora.value.rank", "summary:eval/loss"} <= set(runs["runFeed"]["columnPinned"])
  printed = capsys.readouterr().out
  assert f"wandb sync {sweep}/wandb/offline-run-*" in printed and f"task=dashboard run={sweep}" in printed


def test_every_setting_that_it_names_exists(sweep):
  assert entry.run(["task=dashboard", f"run={sweep}"]) == 0
  known, text = dict(all_settings()), json.dumps(written(sweep))
  named = set(re.findall(r"config:(\w+)\.value\.(\w+)", text)) | set(re.findall(r'"(\w+)\.value\.(\w+)"', text))
  assert len(named) > 4 and {".".join(pair) for pair in named} <= set(known)


def test_a_run_is_found_by_its_name_and_needs_no_groups(sweep):
  assert entry.run(["task=dashboard", f"run={sweep / '2'}"]) == 0
  [runs] = written(sweep / "2")["spec"]["section"]["runSets"]
  assert runs["grouping"] == [] and "Parameter Importance" not in panels(written(sweep / "2")["spec"])
  assert [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]] == [("displayName", "2")]


def test_what_cannot_be_shown_is_told_and_nothing_is_written(tmp_path, capfd, monkeypatch):
  quiet = ranks(tmp_path / "quiet", {1: 2.5}, logger={"name": "none", "mode": "auto", "project": "p"})
  for run, said in ((["run=" + str(quiet)], "without logger=wandb"), ([], "run=null: task=dashboard needs"),
                    ([f"run={tmp_path / 'no'}"], "no such directory"), ([f"run={tmp_path}"], "contains no runs")):
    assert entry.run(["task=dashboard", *run]) == 2
    assert said in capfd.readouterr().err
  monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
  assert entry.run(["task=dashboard", f"run={quiet}"]) == 2
  assert "pip install 'lora_exp[dashboard]'" in capfd.readouterr().err
  assert not list(tmp_path.rglob("wandb"))


# ---- where it goes


def test_with_a_key_it_is_saved_and_its_address_is_told(sweep, tmp_path):
  with serving(Hub()) as hub:
    done = task(sweep, hub.url, tmp_path)
    assert done.returncode == 0 and hub.unknown == [], done.stderr
    [view] = hub.views
  assert (view["entityName"], view["projectName"]) == ("me", "lora_exp")
  assert panels(view["spec"]) == panels(written(sweep)["spec"])
  address = re.search(r"Saved: (\S+)", done.stdout)
  assert address and address[1].startswith(f"{hub.url}/me/lora_exp?nw=")


def test_server_without_an_answer_leaves_the_file(sweep, tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as silent:
    done = task(sweep, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, seconds=1)
  assert done.returncode == 1 and "no answer within 1 s" in done.stderr and "Traceback" not in done.stderr
  assert written(sweep)["name"] == "08-29-18-rank"


# ---- wandb's own sweeps


@pytest.mark.parametrize("file", [
  pytest.param(file, marks=[] if file.stem == "bayes" else pytest.mark.slow, id=file.stem) for file in FILES
])  # fmt: skip
def test_wandb_takes_our_sweep_files(tmp_path, file):
  with serving(Hub()) as hub:
    done = wandb(hub, tmp_path, "sweep", str(file))
    assert "wandb agent me/lora_exp/s0" in done.stderr and hub.unknown == []
    assert hub.sweep["metric"] == {"name": "eval/tuning_loss", "goal": "minimize"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_an_agent_types_is_a_command_line_of_ours(file):
  question, *_ = file.read_text().splitlines()
  assert question.startswith("# ") and "?" in question
  parameters = yaml.safe_load(file.read_text())["parameters"]
  values = {key: p.get("values") or [p["min"], p["max"]] for key, p in parameters.items()}
  for pick in (0, -1):
    argv = [f"{key}={options[pick]}" for key, options in values.items()]
    [cfg] = check_command_line(argv).jobs
    settings = dataclasses.asdict(cfg)
    flat = settings | {f"{group}.{key}": value for group, node in settings.items() if isinstance(node, dict)
                       for key, value in node.items()}
    assert all(flat[key] == options[pick] for key, options in values.items())


def test_hydra_does_not_take_them_for_its_own(capfd):
  assert entry.run(["-m", "sweep=wandb/rank"]) == 2
  assert "wandb sweep sweeps/wandb/rank.yaml" in capfd.readouterr().err


@pytest.mark.slow
def test_an_agent_runs_a_job_and_the_sweep_gets_what_it_asks_for(tmp_path):
  short = [*TINY, *on_stories(tmp_path), "logger=wandb", "train.steps=2", "train.eval_tokens=128"]
  jobs = [dict(text.split("=", 1) for text in [*short, f"lora.rank={rank}"]) for rank in (1, 2)]
  with serving(Hub(jobs)) as hub:
    wandb(hub, tmp_path, "sweep", str(FILES[0].with_name("rank.yaml")))
    wandb(hub, tmp_path, "agent", "--count", "2", "me/lora_exp/s0")
    assert hub.unknown == [] and sorted(hub.runs) == ["job0", "job1"], "the agent names the runs"
    for number, run in enumerate(hub.runs[name] for name in ("job0", "job1")):
      assert run["sweep"] == "s0" and run["exit_code"] == 0
      assert json.loads(run["config"])["lora"]["value"]["rank"] == number + 1
      summary = run["summary"]
      assert summary[wandb_workspace.LOSS] > 0 and summary["parameters"]["trainable"] == 384 * (number + 1)
      assert [row["step"] for row in run["history"] if "train/loss" in row] == [1, 2]
