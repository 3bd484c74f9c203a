"""Runs that cannot be compared are in groups of their own."""


import pytest
from reports import Page, findings_on, read_results

from lora_exp.report.grouping.group import make_groups
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.sweep_report import make_report, make_table
from sweeps import ranks, trial


@pytest.mark.parametrize(("change", "settings", "words"), [
  ({"fingerprints": {"base": "base0", "data": "other rows"}}, {}, "the data"),
  ({"fingerprints": {"base": "another", "data": "rows"}}, {}, "the base"),
  ({"base": {"kind": "weights", "digest": "x"}}, {}, "the base"),
  ({}, {"train__steps": 64}, "the number of steps"),
])
def test_other_data_steps_or_base_is_another_group(tmp_path, change, settings, words):
  ranks(tmp_path, {1: 2.5, 2: 2.0, 4: 2.0})
  for seed in range(3):
    trial(tmp_path, 9 + seed, 1.0 + 0.01 * seed, lora__rank=8, train__seed=seed, change=change, **settings)
  found = make_groups(read_sweep(tmp_path))
  assert [len(group.runs) for group in found] == [9, 3] and words in found[0].why
  assert findings_on(tmp_path, "Rank")[0].values["rank"] == 2
  make_table(tmp_path)
  assert {r["group"] for r in read_results(tmp_path)} == {"0", "1"}


def test_two_groups_have_a_warning_and_plots_each(tmp_path):
  for n, steps in enumerate((32, 64)):
    ranks(tmp_path, {1: 2.5, 2: 2.0}, [0], first=2 * n, train__steps=steps)
  report = make_report(tmp_path)
  assert "differ in the number of steps" in report.warnings[0] and "not compared" in Page(tmp_path).text
  assert {"pareto-0.png", "pareto-1.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}


def test_base_and_data_seeds_do_not_split_a_group(tmp_path):
  n = 0
  for rank in (1, 2):
    for seed in range(3):
      prints = {"base": f"base{seed}", "data": f"rows{seed}"}
      trial(tmp_path, n, 2.0 + 0.1 * seed, lora__rank=rank, model__seed=seed, data__seed=seed,
          change={"fingerprints": prints})
      n += 1
  [group] = make_groups(read_sweep(tmp_path))
  assert [s.seeds for s in group.settings] == [3, 3]
