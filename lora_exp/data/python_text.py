"""Python source as two kinds of text: code without docstrings and comments, and the docstrings alone.

This file is also the program of a worker process. It imports only the standard library, so it starts in milliseconds.
It reads paths from standard input, one per line, and writes one line of JSON for each: the list of the file's texts.
"""

import ast
import inspect
import json
import sys
import warnings

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def texts_of(source: bytes, view: str) -> list[str]:
  """The texts of one file: its code (view=code) or its docstrings (view=docs). Empty if the file does not parse."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in old files
      tree = ast.parse(source)
      texts = docstrings(tree) if view == "docs" else [code(tree)]
  except (SyntaxError, ValueError, RecursionError):
    return []
  return [text for text in texts if text.strip()]


def docstrings(tree: ast.Module) -> list[str]:
  """The docstrings of the module, its classes and functions, without indentation, in file order."""
  nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False)]
  nodes.sort(key=lambda node: getattr(node, "lineno", 0))
  return [inspect.cleandoc(ast.get_docstring(node, clean=False) or "") for node in nodes]


def code(tree: ast.Module) -> str:
  """The code without docstrings and comments; a body left empty becomes `pass`."""
  for node in ast.walk(tree):
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
      del node.body[0]
      if not node.body and not isinstance(node, ast.Module):
        node.body.append(ast.Pass())
  return ast.unparse(tree)


def serve(view: str) -> None:
  """Writes the texts of each file named on standard input."""
  for path in sys.stdin.buffer.read().split(b"\n"):
    with open(path, "rb") as file:
      print(json.dumps(texts_of(file.read(), view)), flush=True)


if __name__ == "__main__":
  serve(sys.argv[1])
