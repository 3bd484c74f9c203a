"""Signals that stop a run: SIGTERM, SIGHUP (a lost connection), SIGINT (Ctrl-C), and the warnings of schedulers.

During training, a signal is noted, and the loop stops after its step with a checkpoint. Before training there is
nothing to save, and a signal stops at once. A second Ctrl-C or SIGTERM always stops at once; files are written
atomically, so it loses only what was not saved.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lora_exp.config import NotStartedError
from lora_exp.runtime import console

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
REPEATABLE = (signal.SIGTERM, signal.SIGINT)  # a second one stops at once; others come in pairs by themselves
PAIR_SECONDS = 0.5  # a launcher and its process group may both deliver one signal


class StopRequest:
  """Whether a signal requests a stop. The request in force is that of the innermost `stop_signals`."""

  def __init__(self, at_once: str | None, requested: bool):
    self.at_once, self.requested = at_once, requested
    self.since = time.monotonic()

  def receive(self, number: int, frame: Any) -> None:
    """The signal handler."""
    again = self.requested and number in REPEATABLE and time.monotonic() - self.since > PAIR_SECONDS
    if not self.requested:
      self.requested, self.since = True, time.monotonic()
      if self.at_once is not None:
        raise NotStartedError(self.at_once)
      with suppress(OSError):  # the terminal is gone
        console.show("Stopping after this step. Press Ctrl-C again to stop now and lose the step.")
    elif again:
      raise KeyboardInterrupt


_requests: list[StopRequest] = []  # of the contexts that are open, innermost last


@contextmanager
def stop_signals(at_once: str | None = None) -> Iterator[StopRequest]:
  """Context in which a signal sets `requested` of the result or, with `at_once`, raises NotStartedError(at_once).

  A request that an outer context has received is in force in an inner one, and the reverse. SIGHUP stays ignored if
  it is, as under nohup. Outside of the main thread, which alone can set handlers, the caller handles signals.
  """
  stop = StopRequest(at_once, bool(_requests) and _requests[-1].requested)
  previous: dict[int, Any] = {}
  _requests.append(stop)
  try:
    with suppress(ValueError):
      for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
          previous[int(number)] = signal.signal(number, stop.receive)
    if at_once is not None and stop.requested:
      raise NotStartedError(at_once)
    yield stop
  finally:
    for replaced, handler in previous.items():
      signal.signal(replaced, handler)
    _requests.remove(stop)
    if stop.requested and _requests:
      _requests[-1].requested = True
