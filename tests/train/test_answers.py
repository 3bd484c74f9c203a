"""Generated answers: scores by hand, items of rows, decoding of a whole pack, and the files of a run."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from packs import bent, job_of, quickly, small, trial
from runs import TINY, rows, summary, train

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import DataConfig, InputError, SampleConfig
from lora_exp.config.answer_scores import Answer
from lora_exp.config.metrics import GENERATED, METRICS
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.data.sources import open_source
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.report.reading.document_losses import read_document_losses
from lora_exp.train.answers.answer_decoder import AnswerDecoder
from lora_exp.train.answers.answer_evaluation import AnswerEvaluator
from lora_exp.train.answers.answer_items import answer_items, chosen_items
from lora_exp.train.answers.custom_score import CustomScore
from lora_exp.train.evaluating.evaluation import Evaluation
from lora_exp.train.sampling.sampler import Sampler

TOKENIZER = get_tokenizer("bytes")
PROMPTS = ["One day", "a", "The little dog ran and saw"]


@pytest.mark.parametrize(("name", "text", "reference", "expected"), [
  ("exact_match", "The cat, sat!", "cat sat", 1.0),
  ("exact_match", "cats", "cat", 0.0),
  ("f1", "the cat sat down", "a cat ran", 2 / 5),
  ("f1", "cat cat", "cat", 2 / 3),
  ("f1", "!", "", 1.0),
  ("numeric_match", "3 and 4 are 1,007.0", "#### 1007", 1.0),
  ("numeric_match", "-5", "5", 0.0),
  ("numeric_match", "none", "none", 0.0),
  ("rouge_l", "the cat sat", "the cat ran", 2 / 3),
  ("chrf", "abc", "abc", 100.0),
  ("valid_json", '{"a": [1, null]}', "", 1.0),
  ("valid_json", "[NaN]", "", 0.0),
  ("valid_json", "[" * 10_000, "", 0.0),
])
def test_scores_by_hand(name, text, reference, expected):
  assert METRICS[name].score(Answer("", reference, text)) == pytest.approx(expected)


def test_every_metric_of_answers_has_a_score():
  without = [metric.name for metric in METRICS.values() if GENERATED in metric.sums and metric.score is None]
  assert without == ["custom"]


@pytest.mark.parametrize(("body", "problem"), [
  ("def score(a, b, c): return 1 / 0", "score raised ZeroDivisionError: division by zero for the answer 'x y' to the "
   "prompt 'p' .reference 'r'."),
  ("def score(a, b, c): return float('nan')", "score returned nan, not a finite number, for the answer"),
  ("def score(a, b, c): return '0.5'", "score returned '0.5', not a finite number"),
  ("def score(a, b, c): return None", "score returned None, not a finite number"),
  ("def score(a): return 1", "score raised TypeError: score.. takes 1 positional argument"),
  ("import sys\ndef score(a, b, c): sys.exit(3)", "score raised SystemExit: 3"),
  ("def scores(): pass", "has no function score"),
  ("def score(", "cannot be loaded: SyntaxError: .* line 1"),
])
def test_a_bad_metric_file_names_the_row(tmp_path, body, problem):
  file = tmp_path / "metric.py"
  file.write_text(body)
  with pytest.raises(InputError, match=problem):
    CustomScore(file)(Answer("p", "r", "x\ny"))


def test_a_metric_file_prints_nothing(tmp_path, capsys):
  file = tmp_path / "metric.py"
  file.write_text("def score(prediction, reference, prompt):\n  print('noise')\n  return len(prediction)")
  score = CustomScore(file)
  assert [score(Answer("", "", text)) for text in ("a", "abc")] == [1, 3]
  printed = " ".join("".join(capsys.readouterr()).split())
  assert printed.count("noise") == 1 and "prints text, which is not shown: 'noise'" in printed


@pytest.mark.parametrize("packing", ["pad", "pack", "stream"])
def test_items_are_the_prompts_and_answers_of_the_data(tmp_path, packing):
  data = DataConfig(source="arithmetic", packing=packing, seq_len=96, limit=60, chat="none")
  batches = list(eval_batches(make_rows(data, TOKENIZER, tmp_path), 4, None, with_answers=True))
  items = answer_items(batches, data, TOKENIZER)
  documents = {document.prompt: document.text for document in open_source(data).documents()}
  for item in items:
    assert documents[TOKENIZER.decode(item.prompt)] == TOKENIZER.decode(item.answer)
    assert item.alone == (packing == "pad")
  assert len({item.prompt for item in items}) == len(items) == (6 if packing != "stream" else len(items)) > 2


def test_a_row_that_cuts_an_answer_has_no_item(tmp_path):
  data = DataConfig(source="arithmetic", packing="pad", seq_len=34, limit=60, chat="none")
  batches = list(eval_batches(make_rows(data, TOKENIZER, tmp_path), 4, None, with_answers=True))
  lengths = {len(item.prompt) + len(item.answer) for item in answer_items(batches, data, TOKENIZER)}
  assert lengths and max(lengths) < 34


def test_chosen_items_are_half_of_each_half():
  halves = [0, 0, 0, 1, 0, 1, 0, 1, 0, 1]
  assert chosen_items(halves, 4) == [0, 3, 4, 7]
  assert chosen_items(halves, 100) == list(range(10))


@cache
def _alone(n: int) -> list[str]:
  """The answers of one trial of `_pack`, by the sampler."""
  job, params = _pack("map")
  sampler = Sampler(job.program, SampleConfig(temperature=0, max_tokens=20), TOKENIZER, 64)
  return sampler(*trial((params, job.trials), n), job.frozen, PROMPTS)


def _pack(mapping: str):
  """(job, params) of two trials whose adapters were moved."""
  settings = {"model__max_len": 64, "model__dropout": 0.0, "model__layers": 1, "lora__targets": ["mlp", "head"]}
  job = job_of(small(**settings), small(**settings, lora__rank=2, lora__alpha=64.0), mapping=mapping)
  return job, bent(job.state.params)


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_a_pack_is_decoded_as_each_trial_alone(mapping):
  with quickly():
    job, params = _pack(mapping)
    prompts = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    decoder = AnswerDecoder(job.program, TOKENIZER, 64, prompts, 20)
    answers = decoder(params, job.trials, job.frozen, prompts)
    for n, of_trial in enumerate(answers):
      assert [TOKENIZER.decode(ids) for ids in of_trial] == _alone(n)
    assert answers[0] != answers[1]
    assert decoder(params, job.trials, job.frozen, prompts[:1])[1] == answers[1][:1]
    _check_known_answers(decoder, params, job, prompts, answers)


def _check_known_answers(decoder, params, job, prompts, answers) -> None:
  """An answer that every trial gets right by the loss is not decoded again, and the scores are the same."""
  first = answers[0][0]
  items = [SimpleNamespace(prompt=p, answer=first, alone=True) for p in prompts]
  decoded: list[int] = []

  def counting(params, trials, frozen, prompts):
    decoded.append(len(prompts))
    return decoder(params, trials, frozen, prompts)

  counting.max_tokens = decoder.max_tokens
  documents = SimpleNamespace(half=np.ones(3))
  evaluator = AnswerEvaluator(items, np.arange(3), documents, {"f1": METRICS["f1"].score}, counting, TOKENIZER)
  found = []
  for exact in ([0, 0, 0], [1, 0, 0]):
    evaluations = [Evaluation({}, {}, {"exact": np.array(exact)})] * 2
    one = jax.tree.map(lambda x: np.concatenate([x[:1], x[:1]]), (params, job.trials))
    found.append([e.documents["f1"].tolist() for e in evaluator(*one, job.frozen, evaluations, strict=True)])
  assert decoded == [3, 2] and found[0] == found[1] and found[0][0][0] == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run on arithmetic with metrics of generated answers, whose best step is not the last one."""
  directory = tmp_path_factory.mktemp("answers")
  (directory / "length.py").write_text("def score(prediction, reference, prompt):\n  return len(prediction)")
  return train(directory / "run", *ARGV, f"eval.metric_file={directory / 'length.py'}")


