"""Starts JAX, and prints the device, its memory and JAX's warnings.

JAX logs warnings such as "Falling back to cpu" where they are easily missed. They are printed here before anything
else.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from lora_exp.config import InputError
from lora_exp.runtime import console
from lora_exp.runtime.program_cache import keep_programs


def start_jax(cache: str, show_device: bool = True) -> None:
  """Initialises the devices and shows them and JAX's warnings; keeps compiled programs in `cache`.

  Raises InputError if JAX cannot use the platform that the environment asks for.
  """
  keep_programs(cache)
  with _warnings_of_jax() as warnings:
    devices = _devices()
  for warning in warnings:
    console.show_warning(warning)
  if show_device:
    processes = jax.process_count()
    console.show(f"Device: {_description(devices)}{f'; {processes} processes' if processes > 1 else ''}")


def _devices() -> list[jax.Device]:
  """The devices of JAX. Raises InputError if it finds none."""
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:
    wanted = os.environ.get("JAX_PLATFORMS") or jax.config.read("jax_platforms")
    if not wanted:
      raise
    reason = " ".join(str(error).split()).rstrip(".")
    raise InputError(
      f"JAX_PLATFORMS={wanted}: JAX finds no such device{f' ({reason})' if reason else ''}; unset it to use what "
      "there is, or install JAX for the device: docs.jax.dev/en/latest/installation.html"
    ) from error


def _description(devices: list[jax.Device]) -> str:
  """The number, kind and memory of the devices, as in `2 × NVIDIA H100 80GB HBM3 (gpu), 79.1 GB each`."""
  first = devices[0]
  times = f"{len(devices)} × " if len(devices) > 1 else ""
  if first.platform == "cpu":
    return f"{times}cpu ({core_count()} cores), {_host_memory() / 1e9:.1f} GB of memory"
  limit = (first.memory_stats() or {}).get("bytes_limit")
  memory = f", {limit / 1e9:.1f} GB{' each' if len(devices) > 1 else ''}" if limit else ""
  return f"{times}{first.device_kind} ({first.platform}){memory}"


def core_count() -> int:
  """The processor cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_memory() -> int:
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Texts(logging.Handler):
  """Keeps the texts of warnings."""

  def __init__(self) -> None:
    super().__init__(logging.WARNING)
    self.texts: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.texts.append(record.getMessage())


@contextmanager
def _warnings_of_jax() -> Iterator[list[str]]:
  """Context that collects the warnings that JAX logs."""
  logger, handler = logging.getLogger("jax"), _Texts()
  logger.addHandler(handler)
  try:
    yield handler.texts
  finally:
    logger.removeHandler(handler)
