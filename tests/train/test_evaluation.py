"""Evaluation: every metric against a computation by hand, and a new metric wherever metrics appear."""

import csv
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import QUIET, TINY, on_stories, rows, summary, train

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import DataConfig, InputError
from lora_exp.config.metrics import METRICS, Metric
from lora_exp.config.override_grammar import parse
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.reading.run_reader import read_run, read_sweep
from lora_exp.report.verdicts.tuning import best_of
from lora_exp.sweep.study.study_journal import StudyJournal
from lora_exp.sweep.study.study_runner import objective_value
from lora_exp.sweep.study.study_settings import read_study
from lora_exp.train.base import make_base
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.step import features
from lora_exp.train.evaluating import evaluation
from lora_exp.train.evaluating.evaluation import Evaluation, byte_lengths, held_out, put_eval_batches
from lora_exp.train.evaluating.metric_errors import difference, standard_error
from lora_exp.train.job import make_job
from lora_exp.train.plan import make_plan

BYTES = 256  # ids below it are a byte each; the others are control tokens


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory):
  """A random model on prompts and responses; one token is far more likely than the others."""
  [cfg] = check_command_line([*TINY, "data=arithmetic", "data.limit=60"]).jobs
  plan = make_plan(cfg)
  base, _ = make_base(plan)
  return plan, make_job(plan, base, 1), make_rows(cfg.data, plan.tokenizer, tmp_path_factory.mktemp("rows"))


def logits_of(job, batch) -> np.ndarray:
  """Logits (B, T, V) of the first trial."""
  first = lambda tree: jax.tree.map(lambda x: x[0], tree)
  model = assemble(job.program, first(job.state.params), first(job.trials), job.frozen, None)
  return np.asarray(model.logits(features(model, batch)), np.float64)


def some_right(job, batches: list[dict]) -> list[dict]:
  """The batches with every other response replaced by the most likely tokens, one of them wrong in its last token."""
  for batch in batches:
    likely = logits_of(job, batch).argmax(-1)
    for b in range(0, len(likely), 2):
      batch["targets"][b] = np.where(batch["answers"][b], likely[b], batch["targets"][b])
    last = np.flatnonzero(batch["answers"][2])[-1]
    batch["targets"][2, last] = (likely[2, last] + 1) % BYTES
  return batches


def sums_by_hand(job, batches: list[dict]) -> dict[str, float]:
  """The sums of all batches, a token at a time."""
  sums = dict.fromkeys(("loss", "correct", "count", "bytes", "exact", "responses"), 0.0)
  for batch in batches:
    z = logits_of(job, batch)
    log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    right = z.argmax(-1) == batch["targets"]
    for b, t in zip(*np.nonzero(batch["weights"]), strict=True):
      target = batch["targets"][b, t]
      sums["loss"] -= log_p[b, t, target]
      sums["correct"] += right[b, t]
      sums["count"] += 1
      sums["bytes"] += target < BYTES
    for b in np.flatnonzero(batch["answers"].any(1)):
      sums["responses"] += 1
      sums["exact"] += all(right[b, t] for t in np.flatnonzero(batch["answers"][b]))
  return sums


def test_every_metric_equals_a_computation_by_hand(arithmetic):
  plan, job, rows = arithmetic
  batches = some_right(job, [dict(batch) for batch in eval_batches(rows, 8, None)])
  placed = put_eval_batches(batches, job.put, byte_lengths(plan.cfg.data, plan.tokenizer))
  [found] = held_out(job.evaluate, job.state.params, job.trials, job.frozen, placed)
  sums = sums_by_hand(job, batches)
  assert 0 < sums["exact"] < sums["responses"] == 12 and 0 < sums["correct"] < sums["count"]
  expected = {
    "loss": sums["loss"] / sums["count"],
    "perplexity": math.exp(sums["loss"] / sums["count"]),
    "bits_per_byte": sums["loss"] / math.log(2) / sums["bytes"],
    "accuracy": sums["correct"] / sums["count"],
    "exact": sums["exact"] / sums["responses"]}
  assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
  assert (found.row()["counted"], found.row()["examples"]) == (sums["count"], 12)


