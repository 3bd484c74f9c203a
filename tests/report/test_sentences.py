"""Sentences of the findings against results.csv: every number is computed again from its rows.

The checker knows results.csv and the text alone. It reads the numbers in sentences, and computes means, intervals,
shares and counts itself.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reports import read_results
from scipy.stats import t

from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.findings.finding import Finding
from lora_exp.report.sweep_report import make_table
from sweeps import BASE, references, trial

Rows = list[dict[str, str]]
NUMBER = r"-?[\d,]*\.?\d+(?:e-?\d+)?"


class Results:
  """The scored trials of results.csv by setting."""

  def __init__(self, rows: Rows):
    scored = [row for row in rows if row["purpose"] == "score" and row["setting"]]
    self.labels = list(dict.fromkeys(row["setting"] for row in scored))
    self.rows = {label: [row for row in scored if row["setting"] == label] for label in self.labels}
    self.gains = {label: [float(row["gain"]) for row in found if row["status"] == "done"]
                  for label, found in self.rows.items()}
    self.adapted = [label for label in self.labels if self.rows[label][0]["method"] not in ("full", "frozen")]

  def diverged(self, label: str) -> int:
    return sum(row["status"] == "diverged" for row in self.rows[label])

  def parameters(self, label: str) -> int:
    return int(self.rows[label][0]["trainable"])

  def mean(self, label: str) -> float:
    return statistics.fmean(self.gains[label])

  def half(self, label: str) -> float:
    """Half of the 95 % interval of the mean gain."""
    gains = self.gains[label]
    return float(t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / math.sqrt(len(gains))

  @property
  def best(self) -> str:
    """The adapted setting with the highest mean gain of those without a diverged seed."""
    return max((label for label in self.adapted if not self.diverged(label)), key=self.mean)


def disagreements(finding: Finding, results: Results) -> Iterator[str]:
  """Every number in a finding that is not what results.csv has, in words."""
  everything = f"{finding.text} {finding.evidence}"
  for found, expected, what in numbers(everything, results):
    digits = len(found.partition(".")[2].partition("e")[0])
    if not math.isclose(float(found.replace(",", "")), expected, abs_tol=0.51 * 10**-digits, rel_tol=1e-9):
      yield f"{what}: {found}, and results.csv has {expected:.6g}"


def numbers(text: str, results: Results) -> Iterator[tuple[str, float, str]]:
  """(number as written, value by results.csv, what it is) of every number that the checker can compute."""
  for label in sorted(results.labels, key=len, reverse=True):
    name = rf"(?<![\w.]){re.escape(label)}"
    for found in re.findall(rf"{name} \(({NUMBER}) % in the mean\)", text):
      top = results.mean(results.best)
      yield found, 100 * (top - results.mean(label)) / top, f"{label} short of {results.best}"
    for found, half in re.findall(rf"{name}: gain ({NUMBER}) ± ({NUMBER})", text):
      yield found, results.mean(label), f"gain of {label}"
      yield half, results.half(label), f"interval of {label}"
    for found, total in re.findall(rf"{name}(?:: gain [^;]*?,)? diverged in (\d+) of (\d+)", text):
      yield found, results.diverged(label), f"diverged seeds of {label}"
      yield total, len(results.rows[label]), f"seeds of {label}"
    for found, count in re.findall(rf"{name} ({NUMBER}) \(({NUMBER}) parameters\)", text):
      yield found, results.mean(label) / results.parameters(label) * 1000, f"gain of {label} by parameter"
      yield count, results.parameters(label), f"parameters of {label}"
    yield from recovered(text, name, label, results)
  yield from of_named(text, results)


def recovered(text: str, name: str, label: str, results: Results) -> Iterator[tuple[str, float, str]]:
  """The share of full fine-tuning's gain that a setting recovers."""
  for found in re.findall(rf"{name} recovers ({NUMBER}) %", text):
    full = next(other for other in results.labels if results.rows[other][0]["method"] == "full")
    yield found, 100 * results.mean(label) / results.mean(full), f"share of {label}"
    [(gain, half, of, of_half)] = re.findall(rf"Gain ({NUMBER}) ± ({NUMBER}) against ({NUMBER}) ± ({NUMBER})", text)
    for given, value in ((gain, results.mean(label)), (half, results.half(label)),
                         (of, results.mean(full)), (of_half, results.half(full))):  # fmt: skip
      yield given, value, f"gains of {label} and full"
    [percent] = re.findall(rf"It trains ({NUMBER}) % of the parameters", text)
    yield percent, 100 * results.parameters(label) / results.parameters(full), f"parameters of {label}"


def of_named(text: str, results: Results) -> Iterator[tuple[str, float, str]]:
  """What is said of the setting that a sentence names by its value alone."""
  for rank, gain, half in re.findall(rf"Rank (\d+) is enough.*?loss is ({NUMBER}) ± ({NUMBER}) below", text):
    [label] = [label for label in results.adapted if results.rows[label][0]["rank"] == rank]
    yield gain, results.mean(label), f"gain of rank {rank}"
    yield half, results.half(label), f"interval of rank {rank}"
  for targets, count in re.findall(rf"It pays to adapt (\w+).*?fewest parameters \(({NUMBER})\)", text):
    [label] = [label for label in results.adapted if results.rows[label][0]["targets"] == targets]
    yield count, results.parameters(label), f"parameters of {targets}"
  for rate in re.findall(rf"Learning rate with the lowest mean held-out loss: ({NUMBER})", text):
    yield rate, float(results.rows[results.best][0]["lr"]), "the best rate"


