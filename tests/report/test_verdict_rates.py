"""Rates of false and of right conclusions on simulated sweeps: a few cells of tests/bench/verdicts.py, seeds fixed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SPEC = importlib.util.spec_from_file_location("bench_verdicts", Path(__file__).parents[1] / "bench" / "verdicts.py")
assert SPEC and SPEC.loader
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)
WORLDS = {world.name: world for world in bench.WORLDS}


@pytest.mark.parametrize("name", ["all equal", "all equal, spreads differ 9-fold", "one is 6 % short",
                                  "one of five is 6 % short, it and the best scatter 3-fold",
                                  "U-shaped, heavy tails", "every doubling gains 2 %, incomplete"])
def test_few_conclusions_are_false(name):
  wrong, _ = bench.rates_of(WORLDS[name], 3, 0.1, 100)
  assert wrong <= 0.05


@pytest.mark.parametrize(("seeds", "least"), [(3, 0.60), (5, 0.88), (10, 0.99)])
def test_a_plateau_is_named(seeds, least):
  _, right = bench.rates_of(WORLDS["plateau"], seeds, 0.03, 100)
  assert right >= least


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_name_nothing(seeds):
  assert bench.rates_of(WORLDS["plateau"], seeds, 0.003, 20) == (0.0, 0.0)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_after_tuning(seeds):
  shapes = ("five equal", "three, a noise apart", "six on a parabola")
  assert 0.93 <= np.mean([bench.coverage(bench.FLAT[rates], seeds, 200) for rates in shapes]) <= 0.97


def test_run_directories_give_the_same_verdicts(tmp_path):
  rng = np.random.default_rng(0)
  world = WORLDS["plateau"]
  gains = bench.draw_gains(world, 3, 0.01, rng)
  assert not bench.files_are_wrong(world, gains, tmp_path / "0")
  swapped = bench.World("swapped", tuple(reversed(world.truth)))
  assert bench.files_are_wrong(swapped, gains, tmp_path / "1")  # the same numbers, of which another thing is true
