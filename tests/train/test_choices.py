"""Multiple-choice questions: rows with choices, and the most likely choice against the logits."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from packs import bent, job_of, quickly, small
from runs import TINY, rows, train

from lora_exp.config import Config, DataConfig, InputError
from lora_exp.data.documents import Document, Skipped
from lora_exp.data.formats.layouts import Layout
from lora_exp.data.formats.row import Row
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.train.answers.answer_items import answer_items
from lora_exp.train.answers.choice_evaluation import ChoiceEvaluator, choice_questions
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.step import features
from lora_exp.train.evaluating.evaluation import Evaluation

TOKENIZER = get_tokenizer("bytes")
CHOICES = ("cat", "a big dog", "no")


@pytest.mark.parametrize(("fields", "text", "choices"), [
  ({"question": "Q", "choices": list(CHOICES), "answer": 1}, "a big dog", CHOICES),
  ({"question": "Q", "options": {"text": list(CHOICES), "label": ["A", "B", "C"]}, "answer": "no"}, "no", CHOICES),
  ({"question": "Q", "choices": str(list(CHOICES)), "answer": 0}, "cat", CHOICES),
  ({"question": "Q", "choices": list(CHOICES), "answer": "B"}, "B", ()),
])
def test_rows_with_choices(fields, text, choices):
  document = Layout().document(Row("a.jsonl, line 1", fields), 0)
  assert isinstance(document, Document) and (document.text, document.choices) == (text, choices)
  assert bool(choices) != any("not one of the choices" in reason for reason in document.unread)


def test_an_index_outside_of_the_choices_is_said():
  skipped = Layout().document(Row("a.jsonl, line 1", {"question": "Q", "choices": list(CHOICES), "answer": 3}), 0)
  assert isinstance(skipped, Skipped) and skipped.reason == "the answer is 3, and the choices are 0 to 2"


def questions_file(path: Path, count: int = 40) -> Path:
  lines = [{"question": f"{n}?", "choices": list(CHOICES), "answer": n % 3} for n in range(count)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_every_question_of_the_data_is_found(tmp_path, packing):
  data = DataConfig(source="files", path=str(questions_file(tmp_path / "q.jsonl")), packing=packing, seq_len=48)
  items, questions = _questions(data, tmp_path)
  assert len(questions) == len(items) == 4 and {question.correct for question in questions} == {0, 1, 2}
  for item, question in zip(items, questions, strict=True):
    texts = [TOKENIZER.decode(text.ids) for text in question.texts]
    assert texts == [TOKENIZER.decode(item.prompt) + choice for choice in CHOICES]
    assert [text.scored for text in question.texts] == list(question.characters) == [3, 9, 2]


@pytest.mark.parametrize("apart", [False, True])
def test_questions_with_one_prompt_keep_their_own_choices(tmp_path, apart):
  """Every held-out row gives its own question, and no training row does."""
  rows = [{"question": "?", "choices": [f"w{n} ok", f"w{n} no"], "answer": n % 2} for n in range(40)]
  rows[9] |= {"choices": ["w19 no", "own"], "answer": 0}  # held out, with prompt and answer of rows 19 and 11
  rows[11] |= {"choices": ["w19 no", "learned"], "answer": 0}
  held_out = rows[9::10]
  (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "apart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
  data = DataConfig(source="files", path=str(tmp_path / "q.jsonl"), packing="pad", seq_len=48,
                    eval_path=str(tmp_path / "apart.jsonl") if apart else None)
  items, questions = _questions(data, tmp_path)
  assert [question.document for question in questions] == list(range(len(items))) == list(range(4))
  for item, row, question in zip(items, held_out, questions, strict=True):
    start = TOKENIZER.decode(item.prompt)
    assert [TOKENIZER.decode(text.ids) for text in question.texts] == [start + choice for choice in row["choices"]]
    assert question.correct == row["answer"] and TOKENIZER.decode(item.answer) == row["choices"][row["answer"]]


def _questions(data: DataConfig, cache: Path):
  """(items, questions) of the held-out rows."""
  items = answer_items(list(eval_batches(make_rows(data, TOKENIZER, cache), 4, None, True)), data, TOKENIZER)
  cfg = Config(data=data, model=small(model__max_len=48).model)
  return items, choice_questions(cfg, TOKENIZER, items, range(len(items)))


def test_the_most_likely_choice_is_that_of_the_logits(tmp_path):
  data = DataConfig(source="files", path=str(questions_file(tmp_path / "q.jsonl")), packing="pad", seq_len=48)
  _, questions = _questions(data, tmp_path)
  settings = {"model__max_len": 48, "model__layers": 1, "model__dropout": 0.0, "lora__targets": ["head"]}
  with quickly():
    job = job_of(small(**settings), small(**settings, lora__alpha=256.0), mapping="vmap")
    params = bent(job.state.params)
    documents = SimpleNamespace(half=np.ones(4))
    evaluator = ChoiceEvaluator(["choice", "choice_norm"], questions, documents, job, 4, 48)
    found = evaluator(params, job.trials, job.frozen, [Evaluation({}, {})] * 2, strict=True)
    for n, evaluation in enumerate(found):
      values = _log_likelihoods(job, jax.tree.map(lambda x, n=n: x[n], (params, job.trials)), questions)
      correct = np.array([question.correct for question in questions])
      assert evaluation.documents["choice"].tolist() == (values.argmax(1) == correct).tolist()
      by_character = values / np.array(questions[0].characters)
      assert evaluation.documents["choice_norm"].tolist() == (by_character.argmax(1) == correct).tolist()
      assert evaluation.sums["chosen"] == 4


def _log_likelihoods(job, trial, questions) -> np.ndarray:
  """The log-likelihoods (I, C) of all choices, from the logits of the whole texts."""
  texts = [text for question in questions for text in question.texts]
  tokens = np.zeros((len(texts), 49), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: len(text.ids)] = text.ids
  batch = {"tokens": tokens[:, :-1], "segments": np.ones((len(texts), 48), np.int32),
           "positions": np.broadcast_to(np.arange(48), (len(texts), 48))}

  @jax.jit
  def logits_of(params, hyperparameters, frozen):
    model = assemble(job.program, params, hyperparameters, frozen, None)
    return model.logits(features(model, batch))

  logits = np.asarray(logits_of(*trial, job.frozen), np.float64)
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  values = [logs[n, np.arange(48), tokens[n, 1:]][len(text.ids) - 1 - text.scored : len(text.ids) - 1].sum()
            for n, text in enumerate(texts)]
  return np.reshape(values, (len(questions), len(CHOICES)))


def test_a_run_learns_the_choices(tmp_path):
  file = questions_file(tmp_path / "q.jsonl")
  run = train(tmp_path / "run", *TINY, "data=files", f"data.path={file}", "train.steps=1", "eval.metrics=[choice]")
  base, last = rows(run, "eval")
  assert 0 <= base["choice"] <= 1 and "choice_norm" not in base and "choice" in last


def test_data_without_choices_is_refused(tmp_path):
  data = DataConfig(source="arithmetic", packing="pad", seq_len=48, limit=40, chat="none")
  items = answer_items(list(eval_batches(make_rows(data, TOKENIZER, tmp_path), 4, None, True)), data, TOKENIZER)
  with pytest.raises(InputError, match="no held-out row of data=arithmetic has choices; give rows with a question"):
    choice_questions(Config(data=data), TOKENIZER, items, range(len(items)))
