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
from lora_exp.report.page.html_page import vega_script
from lora_exp.report.page.markdown import markdown
from lora_exp.report.plots.colours import BEST, Colours
from lora_exp.report.plots.loss_curves import _below
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
  assert set(files) == {f"{name}.png" for name in ("pareto", "rate", "targets", "curves", "forgetting", "cost",
                                                   "parallel")}
  assert all(data.startswith(b"\x89PNG") for data in files.values())
  assert len(page.figures) == len(files) and page.loads == []
  assert all(figure["label"] and figure["charts"] for figure in page.figures)
  assert "prefers-color-scheme: dark" in page.text
  notes = (large / "report.md").read_text(encoding="utf-8")
  assert all(f"(plots/{name})" in notes for name in files)


def test_plot_that_is_no_longer_drawn_is_removed(tmp_path):
  ranks(tmp_path, {1: 2.5, 2: 2.0}, [0])
  references(tmp_path, 1.9, 2, [0])
  trial(tmp_path, 4, 2.1, lora__rank=4, forgetting=0.1)
  make_report(tmp_path)
  assert (tmp_path / "plots" / "forgetting.png").exists()
  shutil.rmtree(tmp_path / "4")
  shutil.rmtree(tmp_path / "3")
  make_report(tmp_path)
  assert not (tmp_path / "plots" / "forgetting.png").exists()
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
    assert float(row["loss"]) == summary["halves"]["report"]["exported"]["loss"]
    assert row["trainable"] == str(summary["parameters"]["trainable"])
    assert yaml.safe_load((sweep / row["run"] / "config.yaml").read_text())["lora"]["rank"] == int(row["lora.rank"])
  for rank in ("1", "2"):
    assert f"{statistics.mean(losses(rows, rank=rank)):.4f}"[:6] in shown


def test_page_starts_with_the_question_and_its_answer(large):
  page, notes = Page(large), (large / "report.md").read_text(encoding="utf-8")
  assert page.headings[0] == "Which rank is enough?"
  assert notes.startswith(f"# {page.headings[0]}\n\n> ")
  answer = make_report(large).sections[0].headline.answer
  places = [page.text.index(text) for text in ("<h1>", answer.split(";")[0], '<dl class="facts">', "<figure")]
  assert places == sorted(places)
  assert "random weights (model.seed=0), not a trained model" in page.text and "- Base: random weights" in notes


def test_page_is_well_formed_html(large):
  page = Page(large)
  assert page.mismatched == []
  assert page.text.startswith("<!doctype html>") and '<html lang="en">' in page.text
  assert len(re.findall(r"\bid=\"([^\"]+)\"", page.text)) == len(set(re.findall(r"\bid=\"([^\"]+)\"", page.text)))


def test_rows_of_the_tables_are_those_of_the_csv(large):
  settings, trials = Page(large).tables[0], Page(large).tables[-1]
  rows = read_results(large)
  assert [row[0] for row in trials[1:]] == [row["number"] for row in rows]
  assert [row[trials[0].index("held-out loss")] for row in trials[1:]] == [f"{float(row['loss']):.4f}" for row in rows]
  by_setting = {name: losses(rows, setting=name) for name in {row["setting"] for row in rows}}
  assert {row[0] for row in settings[1:]} == by_setting.keys()
  column = settings[0].index("held-out loss")
  assert all(float(row[column].split()[0]) == pytest.approx(statistics.mean(by_setting[row[0]]), abs=6e-5)
             for row in settings[1:])


def test_charts_hold_every_setting_and_seed(large):
  rows = read_results(large)
  pareto = Page(large).figures[0]["charts"][0]
  points = [row for table in pareto["datasets"].values() for row in table if "seeds" in row]
  adapted = {row["setting"] for row in rows if row["method"] == "lora"}
  assert {row["setting"] for row in points} == adapted
  for row in points:
    seeds = sorted(map(float, row["seeds"].split(", ")))
    assert seeds == pytest.approx(sorted(losses(rows, setting=row["setting"])), abs=6e-5)


