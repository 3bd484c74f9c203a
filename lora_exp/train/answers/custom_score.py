"""The score of generated answers that a Python file defines, `eval.metric_file`."""

import contextlib
import importlib.util
import io
import math
from pathlib import Path
from typing import Any

from lora_exp.config import InputError
from lora_exp.config.answer_scores import Answer
from lora_exp.runtime import console

SHOWN = 60  # characters of a text in a message


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
