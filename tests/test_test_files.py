"""The rules of the test files: short names, no name twice, an assertion in every test, helpers in tests/helpers."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("test_*.py"))
LONGEST_NAME = 60
CHECKING = ("assert", "check", "same", "raises", "warns", "golden")  # how functions that assert are named


def functions(file: Path) -> Iterator[ast.FunctionDef]:
  for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
    if isinstance(node, ast.FunctionDef):
      yield node


def used_names(function: ast.FunctionDef) -> set[str]:
  nodes = list(ast.walk(function))
  return {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {
    node.id for node in nodes if isinstance(node, ast.Name)
  }


def asserting_functions(file: Path) -> set[str]:
  """The functions of a file that hold an assertion, or use one that does."""
  defined = list(functions(file))
  asserting = {f.name for f in defined if any(isinstance(node, ast.Assert) for node in ast.walk(f))}
  for _ in defined:
    asserting |= {f.name for f in defined if used_names(f) & asserting}
  return asserting


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_names_are_short_and_different(file):
  names = [f.name for f in functions(file) if f.name.startswith("test_")]
  assert [name for name in names if len(name) > LONGEST_NAME] == []
  assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_every_test_asserts_something(file):
  helpers = {name for helper in (TESTS / "helpers").glob("*.py") for name in asserting_functions(helper)}
  asserting = asserting_functions(file) | helpers
  for function in functions(file):
    if function.name.startswith("test_"):
      names = used_names(function)
      asserts = function.name in asserting or names & asserting
      assert asserts or any(word in name for name in names for word in CHECKING), function.name


def test_no_test_file_imports_another():
  trees = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
  imports = [(name, node.module) for name, tree in trees.items() for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom)]
  assert [pair for pair in imports if (pair[1] or "").startswith("test_")] == []


def test_no_two_test_files_have_one_name():
  assert [name for name, count in Counter(file.name for file in FILES).items() if count > 1] == []
