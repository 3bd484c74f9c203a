"""The report of a sweep says what its numbers say, finds what was planted, and keeps quiet where they do not tell."""

import base64
import csv
import json
import math
import re
import shutil
import statistics

import pytest
import yaml
from runs import TINY

from lora_exp.cli import main as entry
from lora_exp.config import InputError
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.page.markdown import markdown
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.statistics.estimates import difference, estimate, t_quantile
from lora_exp.report.statistics.fits import fit_parabola, pareto_front
from lora_exp.report.sweep_report import make_report, make_table
from sweeps import BASE, ranks, references, trial

T2 = 4.3027  # Student's t, 0.975, two degrees of freedom
PLATEAU = {1: 2.6, 2: 2.3, 4: 2.0, 8: 2.002, 16: 1.999}


def said(directory, topic: str, group: int = 0):
  """The findings on a topic."""
  return [f for f in all_findings(make_groups(read_sweep(directory))[group]) if f.topic == topic]


def table(directory) -> list[dict[str, str]]:
  with open(directory / "results.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def losses(rows, **where) -> list[float]:
  """The losses in results.csv of the trials that are done."""
  return [float(r["loss"]) for r in rows if r["status"] == "done" and all(r[k] == v for k, v in where.items())]


# ---- the trials


def test_every_trial_is_in_the_table_whatever_became_of_it(tmp_path):
  trial(tmp_path, 0, 2.0)
  trial(tmp_path, 1, None, status="diverged", lora__rank=4)
  trial(tmp_path, 3, 2.5, status="stopped", lora__rank=2)
  (trial(tmp_path, 4, 2.0, lora__rank=16) / "summary.json").unlink()
  trial(tmp_path, 5, float("nan"), lora__rank=32)
  (tmp_path / "6").mkdir()
  failed = trial(tmp_path, 7, 2.0, lora__rank=64, metrics=False)
  (failed / "summary.json").unlink()
  (failed / "lora_exp.log").write_text(f"2026-01-01 00:00:00,000 ERROR lora_exp: {failed}/x: no room\nTraceback\n  …\n"
                                       "2026-01-01 00:00:01,000 INFO hydra: the next\n")
  (trial(tmp_path, 8, 2.0, lora__rank=3) / "summary.json").write_text('{"status": "do')
  make_report(tmp_path)
  rows = {int(r["number"]): r for r in table(tmp_path)}
  assert [r["status"] for r in rows.values()] == ["done", "diverged", "missing", "stopped", "unfinished", "done",
                                                  "failed", "failed", "failed"]
  reasons = {0: "", 1: "no finite number after step 32", 2: "there is no such folder", 3: "stopped at step 32 of 32",
             4: "there is no summary.json", 5: "its held-out loss is not a finite number", 6: "there is no config.yaml",
             7: "7/x: no room", 8: "summary.json cannot be read"}
  page = (tmp_path / "report.html").read_text()
  for number, reason in reasons.items():
    assert reason in rows[number]["reason"] and (reason in page or not reason)
  assert rows[5]["loss"] == "" and rows[4]["rank"] == "16" and rows[7]["run"] == "7"


def test_a_bug_is_told_by_the_end_of_its_traceback(tmp_path):
  path = trial(tmp_path, 0, 2.0)
  (path / "summary.json").unlink()
  (path / "lora_exp.log").write_text("2026-01-01 00:00:00,000 ERROR lora_exp: bug\nTraceback\n  x = 1 / 0\n"
                                     "ZeroDivisionError: division by zero\n")
  assert read_sweep(tmp_path)[0].reason == "a bug: ZeroDivisionError: division by zero"


def test_what_is_no_sweep_is_refused_in_a_sentence(tmp_path):
  with pytest.raises(InputError, match="holds no runs"):
    read_sweep(tmp_path)
  one = trial(tmp_path, 0, 2.0)
  with pytest.raises(InputError, match="is one run"):
    read_sweep(one)
  assert entry.run(["task=report"]) == entry.run(["task=report", f"run={tmp_path / 'none'}"]) == 2
  assert not (tmp_path / "report.html").exists()


def test_the_columns_name_what_differs_and_what_was_trained(tmp_path):
  trial(tmp_path, 0, 2.0, lora__rank=2, optim__lr=0.01)
  trial(tmp_path, 1, 2.1, lora__rank=4, train__seed=1, data__seed=5, forgetting=0.5)
  trial(tmp_path, 2, 1.9, lora__method="full")
  make_table(tmp_path)
  first, second, full = table(tmp_path)
  keys = list(first)
  assert keys[:4] == ["number", "name", "setting", "group"] and keys[-1] == "run"
  assert [k for k in keys if "." in k] == ["lora.method", "lora.rank", "optim.lr"]
  assert (first["rank"], first["alpha"], first["scale"], first["targets"]) == ("2", "4.0", "2.0", "all_linear")
  assert (first["lr"], second["seed_train"], second["seed_data"]) == ("0.01", "1", "5")
  assert float(second["gain"]) == BASE - 2.1 and second["forgetting"] == "0.5" and second["retain_base"] == "2.0"
  assert (full["rank"], full["targets"], full["method"], full["trainable"]) == ("", "", "full", "100000")


def test_equal_sweeps_make_equal_files_and_no_path_of_the_machine(tmp_path):
  ranks(tmp_path / "one" / "sweep", {1: 2.5, 4: 2.0})
  shutil.copytree(tmp_path / "one", tmp_path / "two")
  for name in ("one", "two"):
    make_report(tmp_path / name / "sweep")
  for path in ("results.csv", "report.html", "report.md", "plots/pareto.png"):
    contents = [(tmp_path / name / "sweep" / path).read_bytes() for name in ("one", "two")]
    assert contents[0] == contents[1] and str(tmp_path).encode() not in contents[0]
  page = (tmp_path / "one" / "sweep" / "report.html").read_bytes()
  make_report(tmp_path / "one" / "sweep")
  assert page == (tmp_path / "one" / "sweep" / "report.html").read_bytes()


# ---- the numbers


@pytest.mark.parametrize(("df", "t"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (13, 2.1604), (25, 2.0595),
                                       (40, 2.0211), (1000, 1.9623)])
def test_the_quantiles_are_students(df, t):
  assert t_quantile(df) == pytest.approx(t, rel=3e-4)


def test_an_interval_is_that_of_the_textbook_and_one_value_has_none():
  assert estimate([1.0, 2.0, 4.0]).half == pytest.approx(T2 * statistics.stdev([1, 2, 4]) / math.sqrt(3), rel=1e-4)
  assert estimate([1.0]).half is None and math.isnan(estimate([]).mean)


def test_pairing_takes_out_what_the_seeds_share():
  a = {0: 1.00, 1: 2.00, 2: 3.00}
  b = {0: 0.90, 1: 1.91, 2: 2.89}
  paired, apart = difference(a, b), difference(a, {k + 10: v for k, v in b.items()})
  assert paired.paired and paired.half < 0.03 and paired.mean == pytest.approx(0.1)
  assert not apart.paired and apart.half > 1 and apart.mean == pytest.approx(0.1)


def test_the_front_holds_what_nothing_beats_in_both():
  assert pareto_front([(4, 2.0), (1, 3.0), (2, 3.1), (8, 2.0), (16, 1.9), (1, 3.2)]) == [1, 0, 4]


def test_a_parabola_is_found_again_and_a_hill_has_no_best():
  x = [math.log(v) for v in (1e-4, 1e-3, 1e-2, 1e-1)]
  fit = fit_parabola(x, [0.3 * (v - math.log(4e-3)) ** 2 + 2 for v in x])
  assert math.exp(fit.vertex) == pytest.approx(4e-3) and fit.minimum == pytest.approx(2)
  assert fit_parabola(x[:3], [1, 2, 1]) is None and fit_parabola(x[:2], [1, 2]) is None


# ---- the smallest rank


def test_a_plateau_at_rank_4_is_found_and_its_numbers_are_those_of_the_table(tmp_path):
  ranks(tmp_path, PLATEAU)
  references(tmp_path, 1.9, 15)
  make_table(tmp_path)
  rows = table(tmp_path)
  [found] = said(tmp_path, "Rank")
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
  [recovered] = said(tmp_path, "Full fine-tuning")
  assert recovered.concluded and f"rank 4 recovers {statistics.mean(shares):.1f}" in recovered.text
  assert "with 4 % of its parameters" in recovered.text


def test_the_order_of_the_ranks_on_disk_does_not_matter(tmp_path):
  ranks(tmp_path, dict(reversed(PLATEAU.items())))
  [found] = said(tmp_path, "Rank")
  assert found.values["rank"] == 4


def test_a_tie_goes_to_the_smallest_rank(tmp_path):
  ranks(tmp_path, {2: 2.0, 4: 2.0, 8: 2.0})
  [found] = said(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 2 and "smallest tried: a smaller one may do" in found.text


def test_a_measurable_difference_that_is_of_no_use_does_not_decide(tmp_path):
  ranks(tmp_path, {1: 2.5, 4: 2.010, 8: 2.0})  # 1 % of the gain, at every seed
  assert said(tmp_path, "Rank")[0].values["rank"] == 4
  ranks(tmp_path / "more", {1: 2.5, 4: 2.030, 8: 2.0, 16: 2.0})  # 3 %
  assert said(tmp_path / "more", "Rank")[0].values["rank"] == 8


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_with_fewer_than_three_seeds_nothing_is_concluded(tmp_path, seeds):
  ranks(tmp_path, PLATEAU, seeds)
  [found] = said(tmp_path, "Rank")
  assert not found.concluded and f"have {len(seeds)} seed" in found.text and "three are needed" in found.text
  assert "more seeds" in said(tmp_path, "Next")[0].text


def test_one_failed_seed_leaves_a_rank_out_and_not_the_answer(tmp_path):
  ranks(tmp_path, PLATEAU)
  file = tmp_path / "10" / "summary.json"  # a seed of rank 8
  file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "diverged"}))
  [found] = said(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 4 and "fewer than three seeds: rank 8." in found.text


def test_the_largest_rank_being_measurably_best_concludes_nothing(tmp_path):
  ranks(tmp_path, {1: 2.6, 2: 2.4, 4: 2.2, 8: 2.0})
  [found] = said(tmp_path, "Rank")
  assert not found.concluded and "rank, 8, is the largest" in found.text
  assert "try a rank above 8" in said(tmp_path, "Next")[0].text.lower()


def test_seeds_that_scatter_too_much_conclude_nothing(tmp_path):
  for n, (rank, values) in enumerate({2: [2.0, 2.6, 2.4], 4: [2.3, 2.0, 2.1], 8: [2.4, 2.1, 2.2]}.items()):
    for seed, loss in enumerate(values):
      trial(tmp_path, 3 * n + seed, loss, lora__rank=rank, train__seed=seed)
  [found] = said(tmp_path, "Rank")
  assert not found.concluded and "scatter" in found.text


def test_no_gain_below_the_base_concludes_nothing(tmp_path):
  ranks(tmp_path, {1: 3.2, 2: 3.1, 4: 3.1})
  [found] = said(tmp_path, "Rank")
  assert not found.concluded and "better than the base" in found.text


# ---- rates, alphas, targets, methods


def grid(directory, places: dict[int, float], rates=(1e-3, 3e-3, 1e-2, 3e-2), depth: float = 0.2) -> None:
  """Parabolas in log lr: {rank: best rate}; rank 4 and above reach 2.0, below it 2.4."""
  n = 0
  for rank, place in places.items():
    for lr in rates:
      for seed in range(3):
        loss = (2.4 if rank < 4 else 2.0) + depth * math.log10(lr / place) ** 2 + 0.01 * (seed - 1)
        trial(directory, n, loss + 1e-4 * ((rank + seed) % 3), lora__rank=rank, optim__lr=lr, train__seed=seed)
        n += 1


def test_every_rank_is_compared_at_its_own_best_rate(tmp_path):
  grid(tmp_path, {1: 1e-2, 4: 1e-2, 16: 3e-3})
  [found] = said(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 4 and "each at its own best lr" in found.text
  [rate] = said(tmp_path, "Rate")
  assert rate.concluded and "rank 4: 0.01 (fitted 0.01)" in rate.text and "rank 16: 0.003 (fitted 0.003)" in rate.text


def test_a_best_rate_on_the_edge_of_the_grid_concludes_nothing(tmp_path):
  grid(tmp_path, {1: 1e-2, 4: 1e-2, 16: 2e-1}, depth=0.4)
  [found], [rate], [step] = (said(tmp_path, topic) for topic in ("Rank", "Rate", "Next"))
  assert not found.concluded and "lr of rank 16 is the highest tried (lr 0.03)" in found.text
  assert not rate.concluded and "extend the grid" in step.text.lower()


def test_a_rate_beyond_which_trials_diverge_is_no_edge(tmp_path):
  """Depth: rate 0.03 is measurably better than 0.01, and only what lies beyond tells whether it is an edge."""
  grid(tmp_path, {1: 1e-1, 4: 1e-1, 16: 1e-1}, depth=0.4)
  assert not said(tmp_path, "Rank")[0].concluded
  for n, rank in enumerate((1, 4, 16)):
    trial(tmp_path, 36 + n, None, status="diverged", lora__rank=rank, optim__lr=0.1)
  [found] = said(tmp_path, "Rank")
  assert found.concluded and found.values["rank"] == 4


@pytest.mark.parametrize(("effect", "middle", "mattered"), [(0.0, 1, False), (0.2, 1, True), (0.2, 2, True)])
def test_whether_alpha_mattered_is_said_once_the_rate_was_tuned(tmp_path, effect, middle, mattered):
  n = 0
  for i, alpha in enumerate((4.0, 8.0, 16.0)):
    for lr in (1e-3, 1e-2, 1e-1):
      for seed in range(3):
        loss = 2.0 + 0.3 * math.log10(lr / 1e-2) ** 2 + effect * abs(i - middle) + 0.01 * seed + 1e-4 * ((i + seed) % 3)
        trial(tmp_path, n, loss, lora__alpha=alpha, optim__lr=lr, train__seed=seed)
        n += 1
  [found] = said(tmp_path, "Alpha")
  assert found.concluded and found.values["mattered"] is mattered
  assert ("did not matter" in found.text) is not mattered


def test_alpha_at_one_rate_concludes_nothing(tmp_path):
  for n, alpha in enumerate((4.0, 8.0, 16.0)):
    for seed in range(3):
      trial(tmp_path, 3 * n + seed, 2 + 0.1 * n + 0.01 * seed, lora__alpha=alpha, train__seed=seed)
  [found] = said(tmp_path, "Alpha")
  assert not found.concluded and "sweep optim.lr too" in found.text


SIZES = {"attention": 4000, "mlp": 2000, "all_linear": 6000}


def test_the_targets_that_pay_are_the_cheapest_that_are_enough(tmp_path):
  n = 0
  for place, loss in {"mlp": 2.4, "attention": 2.0, "all_linear": 2.001}.items():
    for seed in range(3):
      trial(tmp_path, n, loss + 0.01 * seed + 1e-4 * ((n * 7) % 3), lora__targets=place, train__seed=seed,
          trainable=SIZES[place])
      n += 1
  made, *_ = said(tmp_path, "Targets")
  assert made.concluded and made.values["targets"] == "attention" and "It pays to adapt attention" in made.text
  make_table(tmp_path)
  gain = statistics.mean(BASE - loss for loss in losses(table(tmp_path), targets="attention")) / 4
  assert f"attention {gain:.4g} (4,000 parameters)" in said(tmp_path, "Targets")[1].text


def test_targets_are_compared_at_equal_parameters(tmp_path):
  n = 0
  for place, size, gain in (("attention", 500, 0.3), ("mlp", 700, 0.2)):
    for rank in (1, 2, 4, 8):
      for seed in range(3):
        loss = 2.8 - gain * math.log(rank * size / 500) + 0.01 * seed
        trial(tmp_path, n, loss, lora__targets=place, lora__rank=rank, train__seed=seed, trainable=rank * size)
        n += 1
  equal = next(f for f in said(tmp_path, "Targets") if "parameters each" in f.text)
  place = equal.values["parameters"]
  assert place == pytest.approx(math.sqrt(700 * 4000)) and equal.values["order"] == ["attention", "mlp"]
  assert f"attention {2.8 - 0.3 * math.log(place / 500) + 0.01:.4f}" in equal.text


def test_a_budget_spent_in_several_places_says_where_it_pays_and_asks_for_no_other_rank(tmp_path):
  n = 0
  for place, rank, loss in (("mlp", 13, 2.4), ("attention", 6, 2.0), ("all_linear", 4, 2.002)):
    for seed in range(3):
      trial(tmp_path, n, loss + 0.01 * seed + 1e-4 * ((n * 7) % 3), lora__targets=place, lora__rank=rank,
          lora__parameters=0.03, train__seed=seed, trainable=49152 if rank == 4 else 53248)
      n += 1
  [made] = said(tmp_path, "Targets")
  assert made.concluded and made.values["targets"] == "attention"
  assert made.text.startswith("With 49,152 to 53,248 trainable parameters each, attention has the lowest loss: ")
  assert "Not measurably worse: all_linear, rank 4" in made.text and "Measurably worse: mlp, rank 13" in made.text
  assert said(tmp_path, "Rank") == [] and "rank" not in said(tmp_path, "Next")[0].text


def test_methods_are_told_apart_by_what_makes_them(tmp_path):
  kinds = {"lora": {}, "pissa": {"lora__init": "pissa"}, "rslora": {"lora__scaling": "rslora"},
           "dora": {"lora__method": "dora"}}
  for n, (name, settings) in enumerate(kinds.items()):
    for seed in range(3):
      loss = 2.0 + 0.1 * n + 0.01 * seed
      trial(tmp_path, 3 * n + seed, loss, train__seed=seed, change={"fingerprints": {"base": name, "data": "rows"}}
          if name == "pissa" else None, **settings)
  [group] = make_groups(read_sweep(tmp_path))
  assert [s.label for s in group.settings] == list(kinds)
  [found] = said(tmp_path, "Methods")
  assert found.concluded and found.values["best"] == "lora" and "measurably below every other" in found.text


# ---- what cannot be compared


@pytest.mark.parametrize(("change", "settings", "words"), [
  ({"fingerprints": {"base": "base0", "data": "other rows"}}, {}, "the data"),
  ({"fingerprints": {"base": "another", "data": "rows"}}, {}, "the base"),
  ({"base": {"kind": "weights", "digest": "x"}}, {}, "the base"),
  ({}, {"train__steps": 64}, "the number of steps"),
])
def test_trials_of_other_data_steps_or_base_are_not_compared(tmp_path, change, settings, words):
  ranks(tmp_path, {1: 2.5, 2: 2.0, 4: 2.0})
  for seed in range(3):
    trial(tmp_path, 9 + seed, 1.0 + 0.01 * seed, lora__rank=8, train__seed=seed, change=change, **settings)
  found = make_groups(read_sweep(tmp_path))
  assert [len(group.runs) for group in found] == [9, 3] and words in found[0].why
  assert said(tmp_path, "Rank")[0].values["rank"] == 2
  make_table(tmp_path)
  assert {r["group"] for r in table(tmp_path)} == {"0", "1"}


def test_two_groups_have_a_warning_and_plots_each(tmp_path):
  for n, steps in enumerate((32, 64)):
    ranks(tmp_path, {1: 2.5, 2: 2.0}, [0], first=2 * n, train__steps=steps)
  report = make_report(tmp_path)
  assert "differ in the number of steps" in report.warnings[0] and "not compared" in Page(tmp_path).text
  assert {"pareto-0.png", "pareto-1.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}


def test_seeds_of_the_base_and_of_the_data_do_not_part_a_group(tmp_path):
  n = 0
  for rank in (1, 2):
    for seed in range(3):
      prints = {"base": f"base{seed}", "data": f"rows{seed}"}
      trial(tmp_path, n, 2.0 + 0.1 * seed, lora__rank=rank, model__seed=seed, data__seed=seed,
          change={"fingerprints": prints})
      n += 1
  [group] = make_groups(read_sweep(tmp_path))
  assert [s.seeds for s in group.settings] == [3, 3]


# ---- the page


class Page:
  """report.html, taken apart."""

  def __init__(self, directory):
    self.text = (directory / "report.html").read_text(encoding="utf-8")
    self.pictures = [base64.b64decode(x) for x in re.findall(r'src="data:image/png;base64,([^"]+)"', self.text)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """Three things that vary, forgetting, and both reference lines."""
  directory = tmp_path_factory.mktemp("sweeps") / "grid"
  n = 0
  for place, size in (("attention", 500), ("mlp", 700)):
    for rank in (1, 4):
      for lr in (1e-3, 1e-2, 1e-1):
        for seed in range(2):
          loss = 2.0 + 0.2 * (rank < 4) + 0.3 * math.log10(lr / 1e-2) ** 2 + 0.01 * seed
          trial(directory, n, loss, lora__targets=place, lora__rank=rank, optim__lr=lr, train__seed=seed,
              trainable=size * rank, forgetting=0.1 * rank)
          n += 1
  references(directory, 1.8, n, [0])
  make_report(directory)
  return directory


def test_the_page_holds_every_plot_and_needs_no_network(large):
  page = Page(large)
  files = {path.name: path.read_bytes() for path in (large / "plots").iterdir()}
  assert set(files) == {f"{name}.png" for name in ("pareto", "share", "rate", "targets", "curves", "forgetting", "cost",
                                                   "parallel")}
  assert sorted(page.pictures) == sorted(files.values())
  assert all(data.startswith(b"\x89PNG") for data in page.pictures)
  assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r'src="data:[^"]+"', "", page.text))
  assert "prefers-color-scheme: dark" in page.text and 'alt=""' not in page.text
  notes = (large / "report.md").read_text(encoding="utf-8")
  assert all(f"(plots/{name})" in notes for name in files)


def test_what_is_no_longer_drawn_is_taken_away(tmp_path):
  ranks(tmp_path, {1: 2.5, 2: 2.0}, [0])
  references(tmp_path, 1.9, 2, [0])
  make_report(tmp_path)
  assert (tmp_path / "plots" / "share.png").exists()
  shutil.rmtree(tmp_path / "3")
  make_report(tmp_path)
  assert not (tmp_path / "plots" / "share.png").exists()
  assert "There is no trial with lora=full" in (tmp_path / "report.html").read_text()


def test_names_of_people_are_text_and_no_markup(tmp_path):
  trial(tmp_path, 0, 2.0, name="<b>Größe 大 | *x*", lora__targets="re:.*(query|key)<i>")
  trial(tmp_path, 1, 2.1, name="ß", lora__targets=["q_proj", "$v_proj$"])
  report = make_report(tmp_path)
  page = Page(tmp_path)
  assert "&lt;i&gt;" in page.text and "<i>" not in page.text and "q_proj,$v_proj$" in page.text
  assert table(tmp_path)[0]["name"] == "<b>Größe 大 | *x*"
  line = next(line for line in markdown(report).splitlines() if "query" in line and line.startswith("|"))
  assert len(re.findall(r"(?<!\\)\|", line)) == 9


def test_one_trial_and_sixty_trials_have_a_page(tmp_path):
  trial(tmp_path / "one", 0, 2.0)
  report = make_report(tmp_path / "one")
  assert len(Page(tmp_path / "one").pictures) == len(report.sections[0].plots) == 2
  ranks(tmp_path / "sixty", {rank: 3 - math.log(rank + 1) / 4 for rank in range(1, 31)}, [0, 1])
  report = make_report(tmp_path / "sixty")
  assert len(report.sections[0].rows) == 30 and report.summary == "60 trials (60 done) of 30 settings."


def test_a_sweep_in_which_nothing_finished_has_a_page_too(tmp_path):
  trial(tmp_path, 0, None, status="diverged", base=None)
  (tmp_path / "1").mkdir()
  report = make_report(tmp_path)
  assert not report.sections[0].findings[0].concluded and "No adapter finished" in Page(tmp_path).text
  (tmp_path / "0" / "config.yaml").unlink()
  assert not make_report(tmp_path).sections and "there is no config.yaml" in Page(tmp_path).text


@pytest.mark.thorough
def test_a_real_sweep_is_reported_from_the_command_line(in_tmp_path, capfd):
  argv = [*TINY, "train=quick", "train.steps=4", "data=sentences"]
  assert entry.run(["-m", "lora.rank=1,2", "train.seed=0,1", *argv, "hydra.sweep.dir=sweep"]) == 0
  sweep = in_tmp_path / "sweep"
  assert "Report: sweep/report.html" in capfd.readouterr().out  # by itself, at the end
  made = {"results.csv", "report.md", "report.html", "plots/pareto.png", "plots/curves.png", "plots/cost.png",
          "plots/spectrum.png", "plots/overlap.png"}
  before = {name: (sweep / name).read_bytes() for name in made}
  assert entry.run(["task=report", "run=sweep"]) == 0
  shown = capfd.readouterr().out
  assert "rank 2" in shown and "Report: sweep/report.html" in shown
  assert {str(p.relative_to(sweep)) for p in sweep.glob("plots/*")} <= made
  assert all((sweep / name).read_bytes() == before[name] for name in ("results.csv", "report.md"))
  rows = table(sweep)
  for row in rows:
    summary = json.loads((sweep / row["run"] / "summary.json").read_text())
    assert float(row["loss"]) == summary["losses"]["best"]
    assert row["trainable"] == str(summary["parameters"]["trainable"])
    assert yaml.safe_load((sweep / row["run"] / "config.yaml").read_text())["lora"]["rank"] == int(row["lora.rank"])
  for rank in ("1", "2"):
    assert f"{statistics.mean(losses(rows, rank=rank)):.4f}"[:6] in shown
