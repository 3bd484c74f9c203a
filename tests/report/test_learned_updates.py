"""What adapters learned is read from their files, and planted structure is found."""

import csv
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from adapters import KINDS, adapter

import lora_exp
from lora_exp import lora
from lora_exp.lora.resizing import update_svd
from lora_exp.report.findings.used_rank import used_rank
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.grouping.learned_updates import learn_updates
from lora_exp.report.reading.adapter_updates import read_updates
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.sweep_report import make_report
from sweeps import trial

RNG = np.random.default_rng(0)


def orthonormal(n: int, k: int, seed: int = 0) -> np.ndarray:
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "our own vera of a table"])
def test_updates_are_read_for_every_method(tmp_path, kind):
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


def test_adalora_is_read_without_pruned_modules(tmp_path):
  made = adapter("adalora", {"layers.1.self_attn.q_proj": 3, "layers.1.mlp.down_proj": 1})
  lora.save_adapter(tmp_path / "adapter", made, None, {})
  summary = {"targets": [asdict(row) for row in made.rows]}
  kept_ranks = {"layers.1.self_attn.q_proj": 2, "layers.1.mlp.down_proj": 0}
  read = read_updates(tmp_path, RunRecord(0, "0", "done", summary=summary | {"kept_ranks": kept_ranks}))
  assert {path: update.rank for path, update in read.items()} == {"layers.1.self_attn.q_proj": 2}
  with pytest.raises(ValueError, match=r"has no A and B of layers\.1\.mlp\.down_proj"):
    read_updates(tmp_path, RunRecord(0, "0", "done", summary=summary))


def table(directory):
  with open(directory / "results.csv", newline="") as file:
    return list(csv.DictReader(file))


def planted(directory, number, basis, rank, seed):
  """A trial whose one module has an update in the first three directions of `basis`, whatever its rank."""
  rows = (lora.AdaptedModule("a", 40, 30, rank, 16.0, 16.0 / rank),)
  path = trial(directory, number, 2.0 + 0.001 * seed, lora__rank=rank, train__seed=seed,
               change={"targets": [asdict(rows[0])]})
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


def test_report_finds_the_planted_rank_and_seed_overlap(known):
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


def test_a_rank_that_does_not_bound_the_update_is_no_whole(known):
  """As with LoHa: task=inspect found more directions than lora.rank."""
  [group] = make_groups(read_sweep(known))
  updates = learn_updates(known, group)
  for spectra in updates.spectra.values():
    spectra[:] = [replace(s, singular_values=[1.0] * 20, effective_rank=19.0) for s in spectra]
  [found] = used_rank(group, updates)
  assert found.text.startswith("With lora.rank=8, which does not bound the rank of ΔW here, 19.0 ± 0.0 directions")
  assert "%" not in found.text.split("directions")[1].split(",")[0]


def test_damaged_adapter_is_named_and_others_are_read(known):
  file = known / "4" / "adapter" / "adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:-40])
  report = make_report(known)
  [told] = report.sections[0].updates.unread
  assert told.startswith("Not read: trial 4: adapter/adapter_model.safetensors cannot be read")
  assert "Not read: trial 4" in (known / "report.html").read_text()
  rows = {row["number"]: row for row in table(known)}
  assert rows["4"]["effective_rank"] == "" and float(rows["5"]["effective_rank"]) == pytest.approx(3, rel=1e-5)


def test_report_of_copied_files_needs_no_jax(known, tmp_path):
  script = ("import sys; sys.modules.update(jax=None, flax=None); from pathlib import Path; "
            f"from lora_exp.report.sweep_report import make_report; make_report(Path({str(known)!r}))")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
                        env={"PYTHONPATH": str(Path(lora_exp.__file__).parents[1]), "HOME": str(tmp_path)})
  assert done.returncode == 0, done.stderr
  assert "What the adapters learned" in (known / "report.html").read_text()


def test_runs_without_adapters_have_no_section(tmp_path):
  trial(tmp_path, 0, 2.0)
  report = make_report(tmp_path)
  assert report.sections[0].updates is None
  assert "What the adapters learned" not in (tmp_path / "report.html").read_text()
