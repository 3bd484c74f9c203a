"""Scores of generated answers: numbers that compare the text of an answer with its reference.

A metric of `config/metrics.py` is the mean of the score with the name of its first sum. To add a score, write a
function of an `Answer` and enter it in `SCORES`.
"""

import contextlib
import importlib.util
import io
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from lora_exp.config import InputError
from lora_exp.runtime import console

CUSTOM = "custom"  # the score of `eval.metric_file`
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
PUNCTUATION = str.maketrans("", "", string.punctuation)
SHOWN = 60  # characters of a text in a message


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


SCORES: dict[str, Score] = {
  "exact_match": exact_match,
  "f1": f1,
  "numeric_match": numeric_match,
  "rouge_l": rouge_l,
  "chrf": chrf,
  "valid_json": valid_json,
}


def scores_of(names: Sequence[str], metric_file: str | None) -> dict[str, Score]:
  """The functions of the scores `names`. Raises InputError if `metric_file`, which defines `custom`, cannot be used."""
  functions = {name: SCORES[name] for name in names if name in SCORES}
  if CUSTOM in names and metric_file is not None:
    functions[CUSTOM] = CustomScore(Path(metric_file))
  return functions


class CustomScore:
  """The function `score(prediction, reference, prompt)` of a Python file, checked at each call.

  Its output is not shown; a warning says so once.
  """

  def __init__(self, path: Path):
    """Runs the file. Raises InputError if that fails, or if the file defines no function `score`."""
    self.setting, self.printed = f"eval.metric_file={path}", False
    spec = importlib.util.spec_from_file_location("lora_exp_metric_file", path)
    if spec is None or spec.loader is None:
      raise InputError(f"{self.setting}: must be a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
      self._quietly(spec.loader.exec_module, module)
    except (Exception, SystemExit) as error:
      raise InputError(f"{self.setting}: cannot be loaded: {_in_words(error)}") from error
    self.function = getattr(module, "score", None)
    if not callable(self.function):
      raise InputError(f"{self.setting}: has no function score(prediction, reference, prompt) that returns a number")

  def __call__(self, answer: Answer) -> float:
    """The score of an answer. Raises InputError with the row if the function fails, or returns no finite number."""
    try:
      value = self._quietly(self.function, answer.text, answer.reference, answer.prompt)
    except (Exception, SystemExit) as error:
      raise InputError(f"{self.setting}: score raised {_in_words(error)} for {_row(answer)}") from error
    try:
      number = float(value) if not isinstance(value, str | bytes) else None
    except (TypeError, ValueError, OverflowError):
      number = None
    if number is None or not math.isfinite(number):
      raise InputError(f"{self.setting}: score returned {_short(repr(value))}, not a finite number, for {_row(answer)}")
    return number

  def _quietly(self, function: Any, *arguments: Any) -> Any:
    """Calls a function of the file without showing what it prints."""
    output = io.StringIO()
    try:
      with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return function(*arguments)
    finally:
      if output.getvalue() and not self.printed:
        self.printed = True
        console.show_warning(f"{self.setting}: prints text, which is not shown: {_short(output.getvalue())!r}")


def _in_words(error: BaseException) -> str:
  """The type of an error, its message, and the line of the file if it is a syntax error."""
  return f"{type(error).__name__}: {_short(str(error))}"


def _row(answer: Answer) -> str:
  """The row of an answer, for messages."""
  return (f"the answer {_short(answer.text)!r} to the prompt {_short(answer.prompt)!r} "
          f"(reference {_short(answer.reference)!r})")


def _short(text: str) -> str:
  text = " ".join(text.split())
  return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
