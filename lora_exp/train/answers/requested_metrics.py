"""The evaluators of the metrics that `eval.metrics` names: of generated answers, and of choices."""

from collections.abc import Iterable, Sequence
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
from lora_exp.train.answers.choice_evaluation import ChoiceEvaluator, choice_questions
from lora_exp.train.answers.custom_score import CustomScore
from lora_exp.train.evaluating.held_out_documents import HeldOutDocuments
from lora_exp.train.job import Job

TOO_LONG = 16  # an answer ends when it has so many tokens more than the longest answer in the data
Evaluator = AnswerEvaluator | ChoiceEvaluator


def make_evaluators(
  cfg: Config, job: Job, tokenizer: Tokenizer, rows: Rows, documents: HeldOutDocuments, batch_size: int
) -> tuple[Evaluator, ...]:
  """The evaluators of the requested metrics on the held-out `rows`; () if there are none.

  `documents`: those of the same rows in batches of `batch_size`. Raises InputError if there are no answers or choices,
  or `eval.metric_file` cannot be loaded.
  """
  metrics = [METRICS[name] for name in requested_metrics(cfg)]
  scores = _scores_of(metrics, cfg.eval.metric_file)
  if not metrics:
    return ()
  batches = eval_batches(rows, batch_size, cfg.train.eval_tokens, with_answers=not rows.features)
  items = answer_items(list(batches), cfg.data, tokenizer)
  if not items:
    raise InputError(f"eval.metrics=[{','.join(cfg.eval.metrics)}]: the held-out rows of data={cfg.data.source} "
                     "have no whole answer to a prompt; choose data with prompts, raise data.seq_len, or set "
                     "eval.metrics=[]")
  numbers = [int(documents.index[batch][row, segment]) for batch, row, segment in (item.place for item in items)]
  evaluators: list[Evaluator] = []
  if scores:
    evaluators.append(_answer_evaluator(cfg, job, tokenizer, items, numbers, documents, scores))
  names = [metric.name for metric in metrics if metric.sums[1] == CHOSEN]
  if names:
    questions = choice_questions(cfg, tokenizer, items, numbers)
    halves = [int(documents.half[question.document]) for question in questions]
    chosen = [questions[n] for n in chosen_items(halves, cfg.eval.items)]
    evaluators.append(ChoiceEvaluator(names, chosen, documents, job, batch_size, cfg.model.max_len))
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
  cfg: Config, job: Job, tokenizer: Tokenizer, items: Sequence[AnswerItem], numbers: Sequence[int],
  documents: HeldOutDocuments, scores: dict[str, Score],
) -> AnswerEvaluator:  # fmt: skip
  """The evaluator of generated answers to some of the `items`, whose documents are `numbers`."""
  chosen = chosen_items(documents.half[list(numbers)].tolist(), cfg.eval.items)
  lengths = [len(items[n].answer) for n in chosen]
  longer = sum(length > cfg.eval.max_tokens for length in lengths)
  if longer:
    of_all = f"{longer} of {len(chosen)} held-out answers"
    console.show_warning(f"eval.max_tokens={cfg.eval.max_tokens}: {of_all} are longer, and cannot be matched")
  most = min(cfg.eval.max_tokens, max(lengths) + TOO_LONG)
  prompts = [items[n].prompt for n in chosen]
  decoder = AnswerDecoder(job.program, tokenizer, cfg.model.max_len, prompts, most)
  index = np.array([numbers[n] for n in chosen])
  return AnswerEvaluator([items[n] for n in chosen], index, documents, scores, decoder, tokenizer)
