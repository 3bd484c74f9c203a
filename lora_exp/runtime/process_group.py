"""The processes that train one run together, connected by `jax.distributed`.

All processes run the same program on the same settings. Process 0 writes the run directory; the others write to a
scratch directory, and show only errors. A process that fails writes the reason to the key-value store of process 0. The
others read this key once a second, and end too. A process that is killed is noticed by the next collective operation,
or by its missing heartbeats.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import jax

from lora_exp import __version__
from lora_exp.config.conversion import shown
from lora_exp.config.errors import BAD_INPUT, DONE, STOPPED, InputError, LoraExpError, LostProcessError
from lora_exp.config.schema import Config, DistributedConfig
from lora_exp.runtime.saved_config import flat_settings

HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead
GRACE = 10.0  # seconds that the other processes have to end by themselves when one has failed
LOOK = 1.0  # seconds between two reads of the key FAILED
SHUTDOWN = 60  # seconds for the last exchange
FAILED = "lora_exp/failed"  # key of the first failure: {process, code, reason}
LONGEST_TURN = 7 * 24 * 3600.0  # seconds that the others wait for what process 0 makes for the cache
_turns, _meetings = itertools.count(), itertools.count()
LOCAL = ("distributed", "cache", "logger")  # settings in which processes may differ


class ProcessGroup:
  """The processes of a run, seen from this one, after `connect`."""

  def __init__(self) -> None:
    self.index, self.count = jax.process_index(), jax.process_count()
    self._client = _global_state().client
    self._ended = threading.Event()
    self._watcher = threading.Thread(target=self._watch, daemon=True, name="other processes")

  @property
  def writes(self) -> bool:
    """Whether this process writes the run directory and shows its progress."""
    return self.index == 0

  def watch(self, report: Callable[[LoraExpError], None]) -> None:
    """From now on ends this process if another one fails, after `report`ing that."""
    self._report = report
    self._watcher.start()

  def publish(self, name: str, value: Any) -> None:
    """Gives the others a JSON `value`, which `read` returns."""
    self._client.key_value_set(f"lora_exp/{name}", json.dumps(value))

  def read(self, name: str, seconds: float) -> Any:
    """The value that a process publishes; waits for it for a limited time. Raises LostProcessError if there is none."""
    try:
      return self._get(name, seconds)
    except jax.errors.JaxRuntimeError as error:
      raise LostProcessError(f"no answer from other processes within {seconds:g} s ({_first_line(error)})") from error

  def _get(self, name: str, seconds: float) -> Any:
    return json.loads(self._client.blocking_key_value_get(f"lora_exp/{name}", int(seconds * 1000)))

  def require_same_settings(self, cfg: Config, seconds: float) -> None:
    """Raises InputError on every process if the settings or the versions of two processes differ."""
    ours = {"version": __version__, "jax": jax.__version__, **_comparable(cfg)}
    self.publish(f"settings/{self.index}", ours)
    first = self.read("settings/0", seconds)
    for other in range(1, self.count):
      theirs = self.read(f"settings/{other}", seconds)
      names = [name for name in sorted(first.keys() | theirs.keys()) if first.get(name) != theirs.get(name)]
      if names:
        differences = ", ".join(f"{name}={shown(first.get(name))} and {shown(theirs.get(name))}" for name in names[:5])
        raise InputError(f"processes 0 and {other} were started with different settings ({differences}); start all "
                         "with the same command, and the same versions of lora_exp and jax")

  def end(self, code: int, reason: str) -> bool:
    """Tells the others how this process ends. Returns whether process 0 ends with the same code within a time limit."""
    self._code = code
    with suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, and the store with it
      if code != DONE:
        self._client.key_value_set(FAILED, json.dumps({"process": self.index, "code": code, "reason": reason}), True)
      self.publish(f"end/{self.index}", code)
      return code == DONE or bool(self._get("end/0", GRACE) == code)
    return False

  def leave(self) -> None:
    """Leaves the group after `end`. Ends this process at once if another one has not ended in time."""
    try:
      everyone = self._wait_for_ends(None if self._code == DONE else GRACE)
    except jax.errors.JaxRuntimeError:
      everyone = False
    self._ended.set()
    if not everyone:
      exit_now(self._code or STOPPED)
    self._watcher.join()
    with suppress(jax.errors.JaxRuntimeError):
      jax.distributed.shutdown()

  def _wait_for_ends(self, seconds: float | None) -> bool:
    """Whether every process has ended within that time. Without a limit, until one has failed."""
    start = time.monotonic()
    while len(self._client.key_value_dir_get("lora_exp/end")) < self.count:
      if seconds is not None and time.monotonic() - start > seconds:
        return False
      time.sleep(0.1)
    return True

  def failure(self) -> dict[str, Any] | None:
    """The first failure of another process: {process, code, reason}, or None."""
    with suppress(jax.errors.JaxRuntimeError):
      found: dict[str, Any] = json.loads(self._client.key_value_try_get(FAILED))
      return found if found["process"] != self.index else None
    return None

  def _watch(self) -> None:
    """Ends this process if another one has failed and the main thread does not end by itself."""
    while not self._ended.wait(LOOK):
      failure = self.failure()
      if failure is None:
        continue
      if not self._ended.wait(GRACE):
        self._report(LostProcessError(f"process {failure['process']} has ended: {failure['reason']}"))
        exit_now(failure["code"])
      return


@contextmanager
def lost_processes() -> Iterator[None]:
  """Converts the errors of collective operations to LostProcessError, if there are several processes."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
      raise
    raise LostProcessError("another process of the run has ended, or cannot be reached") from error


