"""The page, its Markdown and its plots."""

import json
import math
import re
import shutil
import statistics

import pytest
import yaml
from reports import Page, losses, read_results
from runs import TINY

from lora_exp.cli import main as entry
from lora_exp.report.page.markdown import markdown
from lora_exp.report.sweep_report import make_report
from sweeps import ranks, references, trial


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


def test_page_holds_every_plot_and_needs_no_network(large):
  page = Page(large)
  files = {path.name: path.read_bytes() for path in (large / "plots").iterdir()}
  assert set(files) == {f"{name}.png" for name in ("pareto", "share", "rate", "targets", "curves", "forgetting", "cost",
                                                   "parallel")}
  assert sorted(page.figures) == sorted(files.values())
  assert all(data.startswith(b"\x89PNG") for data in page.figures)
  assert not re.search(r"https?:|//[a-z]|<link|@import|url\(", re.sub(r'src="data:[^"]+"', "", page.text))
  assert "prefers-color-scheme: dark" in page.text and 'alt=""' not in page.text
  notes = (large / "report.md").read_text(encoding="utf-8")
  assert all(f"(plots/{name})" in notes for name in files)


def test_plot_that_is_no_longer_drawn_is_removed(tmp_path):
  ranks(tmp_path, {1: 2.5, 2: 2.0}, [0])
  references(tmp_path, 1.9, 2, [0])
  make_report(tmp_path)
  assert (tmp_path / "plots" / "share.png").exists()
  shutil.rmtree(tmp_path / "3")
  make_report(tmp_path)
  assert not (tmp_path / "plots" / "share.png").exists()
  assert "There is no trial with lora=full" in (tmp_path / "report.html").read_text()


def test_names_are_escaped(tmp_path):
  trial(tmp_path, 0, 2.0, name="<b>Größe 大 | *x*", lora__targets="re:.*(query|key)<i>")
  trial(tmp_path, 1, 2.1, name="ß", lora__targets=["q_proj", "$v_proj$"])
  report = make_report(tmp_path)
  page = Page(tmp_path)
  assert "&lt;i&gt;" in page.text and "<i>" not in page.text and "q_proj,$v_proj$" in page.text
  assert read_results(tmp_path)[0]["name"] == "<b>Größe 大 | *x*"
  line = next(line for line in markdown(report).splitlines() if "query" in line and line.startswith("|"))
  assert len(re.findall(r"(?<!\\)\|", line)) == 9


def test_page_of_one_trial_and_of_sixty(tmp_path):
  trial(tmp_path / "one", 0, 2.0)
  report = make_report(tmp_path / "one")
  assert len(Page(tmp_path / "one").figures) == len(report.sections[0].plots) == 2
  ranks(tmp_path / "sixty", {rank: 3 - math.log(rank + 1) / 4 for rank in range(1, 31)}, [0, 1])
  report = make_report(tmp_path / "sixty")
  assert len(report.sections[0].rows) == 30 and report.summary == "60 trials (60 done) of 30 settings."


def test_page_of_a_sweep_in_which_nothing_finished(tmp_path):
  trial(tmp_path, 0, None, status="diverged", base=None)
  (tmp_path / "1").mkdir()
  report = make_report(tmp_path)
  assert not report.sections[0].findings[0].concluded and "No adapter finished" in Page(tmp_path).text
  (tmp_path / "0" / "config.yaml").unlink()
  assert not make_report(tmp_path).sections and "there is no config.yaml" in Page(tmp_path).text


@pytest.mark.slow
def test_real_sweep_is_reported_from_the_command_line(in_tmp_path, capfd):
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
  rows = read_results(sweep)
  for row in rows:
    summary = json.loads((sweep / row["run"] / "summary.json").read_text())
    assert float(row["loss"]) == summary["losses"]["best"]
    assert row["trainable"] == str(summary["parameters"]["trainable"])
    assert yaml.safe_load((sweep / row["run"] / "config.yaml").read_text())["lora"]["rank"] == int(row["lora.rank"])
  for rank in ("1", "2"):
    assert f"{statistics.mean(losses(rows, rank=rank)):.4f}"[:6] in shown
