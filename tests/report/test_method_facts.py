"""The report reads the facts about a method from a run's files."""

import pytest
from reports import Page, read_results

from lora_exp.lora import methods
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.reading.method_facts import MethodFacts, method_facts, method_label
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.sweep_report import make_report
from sweeps import trial


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "bitfit", "full", "frozen"])
def test_facts_of_old_runs_are_those_that_runs_state_today(name):
  stated = method_facts({}, {"method": methods.get(name).facts()})
  assumed = method_facts({"lora.method": name}, {})
  assert assumed.name == stated.name == name
  assert (assumed.reference, assumed.adapts_kernels) == (stated.reference, stated.adapts_kernels)
  assert not assumed.adapts_kernels or assumed.uses_alpha == stated.uses_alpha


@pytest.mark.parametrize(("settings", "label"), [
  ({}, "lora"),
  ({"lora.init": "pissa"}, "pissa"),
  ({"lora.init": "pissa", "lora.scaling": "rslora"}, "pissa+rslora"),
  ({"lora.scaling": "rslora", "lora.quant": "nf4"}, "rslora+qlora"),
  ({"lora.lr_ratio": 4.0}, "loraplus"),
  ({"lora.method": "dora", "lora.lr_ratio": 1.0}, "dora"),
  ({"lora.method": "dora", "lora.quant": "nf4"}, "dora+qlora"),
  ({"lora.method": "full", "lora.quant": "nf4"}, "full"),
])  # fmt: skip
def test_method_label_names_the_variant(settings, label):
  assert method_label(settings, method_facts(settings, {})) == label


def test_method_that_the_report_has_never_seen_is_compared(tmp_path):
  facts = {"name": "gated", "title": "Gated", "reference": None, "adapts_kernels": True, "uses_rank": False,
           "uses_alpha": False, "has_constants": True}
  for seed in range(3):
    trial(tmp_path, seed, 2.0 + 0.01 * seed, lora__rank=8, train__seed=seed)
    fingerprints = {"base": "with the constants of the method", "data": "rows"}
    trial(tmp_path, 3 + seed, 1.9 + 0.01 * seed, lora__rank=8, train__seed=seed,
          change={"method": facts, "fingerprints": fingerprints})
  [group] = make_groups(read_sweep(tmp_path))
  assert [setting.label for setting in group.settings] == ["lora", "gated"]
  assert group.settings[1].method == MethodFacts("gated", uses_rank=False, uses_alpha=False, has_constants=True)
  make_report(tmp_path)
  assert "gated is best: every other method is shown to be more than 5 %" in Page(tmp_path).text
  rows = read_results(tmp_path)
  assert [(row["method"], row["rank"], row["alpha"]) for row in rows[::3]] == [("lora", "8", "16.0"), ("gated", "", "")]
