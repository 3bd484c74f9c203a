"""Scores of generated answers: numbers that compare the text of an answer with its reference.

A metric of `metrics.py` is the mean of one of these functions over the generated answers.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answer:
  """A generated answer to a held-out prompt."""

  prompt: str
  reference: str  # the answer in the data
  text: str  # generated, without the end


Score = Callable[[Answer], float]


def normalised(text: str) -> str:
  """`text` in lower case, without punctuation, articles and repeated spaces, as in SQuAD (arXiv 1606.05250)."""
  return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: Answer) -> float:
  """1 if the normalised texts are equal, else 0 (SQuAD)."""
  return float(normalised(answer.text) == normalised(answer.reference))


def f1(answer: Answer) -> float:
  """The F1 of the words of the normalised texts, each counted as often as it occurs (SQuAD).

  If either text has no words, 1 if both have none, else 0.
  """
  text, reference = normalised(answer.text).split(), normalised(answer.reference).split()
  if not text or not reference:
    return float(text == reference)
  common = (Counter(text) & Counter(reference)).total()
  return 2 * common / (len(text) + len(reference))


def last_number(text: str) -> Decimal | None:
  """The last number in `text`, without its thousands separators; None if there is none."""
  numbers = NUMBER.findall(text)
  return Decimal(numbers[-1].replace(",", "")) if numbers else None


def numeric_match(answer: Answer) -> float:
  """1 if the last numbers of both texts are equal, else 0: the convention of GSM8K (arXiv 2110.14168)."""
  number = last_number(answer.text)
  return float(number is not None and number == last_number(answer.reference))


def rouge_l(answer: Answer) -> float:
  """ROUGE-L (Lin, 2004), F-measure between 0 and 1. Only the letters a-z and digits count, in lower case."""
  return float(_rouge_scorer().score(answer.reference, answer.text)["rougeL"].fmeasure)


def chrf(answer: Answer) -> float:
  """chrF (Popović, 2015) of the answer, between 0 and 100. The metric is the mean over answers, not corpus chrF."""
  return float(_chrf_scorer().sentence_score(answer.text, [answer.reference]).score)


def valid_json(answer: Answer) -> float:
  """1 if the answer is a JSON document (RFC 8259: no NaN or infinity), else 0."""
  try:
    json.loads(answer.text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError):
    return 0.0
  return 1.0


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not JSON")


@cache
def _rouge_scorer() -> Any:
  from rouge_score.rouge_scorer import RougeScorer

  return RougeScorer(["rougeL"])


@cache
def _chrf_scorer() -> Any:
  from sacrebleu.metrics import CHRF

  return CHRF()
