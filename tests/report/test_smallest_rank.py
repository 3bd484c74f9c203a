"""The smallest sufficient rank is found where it was planted, and nowhere else."""

import json
import math
import re
import statistics

import pytest
from reports import findings_on, losses, read_results

from lora_exp.report.sweep_report import make_table
from sweeps import BASE, ranks, references, trial

T2 = 4.3027  # Student's t, 0.975, two degrees of freedom
PLATEAU = {1: 2.6, 2: 2.3, 4: 2.0, 8: 2.002, 16: 1.999}


def test_plateau_is_found_with_the_numbers_of_the_read_results(tmp_path):
  ranks(tmp_path, PLATEAU)
  references(tmp_path, 1.9, 15)
  make_table(tmp_path)
  rows = read_results(tmp_path)
  [found] = findings_on(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 4 and found.text.startswith("Rank 4 is enough")
  four, best, two = (losses(rows, rank=r, method="lora") for r in ("4", "16", "2"))
  assert f"{statistics.mean(four):.4f} ± {T2 * statistics.stdev(four) / math.sqrt(3):.4f}" in found.text
  for other, against in ((four, best), (two, best)):
    pairs = [a - b for a, b in zip(other, against, strict=True)]
    half = T2 * statistics.stdev(pairs) / math.sqrt(3)
    told = re.search(rf"{re.escape(f'{statistics.mean(pairs):+.4f}')}\d* ± (\d\.\d+)", found.text)
    assert told and float(told[1]) == pytest.approx(half, rel=0.05)
  assert "trials 12, 13, 14" in found.evidence and "Student's t" in found.evidence
  full = losses(rows, method="full")
  shares = [100 * (BASE - a) / (BASE - b) for a, b in zip(four, full, strict=True)]
  [recovered] = findings_on(tmp_path, "Full fine-tuning")
  assert recovered.concluded and f"rank 4 recovers {statistics.mean(shares):.1f}" in recovered.text
  assert "with 4 % of its parameters" in recovered.text


def test_order_of_ranks_on_disk_does_not_matter(tmp_path):
  ranks(tmp_path, dict(reversed(PLATEAU.items())))
  [found] = findings_on(tmp_path, "Rank")
  assert found.values["rank"] == 4


def test_tie_goes_to_the_smallest_rank(tmp_path):
  ranks(tmp_path, {2: 2.0, 4: 2.0, 8: 2.0})
  [found] = findings_on(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 2 and "smallest tried: a smaller one may do" in found.text


def test_difference_within_the_tolerance_does_not_decide(tmp_path):
  ranks(tmp_path, {1: 2.5, 4: 2.010, 8: 2.0})  # 1 % of the gain, at every seed
  assert findings_on(tmp_path, "Rank")[0].values["rank"] == 4
  ranks(tmp_path / "more", {1: 2.5, 4: 2.030, 8: 2.0, 16: 2.0})  # 3 %
  assert findings_on(tmp_path / "more", "Rank")[0].values["rank"] == 8


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_fewer_than_three_seeds_conclude_nothing(tmp_path, seeds):
  ranks(tmp_path, PLATEAU, seeds)
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and f"have {len(seeds)} seed" in found.text and "three are needed" in found.text
  assert "more seeds" in findings_on(tmp_path, "Next")[0].text


def test_failed_seed_leaves_its_rank_out(tmp_path):
  ranks(tmp_path, PLATEAU)
  file = tmp_path / "10" / "summary.json"  # a seed of rank 8
  file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "diverged"}))
  [found] = findings_on(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 4 and "fewer than three seeds: rank 8." in found.text


def test_best_largest_rank_concludes_nothing(tmp_path):
  ranks(tmp_path, {1: 2.6, 2: 2.4, 4: 2.2, 8: 2.0})
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "rank, 8, is the largest" in found.text
  assert "try a rank above 8" in findings_on(tmp_path, "Next")[0].text.lower()


def test_scattered_seeds_conclude_nothing(tmp_path):
  for n, (rank, values) in enumerate({2: [2.0, 2.6, 2.4], 4: [2.3, 2.0, 2.1], 8: [2.4, 2.1, 2.2]}.items()):
    for seed, loss in enumerate(values):
      trial(tmp_path, 3 * n + seed, loss, lora__rank=rank, train__seed=seed)
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "scatter" in found.text


def test_no_gain_over_the_base_concludes_nothing(tmp_path):
  ranks(tmp_path, {1: 3.2, 2: 3.1, 4: 3.1})
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "better than the base" in found.text
