"""Small studies that a report has misread: what may be said of them, and what may not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from reports import findings_on

from lora_exp.report.findings.finding import Finding
from sweeps import trial

Losses = Sequence[float | None]  # of seeds 0, 1, 2, …; None: it diverged


def study(directory: Path, settings: Sequence[tuple[dict[str, Any], Losses]], topic: str) -> Finding:
  """The finding on `topic` in a sweep of these settings and losses."""
  number = 0
  for keys, losses in settings:
    for seed, loss in enumerate(losses):
      trial(directory, number, loss, "done" if loss is not None else "diverged", train__seed=seed, **keys)
      number += 1
  [found] = findings_on(directory, topic)
  return found


def of_ranks(directory: Path, losses: dict[int, Losses]) -> Finding:
  return study(directory, [({"lora__rank": rank}, values) for rank, values in losses.items()], "Rank")


def test_scatter_of_one_rank_leaves_it_undecided(tmp_path):
  found = of_ranks(tmp_path, {1: [2.7205, 2.7355, 2.7505], 4: [2.7, 2.7, 2.7], 8: [2.702, 2.701, 2.702]})
  assert not found.concluded and "Undecided: rank 1 (may be up to 27 % short)" in found.text
  assert "rank 4 and rank 8 have 1 to 2 seeds" in found.text and "identical losses count once" in found.text


@pytest.mark.parametrize("losses", [
  {1: [2.55, 2.95, 2.61], 4: [2.95, 2.45, 2.70], 8: [2.60, 2.90, 2.75]},
  {1: [2.55, 2.95, 2.60], 4: [2.95, 2.55, 2.80], 8: [2.60, 2.90, 2.75]},
])
def test_noise_above_the_gain_says_that_nothing_is_known(tmp_path, losses):
  found = of_ranks(tmp_path, losses)
  assert not found.concluded and found.values["undecided"] == [1, 4, 8]
  assert "nothing is known, because the noise between seeds is larger than the gain" in found.text


def test_diverged_seed_makes_the_double_an_upper_bound(tmp_path):
  found = of_ranks(tmp_path, {1: [2.60, 2.61, 2.59], 2: [2.30, 2.31, 2.29], 4: [2.00, 2.01, None],
                              8: [2.002, 2.011, 1.991], 16: [2.00, 2.01, 1.99]})
  assert not found.concluded and "is enough" not in found.text
  assert found.text.startswith("At most rank 8 is needed") and "rank 4 diverged in 1 of 3" in found.answer


def test_larger_ranks_that_are_worse_at_one_rate_name_no_rank(tmp_path):
  losses = {1: 2.4, 2: 2.2, 4: 2.0, 8: 2.1, 16: 2.3}
  found = of_ranks(tmp_path, {rank: [loss + 0.001 * s + 0.0003 * (rank + s * s) for s in range(3)]
                              for rank, loss in losses.items()})
  assert not found.concluded and "at this rate, which was not tuned for each rank" in found.answer


def test_full_at_one_rate_is_called_that(tmp_path):
  rates = {1e-3: 2.8, 2e-3: 2.7, 4e-3: 2.661, 8e-3: 2.69, 1.6e-2: 2.75}
  lora = [({"lora__rank": 8, "optim__lr": lr}, [loss, loss + 0.001, loss - 0.0005]) for lr, loss in rates.items()]
  full = ({"lora__method": "full", "optim__lr": 1e-3}, [2.751, 2.752, 2.7505])
  found = study(tmp_path, [*lora, full], "Full fine-tuning")
  assert found.answer.startswith("Of the gain of full fine-tuning at its only rate, lr 0.004 recovers 13")
  assert "tried at its only lr" in found.text


def test_rate_at_which_seeds_diverged_is_not_the_best(tmp_path):
  found = study(tmp_path, [
    ({"optim__lr": 0.001}, [2.75, 2.751, 2.749, 2.7505, 2.752]),
    ({"optim__lr": 0.002}, [2.700, 2.701, 2.699, 2.7005, 2.702]),
    ({"optim__lr": 0.004}, [2.66, 2.662, 2.664, None, None]),
  ], "Rate")
  assert "lowest mean held-out loss: 0.002 (at 0.004 2 of 5 diverged)" in found.text


def test_means_are_of_the_seeds_that_settings_share(tmp_path):
  found = of_ranks(tmp_path, {4: [2.702, 2.712, 2.692], 8: [2.70, 2.71, 2.69, 2.60, 2.61]})
  assert found.values["rank"] == 4 and "adjusted for what the seeds have in common" in found.evidence
  assert "rank 4: gain 0.3360" in found.evidence and "rank 8: gain 0.3380" in found.evidence


def test_error_of_full_is_in_the_share_of_it(tmp_path):
  found = study(tmp_path, [({"lora__rank": 8}, [2.732, 2.7325, 2.7315, 2.733, 2.731]),
                           ({"lora__method": "full"}, [2.62, 2.78, 2.70])], "Full fine-tuning")
  assert found.values["share"] == pytest.approx(0.893, abs=1e-3)
  assert found.values["low"] < 0.6 and found.values["high"] > 2


def test_methods_that_scatter_are_not_settled(tmp_path):
  found = study(tmp_path, [({}, [2.70, 2.701, 2.699]), ({"lora__method": "dora"}, [2.75, 2.82, 2.71]),
                           ({"lora__init": "pissa"}, [2.85, 2.72, 2.84])], "Methods")
  assert found.values["best"] is None and "may be up to" in found.text and "sufficient" not in found.answer


def test_alpha_that_scatters_is_not_settled(tmp_path):
  losses = {4.0: [2.6, 3.0, 2.4], 8.0: [2.5, 2.9, 2.85], 16.0: [2.8, 2.4, 2.7]}
  rates = {1e-3: 0.1, 1e-2: 0.0, 1e-1: 0.1}
  settings = [({"lora__alpha": alpha, "optim__lr": lr}, [loss + more for loss in values])
              for alpha, values in losses.items() for lr, more in rates.items()]
  found = study(tmp_path, settings, "Alpha")
  assert not found.concluded and found.answer.startswith("Whether alpha matters is not settled")


def test_identical_losses_are_one_repetition(tmp_path):
  found = study(tmp_path, [({"lora__method": "bitfit"}, [2.7, 2.7, 2.7]), ({}, [2.75, 2.76, 2.74])], "Methods")
  assert not found.concluded and "bitfit has 1 seed" in found.answer and "± 0.0000" not in found.evidence


def test_no_curve_is_fitted_to_a_best_rate_at_the_edge(tmp_path):
  rates = {0.005: 2.6662, 0.01: 2.6682, 0.02: 2.6600}
  found = study(tmp_path, [({"lora__rank": 8, "optim__lr": lr}, [loss]) for lr, loss in rates.items()], "Rate")
  assert "fitted" not in found.text and "is the highest tried (lr 0.02)" in found.text
