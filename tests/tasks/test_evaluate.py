"""`task=evaluate`: a run against its base, on its own data or on other data, and a base alone."""

import json
import math

import pytest
from runs import TINY, on_stories, rows, stories, story, train

from lora_exp.cli import main as entry


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("evaluate")
  return train(directory / "run", *TINY, *on_stories(directory), "train.steps=6", "optim.lr=0.02", "train.eval_every=0",
               "train.save_every=0", "train.eval_tokens=null", "train.export=last", "train.batch_size=2")


def lines(run) -> list[dict]:
  return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_a_run_is_scored_against_its_base(run, capfd):
  assert entry.run(["task=evaluate", f"run={run}"]) == 0
  said = capfd.readouterr().out
  base, lora = lines(run)[-2:]
  for score, row in ((base, rows(run, "eval")[0]), (lora, rows(run, "eval")[-1])):
    assert score["loss"] == pytest.approx(row["loss"], rel=1e-5) and score["tokens"] == row["counted"]
    assert score["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-5)
    assert f"{score['loss']:.4g}" in said
    # A token is a byte, and the end of each of six documents none.
    nats_per_byte = score["loss"] * score["tokens"] / (score["tokens"] - 6)
    assert score["bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2))
    assert score["bits_per_byte"] == row["bits_per_byte"]
  assert (base["model"], lora["model"]) == ("base", "lora")
  assert lora["above_base"] == pytest.approx(lora["loss"] - base["loss"]) and lora["above_base"] < 0
  assert 0 < lora["standard_error"] < abs(lora["above_base"])
  assert lora["against_base"]["loss"] == {"difference": lora["above_base"], "standard_error": lora["standard_error"]}
  assert lora["standard_errors"].keys() == lora["against_base"].keys() >= {"loss", "perplexity", "accuracy"}
  assert f"{-lora['above_base']:.4f} ± " in said and "below the base" in said


def test_other_data_can_be_named(run, tmp_path):
  file = stories(tmp_path / "other.txt", count=20)
  argv = ["task=evaluate", f"run={run}", "data=text", f"data.path={file}"]
  assert entry.run(argv) == 0
  assert lines(run)[-1]["data"]["path"] == str(file) and lines(run)[-1]["tokens"] < lines(run)[0]["tokens"]
  assert entry.run([*argv, f"data.eval_path={file}"]) == 0  # every document of it
  ends = 2 * 19  # newlines around the separators; a document's first byte is not predicted, its end is
  assert lines(run)[-1]["tokens"] == sum(len(story(i)) for i in range(20)) + ends


def test_a_base_alone_is_scored_and_writes_nothing(run, in_tmp_path, capfd):
  entry.run(["task=evaluate", f"run={run}"])
  file = on_stories(run.parent)
  before = lines(run)
  capfd.readouterr()
  assert entry.run(["task=evaluate", *TINY, *file, "train.eval_tokens=null"]) == 0
  said = capfd.readouterr().out
  assert f"{before[-2]['loss']:.4g}" in said and "lora" not in said and "Trained against base" not in said
  assert list(in_tmp_path.iterdir()) == [] and lines(run) == before