# ---- sweeps


def settings(directory: Path, key: str, losses: dict, more: Callable[[object], dict] | None = None) -> None:
  """Three seeds of each value of `key`, and references."""
  for i, (value, loss) in enumerate(losses.items()):
    for seed in range(3):
      own = loss + 0.003 * math.sin(7.0 * i + 3.0 * seed) + 0.01 * (seed - 1)
      trial(directory, 3 * i + seed, own, train__seed=seed, **{key: value}, **(more(value) if more else {}))
  references(directory, 1.96, 3 * len(losses))


def of_ranks(directory: Path) -> None:
  settings(directory, "lora__rank", {1: 2.5, 2: 2.2, 4: 2.01, 8: 2.0, 16: 2.0})


def with_a_diverged_seed(directory: Path) -> None:
  settings(directory, "lora__rank", {1: 2.5, 4: 2.01, 8: 2.0})
  trial(directory, 99, None, "diverged", lora__rank=1, train__seed=3)


def of_alphas(directory: Path) -> None:
  settings(directory, "lora__alpha", {4.0: 2.2, 16.0: 2.0, 64.0: 2.1})


def parameters_of(targets: object) -> dict:
  return {"trainable": {"attention": 8_000, "mlp": 4_000, "all_linear": 12_000}[str(targets)]}


def of_targets(directory: Path) -> None:
  settings(directory, "lora__targets", {"attention": 2.005, "mlp": 2.2, "all_linear": 2.0}, parameters_of)


def budget_of(targets: object) -> dict:
  return {"trainable": 8_000, "lora__parameters": 8_000}


def of_a_budget(directory: Path) -> None:
  settings(directory, "lora__targets", {"attention": 2.0, "mlp": 2.2, "all_linear": 2.1}, budget_of)


def of_methods(directory: Path) -> None:
  settings(directory, "lora__method", {"lora": 2.0, "dora": 2.005, "ia3": 2.3})


def of_rates(directory: Path) -> None:
  settings(directory, "optim__lr", {0.001: 2.3, 0.004: 2.0, 0.016: 2.2})


KINDS = {of_ranks: 4, with_a_diverged_seed: 4, of_alphas: 3, of_targets: 4, of_a_budget: 3, of_methods: 3, of_rates: 2}


def findings_and_rows(directory: Path) -> tuple[list[Finding], Rows]:
  _, [group], _ = make_table(directory)
  return all_findings(group), read_results(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_agree_with_the_table(kind, tmp_path):
  kind(tmp_path)
  findings, rows = findings_and_rows(tmp_path)
  results = Results(rows)
  assert [problem for finding in findings for problem in disagreements(finding, results)] == []
  checked = [what for finding in findings for _, _, what in numbers(f"{finding.text} {finding.evidence}", results)]
  assert len(checked) >= KINDS[kind], checked


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_table_disagrees(kind, tmp_path):
  """The gain of one scored trial changes by a tenth."""
  kind(tmp_path)
  findings, rows = findings_and_rows(tmp_path)
  row = next(row for row in rows if row["setting"] == Results(rows).best)
  row["gain"] = str(0.9 * float(row["gain"]))
  results = Results(rows)
  assert [problem for finding in findings for problem in disagreements(finding, results)]


def test_one_seed_of_each_is_said(tmp_path):
  for n, (alpha, rate) in enumerate((a, r) for a in (4.0, 16.0, 64.0) for r in (0.001, 0.004, 0.016)):
    loss = 2.0 + 0.1 * abs(math.log2(rate / 0.004)) + 0.1 * abs(math.log2(alpha / 16))
    trial(tmp_path, n, loss, lora__alpha=alpha, optim__lr=rate)
  findings, _ = findings_and_rows(tmp_path)
  said = {finding.topic: finding.text for finding in findings if not finding.concluded}
  assert "have 1 seed, and three are needed" in said["Alpha"]
  assert said["Rate"].endswith("Fewer than three seeds: no order is concluded.")


def test_states_follow_from_the_table(tmp_path):
  """What is called short is short in the means, and the named rank is the smallest that is not."""
  of_ranks(tmp_path)
  findings, rows = findings_and_rows(tmp_path)
  results = Results(rows)
  [rank] = [finding for finding in findings if finding.topic == "Rank"]
  top = results.mean(results.best)
  short = {int(results.rows[label][0]["rank"]): 1 - results.mean(label) / top for label in results.adapted}
  assert rank.values["rank"] == min(value for value, share in short.items() if share < 0.05)
  assert all(short[value] > 0.05 for value in rank.values["insufficient"])
  assert all(short[value] < 0.05 for value in rank.values["sufficient"])
  assert BASE - top == pytest.approx(min(statistics.fmean(BASE - gain for gain in results.gains[label])
                                         for label in results.adapted))  # fmt: skip
