"""The evaluators of the metrics that `eval.metrics` names: of generated answers, and of choices."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_exp.config import Config, InputError
from lora_exp.config.answer_scores import Score
from lora_exp.config.eval_checks import requested_metrics
from lora_exp.config.metrics import CHOSEN, GENERATED, METRICS, Metric
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import Rows
from lora_exp.data.tokenization import Tokenizer
from lora_exp.runtime import console
from lora_exp.train.answers.answer_decoder import AnswerDecoder
from lora_exp.train.answers.answer_evaluation import AnswerEvaluator
from lora_exp.train.answers.answer_items import AnswerItem, answer_items, chosen_items
from lora_exp.train.answers.choice_evaluation import ChoiceEvaluator, Question, choice_questions
from lora_exp.train.answers.custom_score import CustomScore
from lora_exp.train.evaluating.held_out_documents import HeldOutDocuments
from lora_exp.train.job import Job

TOO_LONG = 16  # an answer ends when it has so many tokens more than the longest answer in the data
Evaluator = AnswerEvaluator | ChoiceEvaluator


@dataclass(frozen=True)
class MetricData:
  """What the requested metrics are computed on. It needs no model, so that problems are found before one is made."""

  items: list[AnswerItem]
  numbers: list[int]  # of their documents
  scores: dict[str, Score]  # of generated answers
  choice_names: list[str]  # metrics of choices
  questions: list[Question]  # of choices


def metric_data(
  cfg: Config, tokenizer: Tokenizer, rows: Rows, documents: HeldOutDocuments, batch_size: int
) -> MetricData | None:
  """What the requested metrics are computed on, in the held-out `rows`; None if no metric is requested.

  `documents`: those of the same rows in batches of `batch_size`. Raises InputError if there are no answers or choices,
  or `eval.metric_file` cannot be loaded.
  """
  metrics = [METRICS[name] for name in requested_metrics(cfg)]
  scores = _scores_of(metrics, cfg.eval.metric_file)
  if not metrics:
    return None
  batches = eval_batches(rows, batch_size, cfg.train.eval_tokens, with_answers=not rows.features)
  items = answer_items(list(batches), cfg.data, tokenizer)
  if not items:
    raise InputError(f"eval.metrics=[{','.join(cfg.eval.metrics)}]: the held-out rows of data={cfg.data.source} "
                     "have no whole answer to a prompt; choose data with prompts, raise data.seq_len, or set "
                     "eval.metrics=[]")
  numbers = [int(documents.index[batch][row, segment]) for batch, row, segment in (item.place for item in items)]
  choice_names = [metric.name for metric in metrics if metric.sums[1] == CHOSEN]
  questions = choice_questions(cfg, tokenizer, items, numbers) if choice_names else []
  return MetricData(items, numbers, scores, choice_names, questions)


def make_evaluators(
  cfg: Config, job: Job, tokenizer: Tokenizer, data: MetricData | None, documents: HeldOutDocuments, batch_size: int
) -> tuple[Evaluator, ...]:
  """The evaluators of the requested metrics on `data`; () if it is None."""
  if data is None:
    return ()
  evaluators: list[Evaluator] = []
  if data.scores:
    evaluators.append(_answer_evaluator(cfg, job, tokenizer, data, documents))
  if data.choice_names:
    halves = [int(documents.half[question.document]) for question in data.questions]
    chosen = [data.questions[n] for n in chosen_items(halves, cfg.eval.items)]
    evaluators.append(ChoiceEvaluator(data.choice_names, chosen, documents, job, batch_size, cfg.model.max_len))
  return tuple(evaluators)


def _scores_of(metrics: Iterable[Metric], metric_file: str | None) -> dict[str, Score]:
  """The scores of generated answers by the name of their sum. Raises InputError if `metric_file` cannot be used."""
  scores: dict[str, Score] = {}
  for metric in metrics:
    if metric.score is not None:
      scores[metric.sums[0]] = metric.score
    elif GENERATED in metric.sums and metric_file is not None:
      scores[metric.sums[0]] = CustomScore(Path(metric_file))
  return scores


def _answer_evaluator(
  cfg: Config, job: Job, tokenizer: Tokenizer, data: MetricData, documents: HeldOutDocuments
) -> AnswerEvaluator:
  """The evaluator of generated answers to some of the items of `data`."""
  items, numbers = data.items, data.numbers
  chosen = chosen_items(documents.half[numbers].tolist(), cfg.eval.items)
  lengths = [len(items[n].answer) for n in chosen]
  longer = sum(length > cfg.eval.max_tokens for length in lengths)
  if longer:
    of_all = f"{longer} of {len(chosen)} held-out answers"
    console.show_warning(f"eval.max_tokens={cfg.eval.max_tokens}: {of_all} are longer, and cannot be matched")
  most = min(cfg.eval.max_tokens, max(lengths) + TOO_LONG)
  prompts = [items[n].prompt for n in chosen]
  decoder = AnswerDecoder(job.program, tokenizer, cfg.model.max_len, prompts, most)
  index = np.array([numbers[n] for n in chosen])
  return AnswerEvaluator([items[n] for n in chosen], index, documents, data.scores, decoder, tokenizer)
