"""One run, stopped and resumed, with every logger at once: their real libraries hold the values of metrics.jsonl."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError

pytest.importorskip("tensorboardX")
os.environ.setdefault("TRACKIO_DIR", str(runs.cache() / "trackio"))  # read when trackio is imported
Values = dict[tuple[str, int], float]  # (name, step) -> value
ALL = "logger.name=[wandb,tensorboard,trackio,mlflow]"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
  """A run of four steps that was stopped after two."""
  directory = tmp_path_factory.mktemp("logged")
  run = directory / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{directory}/mlflow.db")
    patch.setenv("WANDB_MODE", "offline")
    short = ["train.steps=4", "train.eval_every=2", "train.save_every=1", "train.eval_tokens=256", "model.base=random"]
    runs.train(run, *runs.TINY, *short, *runs.on_stories(directory), "logger=wandb", ALL, "logger.project=agree",
               "train.stop_at=2", code=75)
    runs.resume(run)
  return run


def expected(run_dir: Path) -> Values:
  """The values of metrics.jsonl."""
  return {(f"{row['split']}/{key}", row["step"]): value for row in runs.rows(run_dir) for key, value in row.items()
          if key not in ("split", "step", "tokens")}


@pytest.mark.slow
def test_wandb_has_the_values_of_a_resumed_run_in_one_file(run_dir):
  [file] = (run_dir / "wandb").glob("offline-run-*/*.wandb")
  command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
  records = [json.loads(line) for line in done.stdout.splitlines()]
  items = [record["history"]["item"] for record in records if record["type"] == "history"]
  found = {(key, item["step"]): value for item in items for key, value in item.items()
           if key.split("/")[0] in ("train", "eval", "retain")}
  assert found == expected(run_dir)


@pytest.mark.slow
def test_tensorboard_has_the_values_as_float32(run_dir):
  found = tensorboard_scalars(run_dir / "tensorboard")
  curves = {key for key in found if key[0].startswith("loss_by_tokens/")}
  assert {step for _, step in curves} == {row["tokens"] for row in runs.rows(run_dir)}
  single = {key: float(np.float32(value)) for key, value in expected(run_dir).items()}
  assert {key: value for key, value in found.items() if key not in curves} == single


def tensorboard_scalars(directory: Path) -> Values:
  """The scalars in all event files of a directory: records of (length, checksum, event, checksum)."""
  from tensorboardX.proto.event_pb2 import Event

  found = {}
  for file in sorted(directory.iterdir()):
    data = file.read_bytes()
    while data:
      [length] = struct.unpack("<Q", data[:8])
      event = Event.FromString(data[12 : 12 + length])
      for value in event.summary.value:
        if value.HasField("simple_value"):
          found[value.tag, event.step] = value.simple_value
      data = data[16 + length :]
  return found


@pytest.mark.slow
def test_trackio_has_the_values(run_dir):
  from trackio.sqlite_storage import SQLiteStorage

  digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]  # earlier sessions may have logged there too
  [name] = [name for name in SQLiteStorage.get_runs("agree") if name == f"run-{digest}"]
  logs = SQLiteStorage.get_logs("agree", name)
  found = {(key, log["step"]): value for log in logs for key, value in log.items() if "/" in key}
  assert found == expected(run_dir)


@pytest.mark.slow
def test_mlflow_has_the_values(run_dir):
  from mlflow import MlflowClient

  client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
  [run] = client.search_runs([client.get_experiment_by_name("agree").experiment_id])
  names = {name for name, _ in expected(run_dir)}
  found = {(name, metric.step): metric.value for name in names
           for metric in client.get_metric_history(run.info.run_id, name)}
  assert found == expected(run_dir)
  assert run.data.params["lora.rank"] == "8" and run.data.tags["status"] == "done" and run.info.status == "FINISHED"


def test_an_unknown_logger_names_those_that_exist():
  with pytest.raises(InputError, match=r"logger.name=tensorbord: choose mlflow, .*did you mean tensorboard"):
    check_command_line(["logger.name=[wandb,tensorbord]"])


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, capsys):
  from lora_exp.config.schema import LoggerConfig
  from lora_exp.train.background_logger import make_logger, wait_for

  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  log = make_logger(LoggerConfig(name=["tensorboard"]), tmp_path, "run", {})
  wait_for([log])
  warning = capsys.readouterr().err
  assert "pip install 'lora_exp[tensorboard]'" in warning and "training continues" in warning
