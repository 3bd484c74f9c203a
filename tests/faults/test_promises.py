"""The README's table of faults names tests that exist."""

import re

import pytest
from runs import ROOT

SECTION = re.search(r"\*\*Faults\.\*\*.*?\n\n(\|.*?)\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
ROWS = SECTION.group(1).splitlines()[2:] if SECTION else []


def test_the_table_is_found():
  assert len(ROWS) > 10


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:40] for row in ROWS])
def test_each_promise_names_tests_that_exist(row):
  shown_by = row.split("|")[3]
  named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", shown_by)
  assert named, row
  for file, function in named:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert f"def {function}(" in text if function else "def test_" in text, f"{file}::{function}"
