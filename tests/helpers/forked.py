"""Commands in processes forked from one that has imported the program, which saves seconds for each of them."""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

# jax cannot be forked once it runs, but it can be imported.
PRELOADED = ["jax", "grain", "orbax.checkpoint", "altair", "vl_convert", "lora_exp.cli.main", "lora_exp.tasks.train",
             "lora_exp.report.plots.run_plots", "saver"]  # fmt: skip


def forkserver() -> ForkServerContext:
  """The context of processes that are forked after the imports."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(PRELOADED)
  return context


def start_command(
  argv: list[str], output: Path, prepare: Callable[[], None] | None = None, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
  """Starts the command line in a process that calls `prepare` first and writes its text to the file `output`."""
  process = forkserver().Process(target=_run, args=(argv, output, prepare, dict(environment or {})))
  process.start()
  return process


def _run(argv: list[str], output: Path, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
  """The main function of the process, which ends with the exit code of the command."""
  os.environ.update(environment)  # JAX reads it at its first use
  code = 70
  with open(output, "ab", buffering=0) as file, contextlib.suppress(BaseException):
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
      if prepare is not None:
        prepare()
      from lora_exp.cli import main as entry

      code = entry.run(argv)
    except BaseException:
      traceback.print_exc()
      raise
  os._exit(code)  # without the second that Python takes to end
