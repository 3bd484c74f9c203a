"""Commands on hostile files end with one screen of text and exit code 2, or 4 for a run without a good checkpoint.

They stay within limits of time and memory, show no traceback and no secret, and create nothing outside of their run.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_commands import KINDS, Case, argv_of, cases, faults, good_files, run_limited

FEW = [Case("base config", True, 3), Case("chat template", True, 2), Case("adapter weights", True, 3),
       Case("parquet", True, 3), Case("config of a run", True, 4), Case("checkpoint", True, 7)]  # fmt: skip
SEEDS = 3  # damaged files of each kind


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return good_files(tmp_path_factory.mktemp("good"))


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_command_refuses_a_hostile_file(case, good, tmp_path):
  assert faults(case, good, tmp_path)[1] == []


@pytest.mark.faults_full
@pytest.mark.parametrize("kind", KINDS)
def test_a_command_on_good_files_ends_with_0(kind, good, tmp_path):
  files = good_files(tmp_path / "files") if KINDS[kind].argv[0].startswith("train.resume") else good
  ended = run_limited(argv_of(KINDS[kind], files, files), tmp_path / "cwd", files / "cache")
  expected = 2 if kind == "gguf" else 0  # that file has no weights of a model
  assert ended.code == expected, ended.err


@pytest.mark.faults_full
def test_commands_refuse_hostile_files(good, tmp_path, record_property: Callable[[str, object], None]):
  codes, failed = Counter[int](), []
  for case in cases(SEEDS):
    code, broken = faults(case, good, tmp_path)
    codes[code] += 1
    print(f"{case}: exit code {code}{'' if not broken else f', FAILED: {broken}'}", flush=True)
    if broken:
      failed.append(f"{case}: {'; '.join(broken)}")
  record_property("fault_count", {"fault": "a hostile file given to a command", "count": codes.total(),
                                  "failed": len(failed)})
  assert not failed, "\n".join(failed)
  assert codes.total() >= 100
