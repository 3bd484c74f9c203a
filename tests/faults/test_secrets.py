"""A secret in the environment, a config or the command line is found in no output of the program."""

import json
from pathlib import Path

import pytest
from runs import TINY, stories

from lora_exp.cli import main as entry
from lora_exp.config.credentials import without_secrets

SECRETS = {"HF_TOKEN": "hf_" + "pLanted7" * 4, "WANDB_API_KEY": "5ec4e7" + "0a1b2c3d" * 4 + "ff",
           "MY_SERVICE_PASSWORD": "correct-horse-battery", "AWS_SECRET_ACCESS_KEY": "wJalr/planted+KEY9"}
URL_PASSWORD = "pw-in-the-url-77"
PLANTED = [*SECRETS.values(), URL_PASSWORD]
TYPED = ["name={}", "logger.group={}", "prompt=a-{}", "logger.tags=[{}]", "hydra.job.name={}", "hydra.run.dir=out/{}"]


@pytest.fixture(autouse=True)
def planted(monkeypatch, in_tmp_path):
  for name, value in SECRETS.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{URL_PASSWORD}@127.0.0.1:9")


def assert_absent(folder: Path, *texts: str) -> None:
  """No file below `folder`, no name of one and none of `texts` has a planted secret."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  for secret in PLANTED:
    assert not any(secret in text for text in texts)
    assert [path for path in files if secret in str(path) or secret.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("override", TYPED)
def test_a_typed_secret_is_refused_and_not_repeated(override, in_tmp_path, capfd):
  for secret in (SECRETS["MY_SERVICE_PASSWORD"], f"http://me:{URL_PASSWORD}@host/x"):
    assert entry.run([override.format(f'"{secret}"'), *TINY]) == 2
  assert entry.run([override.format("${oc.env:MY_SERVICE_PASSWORD}"), *TINY]) == 2
  assert_absent(in_tmp_path, *capfd.readouterr())


SHOWN = [[], ["--cfg", "job"], ["--cfg", "job", "--resolve"], ["--cfg", "all"], ["--info", "config"]]


@pytest.mark.parametrize("show", SHOWN)
def test_a_secret_in_a_config_file_is_refused(show, in_tmp_path, capfd):
  (in_tmp_path / "conf").mkdir()
  for content in (f"name: {SECRETS['MY_SERVICE_PASSWORD']}", "name: ${oc.env:HF_TOKEN}", "name: ${oc.env:${task}}",
                  "hydra: {job: {env_copy: [HF_TOKEN]}}"):
    (in_tmp_path / "conf" / "mine.yaml").write_text(f"defaults: [config, _self_]\n{content}\n")
    assert entry.run(["--config-dir", "conf", "--config-name", "mine", *show]) == 2
  (in_tmp_path / "conf" / "mine.yaml").unlink()
  assert_absent(in_tmp_path, *capfd.readouterr())


@pytest.mark.slow
def test_no_file_of_a_run_has_a_secret(in_tmp_path, capfd):
  run = in_tmp_path / "run"
  argv = [*TINY, "logger.name=[wandb,tensorboard,mlflow]", "data=text", f"data.path={stories(in_tmp_path / 'a.txt')}",
          "train.steps=2", "train.save_every=1"]
  assert entry.run([*argv, "lora.rank=1", f"hydra.run.dir={run}", "train.stop_at=1"]) == 75
  assert entry.run([f"train.resume={run}"]) == 0
  for task in (["task=evaluate"], ["task=generate", "prompt=the"], ["task=export", "out=exported", "push=me/model"]):
    entry.run([*task, f"run={run}"])
  entry.run(["--cfg", "job", *argv])
  assert (run / "summary.json").is_file() and json.loads((run / "summary.json").read_text())["status"] == "done"
  assert_absent(in_tmp_path, *capfd.readouterr())


def test_messages_of_libraries_are_told_without_secrets():
  said = f"401 for https://me:{URL_PASSWORD}@host/api with {SECRETS['HF_TOKEN']} and {SECRETS['MY_SERVICE_PASSWORD']}"
  assert without_secrets(said) == "401 for https[hidden]host/api with [hidden] and [hidden]".replace(
    "https[hidden]host", "https://[hidden]@host")
