"""The smallest sufficient rank is found where it was planted, and nowhere else."""

import json
import math
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
  assert found.values["insufficient"] == [1, 2] and "at least 95 % of what any other rank tried gains" in found.answer
  assert found.answer.endswith(" Ranks 1 and 2 are not enough.")
  four, full = losses(rows, rank="4", method="lora"), losses(rows, method="full")
  gain = BASE - statistics.mean(four)
  assert f"{gain:.4f} ± {T2 * statistics.stdev(four) / math.sqrt(3):.4f} below the base" in found.text
  assert "trials 12, 13, 14" in found.evidence and "Holm" in found.evidence
  [recovered] = findings_on(tmp_path, "Full fine-tuning")
  share = 100 * gain / (BASE - statistics.mean(full))
  assert recovered.concluded and f"rank 4 recovers {share:.1f} % (95 % interval" in recovered.text
  assert "trains 4 % of the parameters" in recovered.text


def test_order_of_ranks_on_disk_does_not_matter(tmp_path):
  ranks(tmp_path, dict(reversed(PLATEAU.items())))
  [found] = findings_on(tmp_path, "Rank")
  assert found.values["rank"] == 4


def test_tie_goes_to_the_smallest_rank(tmp_path):
  ranks(tmp_path, {2: 2.0, 4: 2.0, 8: 2.0})
  [found] = findings_on(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 2 and "smallest tried: a smaller one may be enough" in found.text


def test_the_margin_decides_which_difference_matters(tmp_path):
  ranks(tmp_path, {1: 2.5, 4: 2.030, 8: 2.0, 16: 2.0})  # 3 % of the gain, at every seed
  answers = [findings_on(tmp_path, "Rank", margin=margin)[0] for margin in (0.05, 0.02)]
  assert [found.values["rank"] for found in answers] == [4, 8] and "margin 2 %" in answers[1].text


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_fewer_than_three_seeds_conclude_nothing(tmp_path, seeds):
  ranks(tmp_path, PLATEAU, seeds)
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and f"have {len(seeds)} seed" in found.text and "three are needed" in found.text
  assert "more seeds" in findings_on(tmp_path, "Next")[0].text


def test_diverged_seed_is_no_repetition_of_its_rank(tmp_path):
  ranks(tmp_path, PLATEAU)
  file = tmp_path / "7" / "summary.json"  # a seed of rank 4
  file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "diverged"}))
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and (found.values["rank"], found.values["at_most"]) == (None, 8)
  assert "At most rank 8 is needed" in found.text and "rank 4 diverged in 1 of 3" in found.text


def test_diverged_seed_of_a_larger_rank_leaves_the_answer_open(tmp_path):
  ranks(tmp_path, PLATEAU)
  file = tmp_path / "13" / "summary.json"  # a seed of rank 16
  file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "diverged"}))
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "at_most" not in found.values and "rank 16 diverged in 1 of 3" in found.text


def test_best_largest_rank_concludes_nothing(tmp_path):
  ranks(tmp_path, {1: 2.6, 2: 2.4, 4: 2.2, 8: 2.0})
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "only the largest rank tried, 8" in found.text
  assert "try a rank above 8" in findings_on(tmp_path, "Next")[0].text.lower()


def test_scattered_seeds_conclude_nothing(tmp_path):
  for n, (rank, values) in enumerate({2: [2.0, 2.6, 2.4], 4: [2.3, 2.0, 2.1], 8: [2.4, 2.1, 2.2]}.items()):
    for seed, loss in enumerate(values):
      trial(tmp_path, 3 * n + seed, loss, lora__rank=rank, train__seed=seed)
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "more than 100 more of each would be needed" in found.text


def test_no_gain_over_the_base_concludes_nothing(tmp_path):
  ranks(tmp_path, {1: 3.2, 2: 3.1, 4: 3.1})
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "better than the base" in found.text


def test_null_is_named_in_the_context_of_an_answer(tmp_path):
  ranks(tmp_path, {1: 2.0, 2: 2.001, 4: 2.0})
  ranks(tmp_path, {1: 2.1, 2: 2.101, 4: 2.1}, first=9, lora__layers=[2, 3])
  everywhere, some = findings_on(tmp_path, "Rank")
  assert everywhere.answer.startswith("Rank 1 is enough (layers null): ")
  assert some.answer.startswith("Rank 1 is enough (layers 2,3): ")