@pytest.mark.parametrize("data", [["data=arithmetic", "data.limit=60"], []])
def test_the_bytes_of_all_tokens_are_those_of_the_rows(data, tmp_path):
  [cfg] = check_command_line([*TINY, *(data or on_stories(tmp_path))]).jobs
  plan = make_plan(cfg)
  made = make_rows(cfg.data, plan.tokenizer, tmp_path)
  lengths = byte_lengths(cfg.data, plan.tokenizer)
  counted = [evaluation.count_batch(batch, lengths) for batch in eval_batches(made, 4, None)]
  assert sum(counts["bytes"] for counts in counted) == made.eval_bytes > 0
  assert sum(counts["count"] for counts in counted) == made.eval_tokens


def test_padding_in_the_loss_spells_no_text(arithmetic):
  plan, *_ = arithmetic
  assert byte_lengths(DataConfig(packing="pad", pad_in_loss=True), plan.tokenizer) is None
  assert byte_lengths(DataConfig(packing="pack", pad_in_loss=True), plan.tokenizer) is not None


def test_the_error_of_a_ratio_is_cochrans_estimate():
  correct, count = np.array([3.0, 9.0, 4.0, 6.0]), np.array([10.0, 12.0, 9.0, 11.0])
  found = Evaluation({"correct": correct, "count": count}, {"correct": correct.sum(), "count": count.sum()})
  share = correct.sum() / count.sum()
  expected = math.sqrt(4 / 3 * ((correct - share * count) ** 2).sum()) / count.sum()
  assert standard_error(METRICS["accuracy"], found) == pytest.approx(expected, rel=1e-6)
  assert difference(METRICS["accuracy"], found, found) == (0, 0)


def test_the_error_of_a_difference_is_that_of_repeated_draws():
  rng = np.random.default_rng(0)

  def scored(nats: np.ndarray, tokens: np.ndarray) -> Evaluation:
    batch_sums = {"loss": nats, "count": tokens}
    return Evaluation(batch_sums, {name: float(values.sum()) for name, values in batch_sums.items()})

  def drawn() -> tuple[float, float | None]:
    tokens = rng.integers(50, 100, 40).astype(float)
    hard = rng.normal(3, 1, 40)  # batches differ much more than the two models do
    trained = scored(tokens * (hard - 0.2 + rng.normal(0, 0.1, 40)), tokens)
    return difference(METRICS["loss"], trained, scored(tokens * hard, tokens))

  gains, errors = np.array([drawn() for _ in range(400)]).T
  assert gains.mean() == pytest.approx(-0.2, abs=0.003)
  assert errors.mean() == pytest.approx(gains.std(), rel=0.15)
  one = scored(np.ones(1), np.ones(1))
  assert difference(METRICS["loss"], one, one) == (0, None)


# A metric that is not in the repository


def in_top_five(logits_BV: jax.Array, targets_B: jax.Array) -> jax.Array:
  """(B,) whether a target is among the five most likely tokens."""
  target_B1 = jnp.take_along_axis(logits_BV, targets_B[:, None], axis=-1)
  return (logits_BV > target_B1).sum(-1) < 5


def top_five(predictions: evaluation.Predictions) -> jax.Array | None:
  """The number of targets among the five most likely tokens; None for numeric examples."""
  if predictions.x_BTD is None:
    return None
  batch = predictions.batch
  return predictions.map_logits(in_top_five, batch["targets"]) * batch["weights"]


TOP_FIVE = Metric("top_five", "top-5 accuracy", sums=("top_five", "count"), higher_is_better=True)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory):
  """A sweep of two runs made while the metric is declared; it stays declared for the tests of this module."""
  directory = tmp_path_factory.mktemp("sweep")
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(METRICS, "top_five", TOP_FIVE)
    patch.setitem(evaluation.SUMS, "top_five", top_five)
    argv = [*TINY, "data=arithmetic", "data.limit=40", "train=quick", "train.steps=2", "expectations={top_five: 0}"]
    for number, lr in enumerate(("0.0001", "0.3")):
      train(directory / str(number), *argv, f"optim.lr={lr}")
    yield directory


