"""Findings on rates, alpha, targets and methods."""

import math
import statistics
from dataclasses import replace

import pytest
from reports import findings_on, losses, read_results

from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.sweep_report import make_report, make_table
from sweeps import BASE, trial


def grid(directory, places: dict[int, float], rates=(1e-3, 3e-3, 1e-2, 3e-2), depth: float = 0.2) -> None:
  """Parabolas in log lr: {rank: best rate}; rank 4 and above reach 2.0, below it 2.4."""
  n = 0
  for rank, place in places.items():
    for lr in rates:
      for seed in range(3):
        loss = (2.4 if rank < 4 else 2.0) + depth * math.log10(lr / place) ** 2 + 0.01 * (seed - 1)
        trial(directory, n, loss + 1e-4 * ((rank + seed) % 3), lora__rank=rank, optim__lr=lr, train__seed=seed)
        n += 1


def test_each_rank_is_compared_at_its_best_rate(tmp_path):
  grid(tmp_path, {1: 1e-2, 4: 1e-2, 16: 3e-3})
  [found] = findings_on(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 4 and "each at its own best lr" in found.text
  [rate] = findings_on(tmp_path, "Rate")
  assert "rank 4: 0.01 (fitted 0.01)" in rate.text and "rank 16: 0.003 (fitted 0.003)" in rate.text


def test_rates_that_only_tuned_have_no_mean(tmp_path):
  """The rate that was chosen has no lower loss than the others: its seeds are other ones."""
  for n, lr in enumerate((1e-3, 1e-2, 1e-1)):
    trial(tmp_path, n, 2.0 + 0.1 * abs(n - 1), optim__lr=lr, train__seed=9)
  for seed in range(3):
    trial(tmp_path, 3 + seed, 2.5 + 0.01 * seed, optim__lr=1e-2, train__seed=seed)
  [group] = make_groups([replace(run, tunes=run.number < 3) for run in read_sweep(tmp_path)])
  [found] = [finding for finding in all_findings(group) if finding.topic == "Rate"]
  assert not found.concluded and found.evidence == "trials 0, 1, 2"
  assert found.text == ("Learning rate chosen on the tuning half of the held-out data: 0.01. No trial scores the other "
                        "rates.")


def test_best_rate_at_the_edge_concludes_nothing(tmp_path):
  grid(tmp_path, {1: 1e-2, 4: 1e-2, 16: 2e-1}, depth=0.4)
  [found], [rate], [step] = (findings_on(tmp_path, topic) for topic in ("Rank", "Rate", "Next"))
  assert not found.concluded and "lr of rank 16 is the highest tried (lr 0.03)" in found.text
  assert not rate.concluded and "extend the grid" in step.text.lower()


def test_rate_beyond_which_trials_diverge_is_no_edge(tmp_path):
  """Depth: rate 0.03 is measurably better than 0.01, and only what lies beyond tells whether it is an edge."""
  grid(tmp_path, {1: 1e-1, 4: 1e-1, 16: 1e-1}, depth=0.4)
  assert not findings_on(tmp_path, "Rank")[0].concluded
  for n, rank in enumerate((1, 4, 16)):
    trial(tmp_path, 36 + n, None, status="diverged", lora__rank=rank, optim__lr=0.1)
  [found] = findings_on(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 4


@pytest.mark.parametrize(("effect", "middle", "mattered"), [(0.0, 1, False), (0.2, 1, True), (0.2, 2, True)])
def test_alpha_is_judged_once_the_rate_was_tuned(tmp_path, effect, middle, mattered):
  n = 0
  for i, alpha in enumerate((4.0, 8.0, 16.0)):
    for lr in (1e-3, 1e-2, 1e-1):
      for seed in range(3):
        loss = 2.0 + 0.3 * math.log10(lr / 1e-2) ** 2 + effect * abs(i - middle) + 0.01 * seed + 1e-4 * ((i + seed) % 3)
        trial(tmp_path, n, loss, lora__alpha=alpha, optim__lr=lr, train__seed=seed)
        n += 1
  [found] = findings_on(tmp_path, "Alpha")
  assert found.concluded and found.values["mattered"] is mattered
  assert found.answer.startswith("Alpha matters by less than 5 %") is not mattered


def test_alpha_at_one_rate_concludes_nothing(tmp_path):
  for n, alpha in enumerate((4.0, 8.0, 16.0)):
    for seed in range(3):
      trial(tmp_path, 3 * n + seed, 2 + 0.1 * n + 0.01 * seed, lora__alpha=alpha, train__seed=seed)
  [found] = findings_on(tmp_path, "Alpha")
  assert not found.concluded and "sweep optim.lr too" in found.text


SIZES = {"attention": 4000, "mlp": 2000, "all_linear": 6000}


def test_paying_targets_are_the_cheapest_sufficient_ones(tmp_path):
  n = 0
  for place, loss in {"mlp": 2.4, "attention": 2.0, "all_linear": 2.001}.items():
    for seed in range(3):
      trial(tmp_path, n, loss + 0.01 * seed + 1e-4 * ((n * 7) % 3), lora__targets=place, train__seed=seed,
          trainable=SIZES[place])
      n += 1
  made, *_ = findings_on(tmp_path, "Targets")
  assert made.concluded and made.values["targets"] == "attention" and "It pays to adapt attention" in made.text
  make_table(tmp_path)
  gain = statistics.mean(BASE - loss for loss in losses(read_results(tmp_path), targets="attention")) / 4
  each = findings_on(tmp_path, "Targets")[1]
  assert f"attention {gain:.4g} (4,000 parameters)" in each.text
  assert each.concluded and "most per parameter (confidence 95 %): mlp." in each.text


def test_gain_by_parameter_is_ordered_by_a_test(tmp_path):
  for n, (place, seed) in enumerate((place, seed) for place in ("mlp", "attention") for seed in range(3)):
    loss = 3 - 0.1 * SIZES[place] / 1000 + 0.05 * (seed - 1) * (1 if place == "mlp" else -1)
    trial(tmp_path, n, loss, lora__targets=place, train__seed=seed, trainable=SIZES[place])
  each = findings_on(tmp_path, "Targets")[1]
  assert not each.concluded and "None of them is shown to gain most" in each.text


@pytest.mark.parametrize(("rises", "shown"), [((0.1, 0.2, 0.3), True), ((0.1, 0.1005, 0.101), False)])
def test_forgetting_is_ordered_by_a_test(tmp_path, rises, shown):
  for n, (rank, seed) in enumerate((rank, seed) for rank in range(3) for seed in range(3)):
    trial(tmp_path, n, 2.0 + 0.01 * seed, lora__rank=2**rank, train__seed=seed,
          forgetting=rises[rank] + 0.003 * ((seed + rank) % 3 - 1))
  [found] = findings_on(tmp_path, "Forgetting")
  assert found.concluded is shown
  words = "shown to be higher with rank 4 than with rank 1"
  assert (f"It is {words}" if shown else f"It is not {words}") in found.text


def test_targets_are_compared_at_equal_parameters(tmp_path):
  n = 0
  for place, size, gain in (("attention", 500, 0.3), ("mlp", 700, 0.2)):
    for rank in (1, 2, 4, 8):
      for seed in range(3):
        loss = 2.8 - gain * math.log(rank * size / 500) + 0.01 * seed
        trial(tmp_path, n, loss, lora__targets=place, lora__rank=rank, train__seed=seed, trainable=rank * size)
        n += 1
  equal = next(f for f in findings_on(tmp_path, "Targets") if "parameters each" in f.text)
  place = equal.values["parameters"]
  assert place == pytest.approx(math.sqrt(700 * 4000))
  assert equal.values["states"] == {"attention": "sufficient", "mlp": "insufficient"}
  assert f"attention {BASE - 2.8 + 0.3 * math.log(place / 500) - 0.01:.4f} (sufficient)" in equal.text


def test_targets_with_one_parameter_budget(tmp_path):
  n = 0
  for place, rank, loss in (("mlp", 13, 2.4), ("attention", 6, 2.0), ("all_linear", 4, 2.002)):
    for seed in range(3):
      trial(tmp_path, n, loss + 0.01 * seed + 1e-4 * ((n * 7) % 3), lora__targets=place, lora__rank=rank,
          lora__parameters=0.03, train__seed=seed, trainable=49152 if rank == 4 else 53248)
      n += 1
  [made] = findings_on(tmp_path, "Targets")
  assert made.concluded and made.values["targets"] == "attention"
  assert made.answer.startswith("With 49,152 to 53,248 trainable parameters each, shown to be within 5 % of the best ")
  assert made.values["sufficient"] == ["all_linear", "attention"] and made.values["insufficient"] == ["mlp"]
  assert findings_on(tmp_path, "Rank") == [] and "rank" not in findings_on(tmp_path, "Next")[0].text


def test_methods_are_labelled_by_their_settings(tmp_path):
  kinds = {"lora": {}, "pissa": {"lora__init": "pissa"}, "rslora": {"lora__scaling": "rslora"},
           "dora": {"lora__method": "dora"}}
  for n, (name, settings) in enumerate(kinds.items()):
    for seed in range(3):
      loss = 2.0 + 0.1 * n + 0.01 * seed
      trial(tmp_path, 3 * n + seed, loss, train__seed=seed, change={"fingerprints": {"base": name, "data": "rows"}}
          if name == "pissa" else None, **settings)
  [group] = make_groups(read_sweep(tmp_path))
  assert [s.label for s in group.settings] == list(kinds)
  [found] = findings_on(tmp_path, "Methods")
  assert found.concluded and found.values["best"] == "lora"
  assert "every other method is shown to be more than 5 %" in found.text


def test_trials_that_only_tuned_are_told_from_none(tmp_path):
  trial(tmp_path, 0, 2.5)
  [group] = make_groups([replace(run, tunes=True) for run in read_sweep(tmp_path)])
  [found] = all_findings(group)
  assert found.text == "Only tuning trials are done (1). None scores an adapter."


def test_alphas_that_go_with_methods_are_not_compared(tmp_path):
  for n, (method, alpha) in enumerate((("lora", 16.0), ("dora", 16.0), ("adalora", 24.0))):
    for seed in range(3):
      trial(tmp_path, 3 * n + seed, 2 + 0.1 * n + 0.01 * seed, lora__method=method, lora__alpha=alpha,
            train__seed=seed)
  [group] = make_groups(read_sweep(tmp_path))
  assert [setting.label for setting in group.settings] == ["lora", "dora", "adalora"]
  assert findings_on(tmp_path, "Alpha") == []
  assert [finding.values["best"] for finding in findings_on(tmp_path, "Methods")] == ["lora"]


def test_a_value_that_cannot_be_lower_is_no_edge(tmp_path):
  """The best dropout is 0, the lowest tried and the lowest allowed. The lowest tried of lr is an edge."""
  numbers = iter(range(100))
  for key, values in {"lora__dropout": (0.0, 0.1, 0.2), "optim__lr": (1e-3, 2e-3, 4e-3)}.items():
    for rank, loss in {1: 2.4, 4: 2.0, 8: 2.0}.items():
      for place, value in enumerate(values):
        for seed in range(3):
          trial(tmp_path / key, next(numbers), loss + 0.1 * place + 0.001 * seed, lora__rank=rank, train__seed=seed,
                **{key: value})
  [dropout] = findings_on(tmp_path / "lora__dropout", "Rank")
  [rate] = findings_on(tmp_path / "optim__lr", "Rank")
  assert dropout.concluded and dropout.values["rank"] == 4
  assert "the lowest tried (lr 0.001)" in rate.text


@pytest.mark.parametrize("key", ["optim__clip", "lora__quant"])
def test_null_is_a_value_of_a_setting(key, tmp_path):
  values = {"optim__clip": (None, 0.5, 1.0), "lora__quant": (None, "nf4", "int8")}[key]
  rows = [(rank, lr, value) for rank in (1, 4) for lr in (1e-3, 1e-2) for value in values]
  for n, (rank, lr, value) in enumerate(rows):
    trial(tmp_path, n, 2.0 + 0.1 * n, lora__rank=rank, optim__lr=lr, **{key: value})
  report = make_report(tmp_path)
  assert report.sections[0].group.levels(key.replace("__", "."))[0] is None
  assert (tmp_path / "plots" / "parallel.png").is_file()


def test_a_metric_that_no_trial_has_is_named(tmp_path):
  trial(tmp_path, 0, 2.0)
  [group] = make_groups(read_sweep(tmp_path), METRICS["rouge_l"])
  assert all_findings(group)[0].text == (
    "1 trial is done, but none has a held-out ROUGE-L. Rank them by another metric (report.metric=loss), or run the "
    "sweep with eval.metrics=[rouge_l].")