def test_diverged_trials_have_a_mark(tmp_path):
  ranks(tmp_path, {1: 2.5, 2: 2.0}, [0])
  trial(tmp_path, 2, None, status="diverged", lora__rank=2, train__seed=1)
  make_report(tmp_path)
  pareto = Page(tmp_path).figures[0]["charts"][0]
  marked = [row for table in pareto["datasets"].values() for row in table if "trials" in row]
  assert [(row["setting"], row["diverged"], row["trials"]) for row in marked] == [("rank 2", "1 of 2 trials", "2")]


def test_null_is_a_level_of_its_key_in_the_plots(tmp_path):
  values = [(rank, layers, clip) for rank in (1, 2) for layers in (None, [0], [0, 1]) for clip in (None, 0.5, 1.0)]
  for n, (rank, layers, clip) in enumerate(values):
    trial(tmp_path, n, 2.0 + 0.01 * n, lora__rank=rank, lora__layers=layers, optim__clip=clip)
  [section] = make_report(tmp_path).sections
  assert section.group.levels("lora.layers") == [None, "0", "0,1"]
  assert section.group.levels("optim.clip") == [None, 0.5, 1.0]
  assert (tmp_path / "plots" / "parallel.png").exists()
  figure = next(figure for figure in Page(tmp_path).figures if figure["label"].startswith("Of 18 settings"))
  [marks] = [rows for rows in figure["charts"][0]["datasets"].values() if "text" in rows[0]]
  assert [row["text"] for row in marks if row["axis"] == "clip"] == ["null", "0.5", "1"]


def test_null_has_a_colour_beside_those_of_numbers(tmp_path):
  for n, clip in enumerate((0.5, None, 1.0)):
    trial(tmp_path, n, 2.0 + 0.1 * n, optim__clip=clip)
  colours = Colours(make_report(tmp_path).sections[0].group)
  assert colours.numeric and colours.of_level(None) == BEST
  assert len({colours.of_level(clip) for clip in (None, 0.5, 1.0)}) == 3


def test_curves_end_where_the_axis_does():
  rows = [{"trial": 0, "step": step, "y": y} for step, y in enumerate((3.0, 1.0, 2.0, 1.0))]
  rows.append({"trial": 1, "step": 0, "y": 3.0})
  drawn = [(row["step"], row["y"]) for row in _below(rows, 1.5)]
  assert drawn == [(0, None), (0.75, 1.5), (1, 1.0), (1.5, 1.5), (2, None), (2.5, 1.5), (3, 1.0), (0, None)]


def test_the_script_of_the_page_is_kept(tmp_path):
  ranks(tmp_path / "a", {1: 2.5, 2: 2.0}, [0])
  make_report(tmp_path / "a", cache_dir=str(tmp_path / "cache"))
  [script] = (tmp_path / "cache").glob("page/*/vega.js")
  assert script.read_text("utf-8") in Page(tmp_path / "a").text
  made = script.stat()
  assert vega_script(str(tmp_path / "cache")) == script.read_text("utf-8")
  assert (script.stat().st_ino, script.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns), "it was made again"
  blocked = tmp_path / "file"
  blocked.write_text("")
  assert "vegaEmbed" in vega_script(str(blocked / "cache"))


def test_command_and_day_come_from_the_files_of_the_sweep(tmp_path):
  ranks(tmp_path, {1: 2.5, 2: 2.0}, [0])
  overrides = {"task": ["lora.rank=1,2", "name=a b"], "hydra": ["hydra.mode=MULTIRUN", "hydra.sweep.dir=/secret"]}
  (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": overrides}}))
  (tmp_path / "sweep.jsonl").write_text('{"event": "done", "trial": 0, "time": "2026-01-02T03:04:05+0000"}\n')
  facts = dict(make_report(tmp_path).compared)
  assert facts["Command"] == "python -m lora_exp -m lora.rank=1,2 'name=a b'" and facts["Day"] == "2026-01-02"
  (tmp_path / "multirun.yaml").write_text("hydra: [")
  assert "Command" not in dict(make_report(tmp_path).compared)
