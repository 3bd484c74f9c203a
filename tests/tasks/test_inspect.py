"""`task=inspect` of runs of every method and of a sweep."""

import csv
import json
import shutil

import numpy as np
import pytest
from runs import TINY, train

from lora_exp.cli import main as entry
from lora_exp.config import InputError
from lora_exp.report.reading.adapter_updates import read_updates
from lora_exp.report.reading.inspect_file import read_inspection, weights_digest
from lora_exp.report.reading.run_reader import read_sweep

SMALL = [*TINY, "train=quick", "train.steps=4", "train.eval_every=4", "data=sentences"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A real sweep: two ranks with two seeds, and both reference lines."""
  directory = tmp_path_factory.mktemp("swept") / "sweep"
  argv = ["-m", *SMALL, "lora.rank=2,4", "train.seed=0,1", "hydra.sweeper.extra=[{lora: frozen}, {lora: full}]",
          "hydra/launcher=packed", f"hydra.sweep.dir={directory}"]
  assert entry.run(argv) == 0
  return directory


def table(directory):
  with open(directory / "results.csv", newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_run_is_inspected(swept, capfd):
  run = swept / "2"
  assert entry.run(["task=inspect", f"run={run}"]) == 0
  shown = capfd.readouterr().out
  assert "blocks.0.linear1" in shown and "directions are used on average" in shown and "Intruders: of the 10" in shown
  found = json.loads((run / "inspect.json").read_text())
  assert (run / "plots" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
  [trial_] = [a for a in read_sweep(swept) if a.path == "2"]
  read = read_updates(run, trial_)
  assert [row["module"] for row in found["modules"]] == list(read) and found["weights"] == weights_digest(run)
  for row in found["modules"]:
    assert row["singular_values"] == pytest.approx(read[row["module"]].svd[1], rel=1e-4, abs=1e-9)
    assert row["relative_norm"] > 0 and row["amplification"] > 0 and 0 <= row["intruders"] <= 10
  assert found["mean"]["effective_rank"] == pytest.approx(np.mean([r["effective_rank"] for r in found["modules"]]),
                                                          rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [["lora=dora"], ["lora=pissa"], ["lora=vera", "lora.rank=16"],
                                    ["lora=adalora", "lora.budget=2"], ["lora=rslora", "lora.targets=token_emb"]])
def test_run_of_every_method_is_inspected(tmp_path, method):
  run = train(tmp_path / "sweep" / "0", *SMALL, "lora.rank=4", *method)
  assert entry.run(["task=inspect", f"run={run}"]) == 0
  read = read_updates(run, read_sweep(run.parent)[0])
  rows = json.loads((run / "inspect.json").read_text())["modules"]
  assert [row["module"] for row in rows] == list(read)
  for row in rows:
    assert row["rank"] == read[row["module"]].rank and row["norm"] > 0 and row["amplification"] > 0
    assert row["singular_values"] == pytest.approx(read[row["module"]].svd[1], rel=1e-4, abs=1e-9)


@pytest.mark.slow
def test_full_fine_tuning_is_kernels_minus_base(swept):
  run = swept / "5"
  assert entry.run(["task=inspect", f"run={run}"]) == 0
  from lora_exp.models.weights import store
  from lora_exp.runtime.mesh import flatten
  from lora_exp.runtime.saved_config import load_config
  from lora_exp.train.base import make_base
  from lora_exp.train.loaded_run import plan_of

  plan = plan_of(load_config(str(swept / "4")))
  base = flatten(make_base(plan)[0])
  tuned = flatten(store.load(run / store.FILE, plan.base, plan.layout.shardings(plan.base)))
  rows = {row["module"]: row for row in json.loads((run / "inspect.json").read_text())["modules"]}
  for path, name in (("blocks.0.linear1", "kernel"), ("token_emb", "embedding")):
    update = np.asarray(tuned[f"{path}.{name}"], np.float64) - np.asarray(base[f"{path}.{name}"], np.float64)
    wanted = np.linalg.svd(update, compute_uv=False)
    assert rows[path]["singular_values"] == pytest.approx(wanted, rel=1e-4, abs=1e-6 * wanted[0])
    assert rows[path]["amplification"] is None and rows[path]["rank"] == min(update.shape)


@pytest.mark.slow
def test_sweep_is_inspected_and_reported(swept, capfd):
  assert "effective rank" in (swept / "report.html").read_text()  # by itself, when the sweep ended
  before = table(swept)
  full = next(row for row in before if row["method"] == "full")
  assert before[0]["effective_rank"] and not before[0]["amplification"]
  (swept / "5" / "inspect.json").unlink(missing_ok=True)
  assert entry.run(["task=inspect", f"run={swept}"]) == 0
  shown = capfd.readouterr().out
  assert "what the adapters learned" in shown and "Used rank:" in shown and "amplification" in shown
  assert {path.parent.name for path in swept.glob("*/inspect.json")} == {"0", "1", "2", "3", "5"}
  after = table(swept)
  assert [row["effective_rank"] for row in after[:4]] == [row["effective_rank"] for row in before[:4]]
  assert all(row["amplification"] and row["intruders"] for row in after[:4])
  [full] = [row for row in after if row["method"] == "full"]
  assert float(full["effective_rank"]) > 4 and not full["amplification"]
  assert "amplification" in (swept / "report.html").read_text()
  assert {"spectrum.png", "overlap.png"} <= {path.name for path in (swept / "plots").iterdir()}


@pytest.mark.slow
def test_inspection_of_other_weights_is_not_reported(swept, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(swept / "0", run, ignore=shutil.ignore_patterns("checkpoints", "wandb"))
  (run / "inspect.json").write_text(json.dumps({"weights": "others", "modules": []}))
  assert not read_inspection(run)
  assert entry.run(["task=inspect", f"run={run}"]) == 0
  assert len(read_inspection(run)) == 6
  (run / "adapter" / "adapter_model.safetensors").write_bytes(b"another")
  assert not read_inspection(run)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "words"), [
  ("4", "lora=frozen trained nothing; there is no ΔW to inspect"),
  ("nowhere", "no such directory"),
  ("0/plots", "contains no run"),
  (None, "task=inspect needs a run or a sweep to inspect"),
])
def test_run_without_an_update_is_an_input_error(swept, capfd, run, words):
  argv = ["task=inspect"] + ([f"run={swept / run}"] if run else [])
  assert entry.run(argv) == InputError.code == 2
  assert words in capfd.readouterr().err
