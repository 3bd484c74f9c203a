"""Python's standard library as a source: its code and its docstrings."""

import ast
import io
import itertools
import tokenize
from contextlib import closing
from pathlib import Path

import pytest
from corpora import (
  BYTES,
  documents_in,
  every_row,
)

from lora_exp.config.schema import DataConfig
from lora_exp.data import python_text
from lora_exp.data.documents import Document
from lora_exp.data.rows import make_rows
from lora_exp.data.sources import stdlib


def first_files(view: str, count: int) -> list[Document]:
  """The documents of the first `count` files of the standard library."""
  with closing(stdlib.StandardLibrary(view).documents()) as documents:
    return list(itertools.takewhile(lambda document: document.key < count, documents))


def test_the_librarys_code_has_no_docstring_and_no_comment():
  texts = [document.text for document in first_files("code", 40)]
  assert len(texts) > 30
  for code in texts:
    documented = [n for n in ast.walk(ast.parse(code)) if isinstance(n, python_text.DOCUMENTED)]
    assert [ast.get_docstring(node) for node in documented] == [None] * len(documented)
    assert tokenize.COMMENT not in {token.type for token in tokenize.generate_tokens(io.StringIO(code).readline)}


def test_both_views_of_a_file():
  file = b'"""Module."""\nclass A:\n  """Class.\n\n  More."""\n  async def f(self):\n    """Function."""  # why\n'
  assert python_text.texts_of(file, "docs") == ["Module.", "Class.\n\nMore.", "Function."]
  assert python_text.texts_of(file, "code") == ["class A:\n\n    async def f(self):\n        pass"]
  assert python_text.texts_of(b"print 'python 2'", "code") == []
  assert python_text.texts_of(b"null \0 byte", "code") == []


@pytest.mark.parametrize("workers", [1, 3])
def test_parsing_in_processes_keeps_the_order(workers):
  paths = stdlib.library_files()[:25]
  expected = [python_text.texts_of(path.read_bytes(), "docs") for path in paths]
  assert list(stdlib.parsed(paths, "docs", workers)) == expected


def test_the_library_leaves_out_tests_and_installed_packages():
  root = Path(ast.__file__).parent
  names = [path.relative_to(root).as_posix() for path in stdlib.library_files()]
  assert names == sorted(names)
  assert {"ast.py", "json/decoder.py"} <= set(names)
  assert not [name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]


def test_docstrings_of_a_file_are_held_out_together(tmp_path):
  cfg = DataConfig(view="docs", limit=20, seq_len=64)
  rows = make_rows(cfg, BYTES, tmp_path)
  held = [d.text for d in first_files("docs", 20) if d.key in (9, 19)]
  assert documents_in(every_row(rows, "eval"), BYTES.eot) == [BYTES.encode(text) + [BYTES.eot] for text in held]
