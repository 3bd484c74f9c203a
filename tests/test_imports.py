"""The rules of the package's layout: which room may import which, how large files and functions are, what is quick."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import lora_exp

PACKAGE = Path(lora_exp.__file__).parent
PLUGINS = PACKAGE / "cli" / "hydra_plugins_path"  # Hydra imports these files, not we
MOST_ENTRIES, MOST_FILE_LINES, MOST_FUNCTION_LINES = 12, 350, 60
REGISTRIES = ("tasks", "methods", "sources", "families")  # folders whose files are named by what a person types
SHARED_WITH_HYDRA = ("hydra_plugins",)  # the namespace in which Hydra looks for plugins
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "transformers", "torch")


def rooms() -> list[str]:
  """The packages in the order of the rule in the docstring of lora_exp: each imports only from those before it."""
  rule = re.search(r"^ *(\w+( < \w+)+) *$", lora_exp.__doc__ or "", re.MULTILINE)
  assert rule, "the docstring of lora_exp has the rule: config < … < cli"
  return rule[1].split(" < ")


def python_files() -> list[Path]:
  return sorted(file for file in PACKAGE.rglob("*.py") if PLUGINS not in file.parents)


def module_name(file: Path) -> str:
  return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_names(file: Path) -> set[str]:
  """The dotted names of this package that `file` imports, also inside functions."""
  names: set[str] = set()
  for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file}: imports are absolute"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return {name for name in names if name.split(".")[0] == "lora_exp" and name != "lora_exp.__version__"}


def imported_module(name: str) -> str:
  """The longest prefix of a dotted name that is a module."""
  while True:
    path = PACKAGE.parent / name.replace(".", "/")
    if path.with_suffix(".py").is_file() or path.is_dir():
      return name
    name = name.rpartition(".")[0]


def import_graph() -> dict[str, set[str]]:
  """Module -> the modules of this package that it imports."""
  graph = {}
  for file in python_files():
    module = module_name(file)
    graph[module] = {imported_module(name) for name in imported_names(file)} - {module}
  return graph


def room_of(module: str) -> str:
  return module.split(".")[1] if "." in module else ""


def test_every_package_is_in_the_rule():
  packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
  assert len(rooms()) == len(set(rooms()))
  assert packages == set(rooms())


def test_lora_exp_has_at_most_twelve_entries():
  entries = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
  assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_packages_import_only_from_those_before():
  position = {room: i for i, room in enumerate(rooms())}
  wrong = []
  for module, targets in import_graph().items():
    room = room_of(module)
    if room in position:
      later = [target for target in targets if position.get(room_of(target), -1) > position[room]]
      wrong += [f"{module} imports {target}" for target in later]
  assert not wrong, "\n".join(sorted(wrong))


def test_no_module_imports_itself_indirectly():
  graph = import_graph()
  finished: set[str] = set()

  def visit(module: str, trail: tuple[str, ...]) -> None:
    assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
    if module not in finished:
      for target in graph.get(module, ()):
        visit(target, (*trail, module))
      finished.add(module)

  for module in graph:
    visit(module, ())


def folder_of(module: str) -> str:
  """The folder inside a package that `module` is in; a file directly in the package is a folder of its own."""
  parts = module.split(".")
  is_folder = (PACKAGE.parent / "/".join(parts)).is_dir()
  folder = parts if is_folder else parts[:-1]
  return ".".join(folder[:3]) if len(folder) > 2 else module


def test_folders_of_a_package_import_in_one_direction():
  between: dict[str, set[str]] = {}
  for module, targets in import_graph().items():
    between.setdefault(folder_of(module), set()).update(map(folder_of, targets))
  list(TopologicalSorter({folder: targets - {folder} for folder, targets in between.items()}).static_order())


def test_files_and_functions_are_short():
  too_long = []
  for file in python_files():
    text = file.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > MOST_FILE_LINES:
      too_long.append(f"{module_name(file)}: {lines} lines")
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
        lines = node.end_lineno - node.lineno + 1
        if lines > MOST_FUNCTION_LINES:
          too_long.append(f"{module_name(file)}.{node.name}: {lines} lines")
  assert not too_long, "\n".join(too_long)


def test_config_uses_no_file_system():
  forbidden = {"exists", "is_dir", "is_file", "iterdir", "glob", "open", "read_text", "write_text", "find_spec"}
  calls = set()
  for file in (PACKAGE / "config").rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        calls |= {f"{file.name}: {name}"} if name in forbidden else set()
  assert not calls


def test_no_two_files_have_one_name():
  files = [file for file in python_files() if file.parent.name not in REGISTRIES and not file.stem.startswith("__")]
  names = [file.name for file in files]
  assert sorted(name for name in set(names) if names.count(name) > 1) == []


def library_names() -> set[str]:
  """The names under which the standard library and the packages in pyproject.toml, extras included, are imported."""
  project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  extras = project["optional-dependencies"].values()
  declared = [text for texts in (project["dependencies"], *extras) for text in texts]
  wanted = {canonical(re.split(r"[^\w.-]", text)[0]) for text in declared}
  installed = {name: set(map(canonical, providers)) for name, providers in packages_distributions().items()}
  modules = {name for name, providers in installed.items() if wanted & providers}
  missing = wanted - set().union(*installed.values())
  spelled = {name.replace("-", "_") for name in missing}
  return {*sys.stdlib_module_names, *modules, *spelled, "evaluate"}  # lm-eval imports evaluate


def canonical(distribution: str) -> str:
  return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_module_is_called_like_a_library():
  """A file that is run as a script finds the modules of its folder before those of any library."""
  paths = [*PACKAGE.rglob("*.py"), *(file.parent for file in PACKAGE.rglob("__init__.py"))]
  names = {path: path.stem for path in paths if path != PACKAGE}
  forbidden = library_names() - set(SHARED_WITH_HYDRA) - {"__init__", "__main__"}
  assert [str(path.relative_to(PACKAGE)) for path, name in names.items() if name in forbidden] == []


@pytest.mark.parametrize("module", ["config", "report", "runtime.console", "runtime.cache", "runtime.saved_config",
                                    "cli.main", "cli.command_line"])  # fmt: skip
def test_what_must_be_quick_imports_no_jax(module):
  script = f"import sys, lora_exp.{module}; print([name for name in {HEAVY} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
  assert done.stdout.strip() == "[]", done.stdout + done.stderr
