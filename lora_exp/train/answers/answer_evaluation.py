"""Evaluation of generated answers: the metrics of `eval.metrics` that compare them with the held-out answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lora_exp.config import InputError
from lora_exp.config.answer_scores import Answer, Score
from lora_exp.config.metrics import GENERATED
from lora_exp.data.tokenization import Tokenizer
from lora_exp.runtime import console
from lora_exp.train.answers.answer_decoder import AnswerDecoder
from lora_exp.train.answers.answer_items import AnswerItem
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Tree
from lora_exp.train.evaluating.evaluation import Evaluation
from lora_exp.train.evaluating.held_out_documents import HeldOutDocuments


@dataclass(frozen=True)
class AnswerEvaluator:
  """Generates and scores the answers of N trials to the same held-out prompts."""

  title: ClassVar[str] = "score generated answers"  # on the console

  items: Sequence[AnswerItem]
  index: np.ndarray  # (I,) the document of each item
  documents: HeldOutDocuments
  scores: Mapping[str, Score]
  decoder: AnswerDecoder
  tokenizer: Tokenizer

  def __call__(
    self, params: Tree, trials: Hyperparameters, frozen: Tree, evaluations: Sequence[Evaluation], strict: bool
  ) -> list[Evaluation]:
    """`evaluations`, one of each trial on the held-out batches, with the scores of generated answers.

    Raises InputError if `eval.metric_file` fails for an answer. Unless `strict`, its metric is left out instead, with a
    warning, so that a run is not lost.
    """
    answers = self._answers(params, trials, frozen, evaluations)
    return [self._with_scores(evaluation, of_trial, strict)
            for evaluation, of_trial in zip(evaluations, answers, strict=True)]

  def _answers(
    self, params: Tree, trials: Hyperparameters, frozen: Tree, evaluations: Sequence[Evaluation]
  ) -> list[list[list[int]]]:
    """The token ids of the answers, by trial and item.

    If every token of an answer was the most likely one in the evaluation of the loss, greedy decoding yields that
    answer. Prompts of which this is true for all trials are not decoded again.
    """
    known_I = np.array([item.alone for item in self.items])
    for evaluation in evaluations:
      exact_D = evaluation.documents.get("exact", np.zeros(len(self.documents.half)))
      known_I &= exact_D[self.index] > 0
    prompts = [item.prompt for item, known in zip(self.items, known_I, strict=True) if not known]
    decoded = self.decoder(params, trials, frozen, prompts)
    answers = []
    for of_trial in decoded:
      rest = iter(of_trial)
      answers.append([list(item.answer[: self.decoder.max_tokens]) if known else next(rest)
                      for item, known in zip(self.items, known_I, strict=True)])
    return answers

  def _with_scores(self, evaluation: Evaluation, answers: Sequence[Sequence[int]], strict: bool) -> Evaluation:
    texts = [self._answer(item, ids) for item, ids in zip(self.items, answers, strict=True)]
    values: dict[str, np.ndarray] = {GENERATED: np.ones(len(texts))}
    for name, score in self.scores.items():
      try:
        values[name] = np.array([score(text) for text in texts], np.float64)
      except InputError as error:
        if strict:
          raise
        console.show_warning(str(error))
    documents = {name: np.bincount(self.index, values_I, len(self.documents.half)) for name, values_I in values.items()}
    return evaluation.extended(values, documents)

  def _answer(self, item: AnswerItem, ids: Sequence[int]) -> Answer:
    """The texts of a prompt, its answer, and the generated answer `ids`."""
    # A leading space belongs to the answer unless the prompt ends with a control token.
    start = self.tokenizer.start_after_control and item.prompt[-1] in self.tokenizer.special_tokens.values()
    decode = self.tokenizer.decode
    return Answer(decode(item.prompt), decode(item.answer, start), decode(ids, start))
