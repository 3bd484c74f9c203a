"""A run is scored on the report half of its held-out documents; runs without halves on all of them."""

import numpy as np
import pytest
from reports import read_results

from lora_exp.report.page.compared import compared
from lora_exp.report.reading.run_reader import read_run, read_sweep
from lora_exp.report.sweep_report import make_table
from sweeps import trial

HALVES = {
  "tuning": {"base": {"loss": 3.1, "accuracy": 0.1}, "exported": {"loss": 2.1, "accuracy": 0.3}},
  "report": {"base": {"loss": 2.9, "accuracy": 0.2}, "exported": {"loss": 2.2, "accuracy": 0.4}},
}
TOKENS = np.array([3, 1, 2])
HALF = np.array([0, 1, 1], np.uint8)
NATS = np.array([[9.0, 3.0, 6.0], [6.0, 2.0, 5.0], [8.0, 4.0, 4.0]], np.float32)


def _run(directory, change=None, steps=(0, 16, 32), nats=NATS, half=HALF, **settings):
  path = trial(directory, 0, 2.0, change=change, **settings)
  np.savez_compressed(path / "held_out.npz", steps=np.array(steps), nats=nats, tokens=TOKENS, half=half)
  return read_run(0, path)


def test_a_run_with_halves_is_scored_on_the_report_half(tmp_path):
  run = _run(tmp_path, {"halves": HALVES})
  assert (run.base("loss"), run.result("loss"), run.tuning_result("loss")) == (2.9, 2.2, 2.1)
  assert (run.base("accuracy"), run.result("accuracy"), run.tuning_result("accuracy")) == (0.2, 0.4, 0.3)
  assert not run.scores_share_choice and run.base_loss == 3.0
  make_table(tmp_path)
  [row] = read_results(tmp_path)
  assert [row[name] for name in ("loss", "loss_base", "loss_tuning", "loss_best")] == ["2.2", "2.9", "2.1", "2.0"]
  assert float(row["gain"]) == 2.9 - 2.2


def test_the_page_says_how_many_tokens_score(tmp_path):
  run = _run(tmp_path, {"halves": HALVES, "held_out_tokens": 6})
  told = "6 tokens: 3 score the trials, the others choose the best step and tuned values"
  assert dict(compared(tmp_path, [run]))["Held out"] == told
  (tmp_path / "0" / "held_out.npz").unlink()
  assert dict(compared(tmp_path, read_sweep(tmp_path)))["Held out"].startswith("6 tokens: one half scores the trials")
  whole = trial(tmp_path, 1, 2.0, change={"held_out_tokens": 6})
  assert dict(compared(tmp_path, [read_run(1, whole)]))["Held out"] == "6 tokens"


def test_a_run_without_halves_is_scored_on_all_documents(tmp_path):
  trial(tmp_path, 0, 2.0)
  [run] = read_sweep(tmp_path)
  assert (run.base("loss"), run.result("loss"), run.tuning_result("loss")) == (3.0, 2.0, 2.0)
  assert run.scores_share_choice and run.documents == {}


def test_a_metric_missing_in_the_halves_is_of_all_documents(tmp_path):
  scores = {"base": {"exact": 0.0}, "best": {"exact": 0.5}}
  run = _run(tmp_path, {"halves": HALVES, "scores": scores})
  assert (run.base("exact"), run.result("exact"), run.tuning_result("exact")) == (0.0, 0.5, 0.5)


def test_a_frozen_base_is_scored_on_the_report_half(tmp_path):
  halves = {half: {"base": scores["base"]} for half, scores in HALVES.items()}
  run = _run(tmp_path, {"halves": halves}, lora__method="frozen")
  assert (run.result("loss"), run.tuning_result("loss"), run.documents["loss"].exported.tolist()) == (2.9, 3.1, [3, 6])


def test_only_a_run_that_is_done_has_results(tmp_path):
  run = _run(tmp_path, {"halves": HALVES}, status="diverged")
  assert run.result("loss") is run.tuning_result("loss") is None
  assert run.documents == {} and run.exported("loss") == 2.2


@pytest.mark.parametrize("step, expected", [(16, [2, 5]), (32, [4, 4])])
def test_documents_are_of_the_exported_step_and_report_half(tmp_path, step, expected):
  run = _run(tmp_path, {"losses": {"base": 3.0, "best": 2.0, "best_step": 16, "exported_step": step}})
  assert run.documents["loss"].base.tolist() == [3, 6] and run.documents["loss"].exported.tolist() == expected
  assert run.documents["loss"].tokens.tolist() == [1, 2]


def test_documents_without_a_split_all_score_the_run(tmp_path):
  run = _run(tmp_path, half=np.zeros(3, np.uint8))
  assert run.documents["loss"].exported.tolist() == [8, 4, 4] and run.documents["loss"].tokens.tolist() == [3, 1, 2]


@pytest.mark.parametrize("change, problem", [
  ({"steps": (0, 16, 31)}, "has no evaluation at step 0 or step 32"),
  ({"nats": NATS[:, :2]}, "has arrays that do not match"),
  ({"half": np.array(["a", "b", "c"])}, "has arrays that do not match"),
])
def test_a_held_out_file_that_does_not_fit_is_named(tmp_path, change, problem):
  run = _run(tmp_path, **change)
  assert run.documents == {} and run.reason == f"held_out.npz {problem}" and run.result("loss") == 2.0


def test_a_single_document_has_no_spread(tmp_path):
  run = _run(tmp_path, half=np.array([0, 0, 1], np.uint8))
  assert run.documents == {} and run.reason is None


@pytest.mark.parametrize("cut", [0, 1, 0.5, 0.99])
def test_a_truncated_held_out_file_is_named(tmp_path, cut):
  _run(tmp_path)
  path = tmp_path / "0" / "held_out.npz"
  content = path.read_bytes()
  path.write_bytes(content[: int(cut * len(content)) if cut < 1 else cut])
  run = read_run(0, tmp_path / "0")
  assert run.documents == {} and "held_out.npz cannot be read" in run.reason
