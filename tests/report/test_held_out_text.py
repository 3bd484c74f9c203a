"""The error that comes from the held-out documents, for many seeds and for one."""

import json
from pathlib import Path

import numpy as np
import pytest
from reports import findings_on

from lora_exp.report.estimation.held_out_text import short_interval, text_covariance
from sweeps import ranks

DOCUMENTS = 40


def write_documents(run_dir: Path, gain: float, scatter: float, rng: np.random.Generator) -> None:
  """held_out.npz of a run that gains `gain` nats per token over a base of 3, on documents of 50 tokens."""
  tokens = np.full(DOCUMENTS, 50)
  base = np.full(DOCUMENTS, 150.0)
  exported = base - 50 * (gain + scatter * rng.standard_normal(DOCUMENTS))
  step = json.loads((run_dir / "summary.json").read_text())["losses"]["exported_step"]
  np.savez(run_dir / "held_out.npz", steps=[0, step], nats=np.stack([base, exported]).astype(np.float32), tokens=tokens,
           half=np.ones(DOCUMENTS, np.uint8))


def test_covariance_is_that_of_repeated_draws_of_documents():
  rng = np.random.default_rng(0)
  draws = []
  for _ in range(2000):
    tokens = rng.integers(10, 100, DOCUMENTS)
    shared = rng.standard_normal(DOCUMENTS)
    gains = [tokens * (1 + 0.2 * shared), tokens * (0.9 + 0.2 * shared + 0.1 * rng.standard_normal(DOCUMENTS))]
    draws.append([gain.sum() / tokens.sum() for gain in gains])
  np.testing.assert_allclose(text_covariance(gains, tokens), np.cov(np.array(draws).T), rtol=0.5)


def test_interval_of_one_run_is_over_documents():
  rng = np.random.default_rng(1)
  better = 10 + rng.standard_normal(400)
  short, low, high = short_interval(0.9 * better + 0.1 * rng.standard_normal(400), better)
  assert low < short < high and short == pytest.approx(0.1, abs=0.01) and high - low < 0.01


def test_one_seed_has_an_interval_for_its_own_runs(tmp_path):
  ranks(tmp_path, {1: 2.5, 8: 2.0}, [0])
  rng = np.random.default_rng(0)
  for number, gain in ((0, 0.5), (1, 1.0)):
    write_documents(tmp_path / str(number), gain, 0.05, rng)
  [found] = findings_on(tmp_path, "Rank")
  assert not found.concluded and "short of the gain of rank 8: rank 1 51 % (50 % to 53 %)" in found.text
  assert "cover the held-out text" in found.text and "no other seed" in found.text


def test_text_that_is_too_short_leaves_a_rank_undecided(tmp_path):
  """The seeds agree, but the documents do not."""
  for scatter, directory in ((0.01, tmp_path / "much"), (1.0, tmp_path / "little")):
    ranks(directory, {1: 2.5, 4: 2.0, 8: 2.0}, noise=0.001)
    rng = np.random.default_rng(0)
    for number in range(9):
      write_documents(directory / str(number), (0.5, 1.0, 1.0)[number // 3], scatter, rng)
  much, little = (findings_on(tmp_path / name, "Rank")[0] for name in ("much", "little"))
  assert much.values["rank"] == 4 and "cover seeds and held-out text" in much.evidence
  assert little.values["rank"] is None and not little.concluded
