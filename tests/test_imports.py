"""Imports go one way, in the order that the package's docstring names, and what must be quick imports no jax."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_exp

PACKAGE = Path(lora_exp.__file__).parent


def nouns() -> list[str]:
  """The modules of the package, in the order that its docstring gives them."""
  order = re.search(r"config < .*", lora_exp.__doc__ or "", re.DOTALL)
  assert order, "the docstring of lora_exp names the order of the imports: config < … < __main__"
  return re.split(r"\s*<\s*", order[0].strip())


def imported(file: Path) -> set[str]:
  """The dotted modules of this package that `file` imports, wherever in it."""
  found: set[str] = set()
  for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file}: imports are absolute"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return {name for name in found if name.split(".")[0] == "lora_exp" and name != "lora_exp.__version__"}


def module_of(dotted: str) -> str:
  """The file's module that a dotted import names: the longest prefix that is one."""
  while not ((file := PACKAGE.parent / dotted.replace(".", "/")).with_suffix(".py").is_file() or file.is_dir()):
    dotted = dotted.rpartition(".")[0]
  return dotted


def graph() -> dict[str, set[str]]:
  """Module -> the modules of this package that it imports."""
  edges = {}
  for file in sorted(set(PACKAGE.rglob("*.py")) - set((PACKAGE / "_plugins").rglob("*.py"))):  # those are Hydra's doors
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    edges[name] = {module_of(target) for target in imported(file)} - {name}
  return edges


def test_every_module_has_a_place_in_the_order():
  files = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
  named = nouns()
  assert len(named) == len(set(named))
  assert set(named) == files - {"__init__"}


def test_a_module_imports_only_from_its_left():
  place = {name: i for i, name in enumerate(nouns())}
  wrong = []
  for module, targets in graph().items():
    here = module.split(".")[1] if "." in module else None
    for target in targets:
      there = target.split(".")[1] if "." in target else None
      if here and there and here != there and place[there] > place[here]:
        wrong.append(f"{module} imports {target}, which is to its right")
  assert not wrong


def test_no_module_imports_itself_by_a_detour():
  edges = graph()
  # A package's __init__ gathers its own files, and they do not import it.
  done: set[str] = set()

  def visit(module: str, trail: tuple[str, ...]) -> None:
    assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
    if module not in done:
      for target in edges.get(module, ()):
        visit(target, (*trail, module))
      done.add(module)

  for module in edges:
    visit(module, ())


@pytest.mark.parametrize("module", ["config", "report", "screen", "cache"])
def test_what_must_be_quick_imports_no_jax(module):
  script = f"import sys, lora_exp.{module}; print([m for m in ('jax', 'flax', 'optax', 'orbax') if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
  assert done.stdout.strip() == "[]", done.stdout + done.stderr