@contextmanager
def first_process_first() -> Iterator[None]:
  """Context that process 0 finishes before the others enter it, so that they find its results in the cache.

  All processes must enter it, in the same order. With one process it does nothing.
  """
  if jax.process_count() == 1:
    yield
    return
  group, name = ProcessGroup(), f"turn/{next(_turns)}"
  if not group.writes:
    group.read(name, LONGEST_TURN)
  try:
    yield
  finally:
    if group.writes:
      group.publish(name, True)


def meet() -> None:
  """Waits for the other processes, without a collective operation, because gloo waits at most 30 s for a late process.

  All processes must call it, in the same order. With one process it does nothing.
  """
  if jax.process_count() > 1:
    _global_state().client.wait_at_barrier(f"lora_exp/meeting/{next(_meetings)}", int(LONGEST_TURN * 1000))


def compiled_together(function: Any) -> Callable[..., Any]:
  """A function of `jax.jit` that every process has compiled before one of them runs it; see `meet`."""
  seen = set()

  def call(*args: Any, **settings: Any) -> Any:
    leaves, structure = jax.tree.flatten((args, settings))
    shapes = structure, tuple((getattr(x, "shape", x), getattr(x, "dtype", None)) for x in leaves)
    if shapes not in seen:
      function.lower(*args, **settings).compile()  # the call below reuses it
      meet()
      seen.add(shapes)
    return function(*args, **settings)

  return call


def connect(cfg: DistributedConfig, report: Callable[[LoraExpError], None]) -> ProcessGroup:
  """Connects this process to the others. Raises InputError if JAX refuses the settings.

  If not all processes connect within `cfg.timeout` seconds, it `report`s this and ends the process, as JAX would.
  """
  jax.config.update("jax_enable_preemption_service", False)  # it would replace our handler of SIGTERM
  address = None if cfg.coordinator == "auto" else cfg.coordinator
  limit = threading.Timer(cfg.timeout, _give_up, (cfg, report))
  limit.daemon = True
  limit.start()
  try:
    jax.distributed.initialize(
      address, cfg.processes, cfg.process, initialization_timeout=cfg.timeout + SHUTDOWN,
      heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN,
    )  # fmt: skip
  except (RuntimeError, ValueError) as error:
    raise InputError(_refusal(cfg, error)) from error
  finally:
    limit.cancel()
  return ProcessGroup()


def _give_up(cfg: DistributedConfig, report: Callable[[LoraExpError], None]) -> None:
  """Reports that other processes have not connected, and ends this process, which waits for them in JAX."""
  given = f"distributed.coordinator={cfg.coordinator}"
  if _global_state().process_id == 0:
    problem = (f"not all processes connected within distributed.timeout={cfg.timeout} s; start the others with the "
               "same address and distributed.processes, and check the firewall")
  else:
    problem = (f"process 0 was not reached within distributed.timeout={cfg.timeout} s; start it there, and check the "
               "address and the firewall")
  report(InputError(f"{given}: {problem}"))
  exit_now(BAD_INPUT)


def _refusal(cfg: DistributedConfig, error: Exception) -> str:
  """Why JAX does not accept the settings."""
  given, reason = f"distributed.coordinator={cfg.coordinator}", _first_line(error)
  if isinstance(error, ValueError):
    return (f"{given}: JAX does not find the processes ({reason}); give distributed.coordinator=HOST:PORT "
            "distributed.processes=N distributed.process=I")
  return f"{given}: {reason}; give another port if it is taken, and start every process once"


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__


def _comparable(cfg: Config) -> dict[str, Any]:
  """The settings that all processes must share, by dotted path."""
  values = {name: value for name, value in asdict(cfg).items() if name not in LOCAL}
  return flat_settings(values)


def _global_state() -> Any:
  """JAX's connection to the other processes: its key-value store and its barrier have no public interface.

  It is imported here, so that a run of one process does not depend on it.
  """
  from jax._src import distributed

  return distributed.global_state


def exit_now(code: int) -> None:
  """Ends the process at once, without JAX's exchange at exit, because other processes may have ended."""
  with suppress(OSError, ValueError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)
