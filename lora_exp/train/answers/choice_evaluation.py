"""Evaluation of held-out multiple-choice questions: the most likely choice, in total and per character."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lora_exp.config import Config, DataConfig, InputError
from lora_exp.config.metrics import CHOSEN
from lora_exp.data.documents import Document
from lora_exp.data.encoding.encode import EncodedDocument, encode_documents
from lora_exp.data.encoding.source_writer import held_out_every, is_held_out
from lora_exp.data.sources import TextSource, open_source
from lora_exp.data.tokenization import Tokenizer
from lora_exp.train.answers.answer_items import AnswerItem
from lora_exp.train.answers.log_likelihoods import Continuation, log_likelihoods
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Tree
from lora_exp.train.evaluating.evaluation import Evaluation
from lora_exp.train.evaluating.held_out_documents import HeldOutDocuments
from lora_exp.train.job import Job

READ = 256  # documents encoded at once


@dataclass(frozen=True)
class Question:
  """A held-out question: the prompt with each of its C choices."""

  document: int  # in the held-out documents
  texts: tuple[Continuation, ...]  # (C,) the choices are scored, without the token that ends an answer
  characters: tuple[int, ...]  # (C,) of the choices
  correct: int


@dataclass(frozen=True)
class ChoiceEvaluator:
  """Computes the log-likelihoods of all choices with the program that evaluates the loss."""

  title: ClassVar[str] = "score the choices"  # on the console

  names: Sequence[str]  # of the metrics: choice, choice_norm
  questions: Sequence[Question]
  documents: HeldOutDocuments
  job: Job
  batch_size: int
  max_len: int

  def __call__(
    self, params: Tree, trials: Hyperparameters, frozen: Tree, evaluations: Sequence[Evaluation], strict: bool
  ) -> list[Evaluation]:
    """`evaluations`, one of each trial on the held-out batches, with the scores of the questions.

    As in lm-eval, `choice_norm` divides a log-likelihood by the number of characters of its choice.
    """
    texts = [text for question in self.questions for text in question.texts]
    parts = log_likelihoods(self.job, (params, trials, frozen), texts, self.batch_size, self.max_len)
    values_NR = np.concatenate([values_NB for values_NB, _ in parts], axis=1)
    index = np.array([question.document for question in self.questions])
    found = []
    for evaluation, values_R in zip(evaluations, values_NR, strict=True):
      scores = self._scores(values_R)
      documents = {name: np.bincount(index, x, len(self.documents.half)) for name, x in scores.items()}
      found.append(evaluation.extended(scores, documents))
    return found

  def _scores(self, values_R: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each question is answered correctly, by name of the sum, (I,)."""
    ends = np.cumsum([len(question.texts) for question in self.questions])
    by_question = np.split(values_R, ends[:-1])
    pairs = list(zip(self.questions, by_question, strict=True))
    scores = {
      "choice": np.array([float(values_C.argmax() == one.correct) for one, values_C in pairs]),
      "choice_norm": np.array([float((values_C / one.characters).argmax() == one.correct) for one, values_C in pairs]),
    }
    return {name: scores[name] for name in self.names} | {CHOSEN: np.ones(len(pairs))}


def choice_questions(
  cfg: Config, tokenizer: Tokenizer, items: Sequence[AnswerItem], numbers: Sequence[int]
) -> list[Question]:
  """The questions with choices among the held-out `items`, whose documents are `numbers`, in their order.

  Each held-out row with the prompt and answer of an item gives the question of one such item. A question is left out if
  one of its choices is longer than model.max_len. Raises InputError if there is none.
  """
  places: dict[tuple, deque[int]] = {}
  for n, item in enumerate(items):
    places.setdefault((item.prompt, item.answer), deque()).append(n)
  found: dict[int, Question] = {}
  source = open_source(cfg.data)
  assert isinstance(source, TextSource)
  separator = source.separator() or ""
  for documents in _batches_with_choices(source, cfg.data):
    encoded = encode_documents(tokenizer, documents, cfg.data, separator)
    for document, one in zip(documents, encoded, strict=True):
      start, end = _answer_range(one, tokenizer.stops)
      same = places.get((tuple(one.ids[:start]), tuple(one.ids[start:end])))
      if not same:
        continue
      place = same.popleft()
      question = _question(cfg, tokenizer, document, numbers[place], separator)
      if all(len(text.ids) <= cfg.model.max_len for text in question.texts):
        found[place] = question
  if not found:
    raise InputError(f"eval.metrics=[{','.join(cfg.eval.metrics)}]: no held-out row of data={cfg.data.source} has "
                     "choices; give rows with a question, a list `choices`, and an answer that is one of them or its "
                     "index from 0")
  return [found[place] for place in sorted(found)]


def _batches_with_choices(source: TextSource, cfg: DataConfig) -> Iterator[list[Document]]:
  """The held-out documents with choices, up to READ at a time."""
  apart = source.held_out()
  every = 1 if apart else held_out_every(cfg)
  batch: list[Document] = []
  for document in (apart or source).documents():
    if isinstance(document, Document) and document.choices and is_held_out(document, every):
      batch.append(document)
    if len(batch) == READ:
      yield batch
      batch = []
  if batch:
    yield batch


def _question(cfg: Config, tokenizer: Tokenizer, document: Document, number: int, separator: str) -> Question:
  """A question with its choices as token ids."""
  each = [Document(0, choice, document.prompt) for choice in document.choices]
  texts = []
  for one in encode_documents(tokenizer, each, cfg.data, separator):
    start, end = _answer_range(one, tokenizer.stops)
    texts.append(Continuation(one.ids[:end], end - start))
  lengths = tuple(max(len(choice), 1) for choice in document.choices)
  return Question(number, tuple(texts), lengths, document.choices.index(document.text))


def _answer_range(document: EncodedDocument, stops: Sequence[int]) -> tuple[int, int]:
  """Where the answer of a prompt begins, and where the first token that ends it is."""
  assert document.learned is not None
  start, count = int(document.learned.argmax()), len(document.ids)
  return start, next((n for n in range(start, count) if document.ids[n] in stops), count)