def test_a_new_metric_is_in_the_files_of_a_run(sweep):
  for run in (sweep / "0", sweep / "1"):
    values = [row["top_five"] for row in rows(run, "eval")]
    assert len(values) == 2 and all(0 <= value <= 1 for value in values)
    assert all(row["accuracy"] <= row["top_five"] for row in rows(run, "eval"))
    scores = summary(run)["scores"]
    assert [scores[state]["top_five"] for state in ("base", "final")] == values
    assert scores["best"]["top_five"] in values[1:]
    results = summary(run)["expectations"]
    assert (results["top_five"]["found"], results["top_five"]["holds"]) == (values[-1], True)


def test_a_new_metric_is_evaluated(sweep, capfd):
  assert entry.run(["task=evaluate", f"run={sweep / '1'}"]) == 0
  said = " ".join(capfd.readouterr().out.split())
  base, trained = [json.loads(line) for line in (sweep / "1" / "evaluations.jsonl").read_text().splitlines()]
  scores = summary(sweep / "1")["scores"]
  assert (base["top_five"], trained["top_five"]) == (scores["base"]["top_five"], scores["best"]["top_five"])
  assert trained["against_base"]["top_five"]["difference"] == trained["top_five"] - base["top_five"]
  assert "top-5 accuracy" in said and "held-out top-5 accuracy" in said and "held-out exact match" in said


def test_a_new_metric_ranks_the_settings_of_a_report(sweep):
  assert entry.run(["task=report", f"run={sweep}", "report.metric=top_five"]) == 0
  table = list(csv.DictReader((sweep / "results.csv").read_text().splitlines()))
  values = [float(row["top_five"]) for row in table]
  halves = [summary(sweep / row["run"])["halves"] for row in table]
  assert values == [half["report"]["exported"]["top_five"] for half in halves]
  assert values != [half["tuning"]["exported"]["top_five"] for half in halves]
  assert len({row["top_five_base"] for row in table}) == 1
  page = (sweep / "report.md").read_text()
  assert f"highest mean held-out top-5 accuracy: {table[values.index(max(values))]['lr']}. Not settled" in page
  headings = next(line for line in page.splitlines() if line.startswith("| setting"))
  for label in ("loss", "perplexity", "bits per byte", "accuracy", "exact match"):
    assert f"| {label} |" in headings
  [group] = make_groups(read_sweep(sweep), TOP_FIVE)
  assert best_of(group.adapted).score.mean == max(values) > min(values)


def test_a_new_metric_is_the_objective_of_a_study(sweep):
  for number in (0, 1):
    run = read_run(number, sweep / str(number))
    tuning = summary(sweep / str(number))["halves"]["tuning"]["exported"]
    assert objective_value(run, "top_five") == tuning["top_five"]
  node = {"params": {"lora.rank": "choice(1,2)"}, "n_trials": 2, "width": 2, "sampler": "random", "seed": 0,
          "rungs": [1], "keep": 0.5}
  overrides = lambda texts: parse(texts, None)[0]
  study = read_study({**node, "objectives": ["top_five"]}, [], overrides)
  assert study.signs == [-1]
  assert StudyJournal(study, sweep).study.direction.name == "MAXIMIZE"
  with pytest.raises(InputError, match=r"no such objective top_fife; choose loss, .*; did you mean top_five"):
    read_study({**node, "objectives": ["top_fife"]}, [], overrides)


@pytest.mark.slow
def test_a_teacher_gives_no_perplexity(tmp_path, capfd):
  data = ["data=planted", "data.source=text", "data.view=null", *on_stories(tmp_path)[1:]]
  run = train(tmp_path / "run", "model=minigpt_tiny", "model.base=random", *QUIET, *data, "train.steps=1",
              "train.eval_tokens=256", "train.eval_every=0")
  capfd.readouterr()
  assert entry.run(["task=evaluate", f"run={run}"]) == 0
  said = capfd.readouterr().out
  assert "perplexity" not in said and "bits per byte" not in said and "accuracy" in said
  for line in Path(run / "evaluations.jsonl").read_text().splitlines():
    values = json.loads(line)
    assert values["perplexity"] is None and values["bits_per_byte"] is None and values["loss"] >= 0
