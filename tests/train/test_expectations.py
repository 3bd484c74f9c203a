"""Expectations of experiments: measured values, results in summary.json, and the exit code of a failed one."""

from pathlib import Path

import pytest
import runs

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError
from lora_exp.config.checks import EXPECTATIONS
from lora_exp.train.expectations import EXPECTATIONS as MEASURED
from lora_exp.train.expectations import Expectation

PAIRS = ["data=arithmetic", "data.limit=40", "train=quick", "train.steps=4", "train.eval_every=2"]


def test_the_checks_know_every_expectation():
  assert sorted(EXPECTATIONS) == sorted(MEASURED)
  with pytest.raises(InputError, match=r"expectations.trainible: choose .*did you mean trainable\?"):
    check_command_line(["expectations={trainible:3}"])


RELATIONS = [("=", [2], [1, 3]), ("≥", [1, 2], [3]), ("≤", [2, 3], [1])]


@pytest.mark.parametrize(("relation", "holding", "failing"), RELATIONS)
def test_an_expectation_holds_as_its_relation_says(relation, holding, failing):
  expectation = Expectation("", relation, lambda run: 2)
  assert all(expectation.holds(2, x) for x in holding)
  assert not any(expectation.holds(2, x) for x in failing)
  assert not expectation.holds(None, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run with every expectation that holds for it."""
  expected = {"trainable": 8 * 4 * 32 * 2 + 8 * 2 * 32 * 2, "adapter_bytes": 20000, "loss_falls": 0.001, "accuracy": 0,
              "exact": 0, "base_changed": 0, "merged_differs": 1e-5, "off_differs": 1e-5}
  typed = ",".join(f"{name}:{value}" for name, value in expected.items())
  directory = tmp_path_factory.mktemp("expectations") / "run"
  return runs.train(directory, *runs.TINY, *PAIRS, "lora.compute=factored", f"expectations={{{typed}}}")


def test_results_are_in_the_summary(run):
  results = runs.summary(run)["expectations"]
  assert len(results) == 8 and all(result["holds"] for result in results.values())
  assert results["adapter_bytes"]["found"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
  assert 0 < results["merged_differs"]["found"] <= 1e-5, "a merged kernel rounds otherwise"


def test_a_failed_expectation_is_named_and_the_run_stays(tmp_path, capsys):
  run = runs.train(tmp_path / "run", *runs.TINY, *PAIRS, "expectations={total:7,off_differs:1e-5}", code=1)
  assert "1 of 2 expectations do not hold: total" in "".join(capsys.readouterr())
  found = runs.summary(run)
  assert (found["status"], found["expectations"]["total"]["holds"]) == ("done", False)
  assert found["expectations"]["off_differs"]["holds"]
  assert found["expectations"]["total"]["found"] == found["parameters"]["total"]
  assert (run / "adapter").is_dir()