ARGV = [*TINY, "data=arithmetic", "data.limit=80", "train.steps=2", "train.eval_every=1", "optim.lr=3",
        "optim.clip=null", "optim.schedule=constant", "optim.warmup=0",
        "eval.metrics=[exact_match,f1]", "eval.max_tokens=8"]


def test_the_metrics_are_in_the_files_of_a_run(run):
  result, evals = summary(run), rows(run, "eval")
  assert result["losses"]["best_step"] != evals[-1]["step"]
  exported = read_document_losses(run, result["losses"]["exported_step"])
  for name in ("exact_match", "f1", "custom"):
    assert name in evals[0] and name not in evals[1] and name in evals[2]
    assert result["scores"]["final"][name] == evals[2][name]
    assert name in result["scores"]["best"] and name in result["halves"]["report"]["exported"]
    losses = exported[name]
    for half, sums in (("base", losses.base), ("exported", losses.exported)):
      value = -sums.sum() / losses.tokens.sum()
      assert value == pytest.approx(result["halves"]["report"][half][name], rel=1e-6)
  assert result["scores"]["base"]["custom"] > 0


def test_evaluating_the_run_gives_its_scores(run, capsys):
  train(run, "task=evaluate", f"run={run}")
  base, trained = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
  assert trained["custom"] is None and "generated exact match" in " ".join(capsys.readouterr().out.split())
  for name in ("exact_match", "f1"):
    assert base[name] == pytest.approx(summary(run)["scores"]["base"][name])
    assert trained[name] == pytest.approx(summary(run)["scores"]["best"][name])
    assert trained["against_base"][name]["standard_error"] >= 0


@pytest.mark.parametrize(("argv", "problem"), [
  (["eval.metrics=[exactmatch]"], "no such metric exactmatch; .* did you mean exact_match?"),
  (["eval.metrics=[loss]"], "loss is always computed where it applies; remove it"),
  (["report.metric=f1"], "report.metric=f1: runs compute it only on request; add eval.metrics=.f1."),
  (["eval.metric_file=none.py"], "eval.metric_file=.*none.py: no such file"),
  (["eval.every=3"], "eval.every=3: must be a multiple of train.eval_every=16"),
])
def test_settings_that_cannot_be_used(argv, problem):
  with pytest.raises(InputError, match=problem):
    check_command_line([*TINY, "data=arithmetic", *argv])


def test_a_config_file_cannot_set_the_metric_file(tmp_path):
  (tmp_path / "metric.py").write_text("def score(prediction, reference, prompt):\n  return 1")
  (tmp_path / "experiment").mkdir()
  body = f"# @package _global_\neval:\n  metric_file: {tmp_path / 'metric.py'}\n"
  (tmp_path / "experiment" / "foreign.yaml").write_text(body)
  argv = [f"--config-dir={tmp_path}", "experiment=foreign", *TINY, "data=arithmetic"]
  with pytest.raises(InputError, match="eval.metric_file: is executed, so only the command line can set it"):
    check_command_line(argv)
  [cfg] = check_command_line([*argv, f"eval.metric_file={tmp_path / 'metric.py'}"]).jobs
  assert cfg.eval.metric_file == str(tmp_path / "metric.py")
