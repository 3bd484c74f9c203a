"""The entry point: runs one command line and ends the process with its exit code."""

import logging
import os
import sys
from collections.abc import Sequence

from lora_exp import __version__
from lora_exp.cli.command_line import check_command_line
from lora_exp.cli.error_report import report_error
from lora_exp.cli.session import INTERRUPTED, Session
from lora_exp.config.errors import DONE, InputError, LoraExpError
from lora_exp.runtime.console import log_later, show
from lora_exp.runtime.output_stream import open_closed_descriptors, tolerant_output

logging.getLogger("lora_exp").addHandler(logging.NullHandler())  # tasks without a log file do not print log lines
logging.raiseExceptions = False  # a log that cannot be written does not print a traceback for each line


def main() -> None:
  """`python -m lora_exp` and `lora-exp`: ends the process with its exit code."""
  open_closed_descriptors()
  with tolerant_output():
    code = run(sys.argv[1:])
  sys.exit(code)


def run(argv: Sequence[str]) -> int:
  """Runs one command line and returns its exit code."""
  if "--version" in argv:
    show(f"lora_exp {__version__}")
    return DONE
  log_later()
  full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
  try:
    return Session(check_command_line(argv), full_error).run()
  except (LoraExpError, OSError) as error:
    return report_error(error, full_error)
  except RecursionError as error:
    too_deep = InputError(f"a value is nested too deeply ({error}); HYDRA_FULL_ERROR=1 shows where")
    too_deep.__cause__ = error
    return report_error(too_deep, full_error)
  except KeyboardInterrupt:
    show("interrupted")
    return INTERRUPTED
