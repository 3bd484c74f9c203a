"""Regular expressions from untrusted files, with a limit on the time of matching."""

import time
from dataclasses import dataclass, field

import regex

LONGEST = 2 * 10**5  # characters; compiling takes about a second
SECONDS = 1.0  # time that one pattern may take for all names


@dataclass
class Pattern:
  """A regular expression. Once matching has taken SECONDS, it is `too_slow` and matches nothing."""

  expression: regex.Pattern
  text: str  # as in the file
  too_slow: bool = False
  seconds: float = field(default=SECONDS)  # remaining time

  def fullmatch(self, name: str) -> bool:
    """Whether the expression matches all of `name`."""
    if self.too_slow:
      return False
    started = time.monotonic()
    try:
      return self.expression.fullmatch(name, timeout=self.seconds) is not None
    except TimeoutError:
      self.too_slow = True
      return False
    finally:
      self.seconds = max(self.seconds - (time.monotonic() - started), 1e-3)


def compiled(expression: str, text: str) -> Pattern | None:
  """Returns the compiled `expression`, which contains the `text` of a file; None if it is invalid or too long."""
  if len(text) > LONGEST:
    return None
  try:
    return Pattern(regex.compile(expression), text)
  except (regex.error, OverflowError, RecursionError):
    return None
