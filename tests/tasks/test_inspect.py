"""What adapters learned: the figures are those of ΔW formed whole, and planted structure is found, no more."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from adapters import KINDS, adapter
from flax import nnx
from packs import quickly
from runs import TINY, train

import lora_exp
from lora_exp import lora
from lora_exp.cli import main as entry
from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.resize import update_svd
from lora_exp.report.grouping.learned_updates import learn_updates
from lora_exp.report.reading.adapter_updates import read_updates
from lora_exp.report.reading.inspect_file import read_inspection, weights_digest
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.sweep_report import make_report
from lora_exp.runtime import spectrum
from lora_exp.runtime.spectrum import output_side, thin_svd, update_spectrum, whole_svd
from sweeps import trial

RNG = np.random.default_rng(0)


def orthonormal(n: int, k: int, seed: int = 0) -> np.ndarray:
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0]


# ---- the mathematics


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "our own vera of a table"])
def test_singular_values_of_every_method_are_those_of_the_update_formed_whole(tmp_path, kind):
  made, naming, metadata = KINDS[kind]
  lora.save_adapter(tmp_path / "adapter", made, naming, metadata)
  read = read_updates(tmp_path, RunRecord(0, "0", "done", summary={"targets": [asdict(row) for row in made.rows]}))
  assert list(read) == [row.path for row in made.rows]
  for row in made.rows:
    whole = made.update_IO(row.path)
    wanted = np.linalg.svd(np.asarray(whole, np.float64), compute_uv=False)
    for sigma in (read[row.path].svd[1], update_svd(made.kind, made.leaves[row.path], row.scale)[1]):
      assert len(sigma) <= len(wanted) and wanted[len(sigma):] == pytest.approx(0, abs=1e-5 * wanted[0])
      assert sigma == pytest.approx(wanted[: len(sigma)], abs=1e-5 * wanted[0])
    assert read[row.path].rank == row.rank


def test_adalora_is_read_without_what_was_pruned(tmp_path):
  made = adapter("adalora", {"layers.1.self_attn.q_proj": 3, "layers.1.mlp.down_proj": 1})
  lora.save_adapter(tmp_path / "adapter", made, None, {})
  summary = {"targets": [asdict(row) for row in made.rows]}
  kept_ranks = {"layers.1.self_attn.q_proj": 2, "layers.1.mlp.down_proj": 0}
  read = read_updates(tmp_path, RunRecord(0, "0", "done", summary=summary | {"kept_ranks": kept_ranks}))
  assert {path: update.rank for path, update in read.items()} == {"layers.1.self_attn.q_proj": 2}
  with pytest.raises(ValueError, match=r"has no A and B of layers\.1\.mlp\.down_proj"):
    read_updates(tmp_path, RunRecord(0, "0", "done", summary=summary))


class Kinds(nnx.Module):
  """A kernel of each shape: plain, of several axes, a stack."""

  def __init__(self, rngs: nnx.Rngs):
    self.plain = nnx.Linear(12, 7, rngs=rngs)
    self.heads = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
    self.each = nnx.LinearGeneral((4,), (5,), axis=-1, batch_axis={0: 3}, rngs=rngs)
    self.stack = nnx.vmap(lambda key: nnx.Linear(6, 5, rngs=nnx.Rngs(key)))(jnp.stack([rngs.params()] * 2))


def test_kernels_of_every_shape_have_the_figures_of_their_matrices():
  with quickly():
    model = Kinds(nnx.Rngs(0))
    rows = [lora.AdaptedModule(path, *lora.kernel_shape(module), 3, 6.0, 2.0) for path, module in lora.modules(model).items()]
    kernels = {path: np.asarray(w, np.float64) for path, w in lora.kernels_of(model, rows).items()}
  assert {path: w.ndim for path, w in kernels.items()} == {"plain": 2, "heads": 2, "each": 3, "stack": 3}
  for row in rows:
    w = kernels[row.path]
    own = {"lora_a": RNG.normal(size=(*w.shape[:-1], 3)), "lora_b": RNG.normal(size=(*w.shape[:-2], 3, w.shape[-1]))}
    u, sigma, vt = update_svd(methods.get("lora"), own, row.scale)
    whole = row.scale * own["lora_a"] @ own["lora_b"]
    np.testing.assert_allclose(u * sigma[..., None, :] @ vt, whole, atol=1e-12)
    told = update_spectrum(row.path, row.rank, sigma)
    each = whole.reshape(-1, *whole.shape[-2:])
    singular = np.linalg.svd(each, compute_uv=False)
    assert told.norm == pytest.approx(np.linalg.norm(each, axis=(1, 2)).mean(), rel=1e-5)
    assert told.stable_rank == pytest.approx(np.mean(np.square(singular).sum(-1) / singular[:, 0] ** 2), rel=1e-5)
    seen = np.linalg.norm(np.swapaxes(u, -1, -2) @ w @ np.swapaxes(vt, -1, -2), axis=(-2, -1))
    ours = spectrum.amplification((u, sigma, vt), w)
    assert ours == pytest.approx(np.linalg.norm(whole, axis=(-2, -1)) / seen)


@pytest.mark.parametrize(("sigma", "effective", "stable", "most"), [
  ([2.0, 2.0, 2.0, 2.0], 4, 4, 4),
  ([5.0, 0.0, 0.0], 1, 1, 1),
  ([3.0, 1.0], np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)), 10 / 9, 1),  # 9 of 10: just 90 %
  ([0.0, 0.0], 0, 0, 0),
])
def test_ranks_by_hand(sigma, effective, stable, most):
  told = update_spectrum("m", 4, np.array(sigma))
  assert (told.effective_rank, told.stable_rank) == pytest.approx((effective, stable), rel=1e-5)
  assert told.directions == most


def test_a_planted_rank_of_three_inside_rank_eight_is_found():
  a, b = RNG.normal(size=(40, 8)), RNG.normal(size=(8, 30))
  a[:, 3:], b[3:] = 0.0, 1e-9 * b[3:]
  _, sigma, _ = thin_svd(orthonormal(40, 3) @ orthonormal(8, 3).T, orthonormal(30, 8).T)
  told = update_spectrum("m", 8, sigma)
  assert (told.effective_rank, told.stable_rank, told.directions) == pytest.approx((3, 3, 3), rel=1e-5)
  assert told.energy_half == 1
  assert update_spectrum("m", 8, thin_svd(a, b)[1]).effective_rank < 3 and (thin_svd(a, b)[1] > 0).sum() == 3


def test_an_update_that_has_not_moved_is_none():
  a, b = RNG.normal(size=(20, 4)).astype(np.float32), RNG.normal(size=(4, 9)).astype(np.float32)
  svd = update_svd(methods.get("pissa"), {"lora_a": a, "lora_b": b, "start_a": a, "start_b": b}, 2.0)
  assert update_spectrum("m", 4, svd[1]).norm == 0 and np.isnan(spectrum.amplification(svd, RNG.normal(size=(20, 9))))


def test_overlap_is_that_of_the_paper_and_of_random_subspaces_what_chance_gives():
  u, v = orthonormal(24, 6), orthonormal(24, 9, seed=1)
  phi = spectrum.overlap(u, v)
  for i, j in ((1, 1), (4, 9), (6, 2)):
    wanted = np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)
    assert phi[i - 1, j - 1] == pytest.approx(wanted)
  same = spectrum.overlap(u, u)
  assert np.diag(same) == pytest.approx(1) and same[1, 5] == pytest.approx(1)
  draws = [spectrum.overlap(orthonormal(24, 6, s), orthonormal(24, 9, s + 1000))[-1, -1] for s in range(300)]
  error = np.std(draws) / np.sqrt(len(draws))
  assert spectrum.random_overlap(6, 9, 24) == 9 / 24 == pytest.approx(np.mean(draws), abs=4 * error)


def test_amplification_by_hand():
  (u, far_u), (v, far_v) = (np.split(orthonormal(n, 3), [2], axis=1) for n in (10, 8))
  w = 0.5 * np.outer(u[:, 0], v[:, 0]) + 7 * far_u @ far_v.T
  update = (u * [3.0, 4.0]) @ v.T  # ‖ΔW‖ = 5, and of W only 0.5 lies in its directions
  svd = thin_svd(u * [3.0, 4.0], v.T)
  assert spectrum.amplification(svd, w) == pytest.approx(10) and np.linalg.norm(update) == pytest.approx(5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_side_of_the_outputs_is_that_of_the_svd(shape):
  w = RNG.normal(size=(2, *shape))
  _, wanted, vt = whole_svd(w)
  sigma, v = output_side(w)
  assert sigma == pytest.approx(wanted, rel=1e-8)
  assert np.abs((np.swapaxes(v, -1, -2) * vt).sum(-1)) == pytest.approx(1)
  np.testing.assert_array_equal(output_side(w, 4)[1], v[..., :4])


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_an_intruder_is_found_and_a_small_update_along_w_has_none(shape):
  u, v = orthonormal(shape[0], 30), orthonormal(shape[1], 30, seed=1)
  size = np.linspace(3, 1, 30)
  w = (u * size) @ v.T
  own = output_side(w)[1]
  count = lambda update: int(spectrum.intruders(own, output_side(w + update, spectrum.EXAMINED)[1]))
  new = np.linalg.qr(np.concatenate([v, RNG.normal(size=(shape[1], 2))], 1))[0][:, 30:]  # outputs that W never writes
  assert count(6 * np.outer(u[:, 5], new[:, 0]) + 5 * np.outer(u[:, 9], new[:, 1])) == 2
  assert count((u[:, :4] * 0.3) @ v[:, :4].T) == 0 == count(0.01 * RNG.normal(size=shape))
  assert count(np.outer(u[:, 5], 1e-3 * new[:, 0])) == 0
  spread = v @ np.full((30, 1), 1 / np.sqrt(30))  # near no single direction of W, though within them
  assert count(20 * np.outer(u[:, 0], spread)) == 1


# ---- the command

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


@pytest.mark.thorough
def test_a_run_is_looked_into(swept, capfd):
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
def test_a_run_of_every_method_is_looked_into(tmp_path, method):
  run = train(tmp_path / "sweep" / "0", *SMALL, "lora.rank=4", *method)
  assert entry.run(["task=inspect", f"run={run}"]) == 0
  read = read_updates(run, read_sweep(run.parent)[0])
  rows = json.loads((run / "inspect.json").read_text())["modules"]
  assert [row["module"] for row in rows] == list(read)
  for row in rows:
    assert row["rank"] == read[row["module"]].rank and row["norm"] > 0 and row["amplification"] > 0
    assert row["singular_values"] == pytest.approx(read[row["module"]].svd[1], rel=1e-4, abs=1e-9)


@pytest.mark.thorough
def test_full_fine_tuning_is_the_difference_of_its_kernels_from_the_base(swept):
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


@pytest.mark.thorough
def test_a_sweep_is_looked_into_and_its_report_says_so(swept, capfd):
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


@pytest.mark.thorough
def test_what_was_seen_of_other_weights_is_not_reported(swept, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(swept / "0", run, ignore=shutil.ignore_patterns("checkpoints", "wandb"))
  (run / "inspect.json").write_text(json.dumps({"weights": "others", "modules": []}))
  assert not read_inspection(run)
  assert entry.run(["task=inspect", f"run={run}"]) == 0
  assert len(read_inspection(run)) == 6
  (run / "adapter" / "adapter_model.safetensors").write_bytes(b"another")
  assert not read_inspection(run)


@pytest.mark.thorough
@pytest.mark.parametrize(("run", "words"), [
  ("4", "lora=frozen trained nothing; there is no ΔW to look into"),
  ("nowhere", "no such directory"),
  ("0/plots", "holds no run"),
  (None, "task=inspect looks into a run, or every run of a sweep"),
])
def test_what_cannot_be_looked_into_is_refused_in_a_sentence(swept, capfd, run, words):
  argv = ["task=inspect"] + ([f"run={swept / run}"] if run else [])
  assert entry.run(argv) == InputError.code == 2
  assert words in capfd.readouterr().err


# ---- the report


def planted(directory, number, basis, rank, seed):
  """A trial whose one module has an update in the first three directions of `basis`, whatever its rank."""
  rows = (lora.AdaptedModule("a", 40, 30, rank, 2.0 * rank, 2.0),)
  path = trial(directory, number, 2.0, lora__rank=rank, train__seed=seed, change={"targets": [asdict(rows[0])]})
  k = min(3, rank)
  a = orthonormal(40, rank, seed=100 + number)
  b = orthonormal(rank, k, seed) @ basis[:, :k].T
  leaves = {"a": {"lora_a": a.astype(np.float32), "lora_b": b.astype(np.float32)}}
  lora.save_adapter(path / "adapter", lora.Adapter("lora", rows, leaves), None, {})
  return path


@pytest.fixture
def known(tmp_path):
  """Ranks 2, 4 and 8 of three seeds whose updates lie in the same three output directions, and random inputs."""
  directory, basis = tmp_path / "known", orthonormal(30, 3)
  for n, (rank, seed) in enumerate((r, s) for r in (2, 4, 8) for s in range(3)):
    planted(directory, n, basis, rank, seed)
  return directory


def test_the_report_finds_the_planted_rank_and_what_the_seeds_share(known):
  report = make_report(known)
  [part] = report.sections
  rows = {row["number"]: row for row in table(known)}
  assert [float(rows[n]["effective_rank"]) for n in ("0", "3", "8")] == pytest.approx([2, 3, 3], rel=1e-5)
  [found] = [f for f in part.findings if f.topic == "Used rank"]
  assert found.concluded and found.values["rank"] == 8 and found.values["effective_rank"] == pytest.approx(3, rel=1e-5)
  assert "Of rank 8, 3.0 ± 0.0 directions are used on average" in found.text and "2.0, 3.0, 3.0" in found.text
  overlap = learn_updates(known, part.group).overlap(part.group.settings[-1])
  assert overlap.outputs == pytest.approx(1) and overlap.outputs_random == pytest.approx(3 / 30)
  assert overlap.inputs < 0.3 and overlap.inputs_random == pytest.approx(3 / 40)
  assert [plot.file.name for plot in part.updates.plots] == ["spectrum.png", "overlap.png"]
  page, notes = (known / "report.html").read_text(), (known / "report.md").read_text()
  assert "What the adapters learned" in page and "1.00 (0.10)" in page and "plots/spectrum.png" in notes


def test_a_damaged_adapter_is_told_and_the_others_are_read(known):
  file = known / "4" / "adapter" / "adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:-40])
  report = make_report(known)
  [told] = report.sections[0].updates.unread
  assert told.startswith("Not read: trial 4: adapter/adapter_model.safetensors cannot be read")
  assert "Not read: trial 4" in (known / "report.html").read_text()
  rows = {row["number"]: row for row in table(known)}
  assert rows["4"]["effective_rank"] == "" and float(rows["5"]["effective_rank"]) == pytest.approx(3, rel=1e-5)


def test_copied_files_are_reported_where_there_is_no_jax(known, tmp_path):
  script = ("import sys; sys.modules.update(jax=None, flax=None); from pathlib import Path; "
            f"from lora_exp.report.sweep_report import make_report; make_report(Path({str(known)!r}))")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
                        env={"PYTHONPATH": str(Path(lora_exp.__file__).parents[1]), "HOME": str(tmp_path)})
  assert done.returncode == 0, done.stderr
  assert "What the adapters learned" in (known / "report.html").read_text()


def test_trials_without_adapters_have_no_section(tmp_path):
  trial(tmp_path, 0, 2.0)
  report = make_report(tmp_path)
  assert report.sections[0].updates is None
  assert "What the adapters learned" not in (tmp_path / "report.html").read_text()
