"""The declarations of methods, read from their files without importing them, because they import jax.

Importing jax would take most of the time of task=plan. What is read are the attributes of `MethodDeclaration` that the
class of a method, and the classes that it inherits from, set to a literal value. `leaves` may also be
{"name": Leaf(…)}, `Base.leaves`, or a union of these. A method with other values, or whose functions compute what it
declares (IA³), is imported after all.
"""

import ast
from functools import cache
from importlib import import_module
from typing import Any

from lora_exp.config import LoraConfig
from lora_exp.config.schema import INITS
from lora_exp.lora.method_declaration import Leaf, MethodDeclaration
from lora_exp.lora.method_files import FOLDER, method_names

BASE = "Method"  # the class in methods/base.py that all methods derive from
COMPUTED = {"leaf_names", "sizes", "trained_size", "check"}  # functions that a declaration alone does not have


class UnreadableError(Exception):
  """A declaration that only importing the method gives."""


def declared_of(config: LoraConfig) -> MethodDeclaration:
  """The declaration of the method of `config`. Raises InputError if there is no such method."""
  declared = _declared(config.method) if config.init in INITS else None
  if declared is not None:
    return declared
  imported: MethodDeclaration = import_module("lora_exp.lora.methods").of(config)
  return imported


@cache
def _declared(name: str) -> MethodDeclaration | None:
  """The declaration in the file of the method `name`; None if there is none, or if it must be imported."""
  if name not in method_names():
    return None
  try:
    return _read_class(name)()
  except UnreadableError:
    return None


def _read_class(name: str) -> type[MethodDeclaration]:
  """The class in the file of the method `name`, with the declared attributes. Raises UnreadableError."""
  tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
  for node in tree.body:
    if isinstance(node, ast.ClassDef):
      assignments = _assignments(node)
      if "name" in assignments and _literal(assignments["name"]) == name:
        return _class_of(node, _base_class(node, tree))
  raise UnreadableError(f"{name}.py has no class with name = {name!r}")


def _class_of(node: ast.ClassDef, base: type[MethodDeclaration]) -> type[MethodDeclaration]:
  """A class derived from `base` with the declared attributes of `node`."""
  if COMPUTED & {child.name for child in node.body if isinstance(child, ast.FunctionDef)}:
    raise UnreadableError(f"{node.name} computes what it declares")
  attributes: dict[str, Any] = {}
  for name, expression in _assignments(node).items():
    if name == "leaves":
      attributes[name] = _leaves(expression, base)
    elif hasattr(MethodDeclaration, name) or name in MethodDeclaration.__annotations__:
      attributes[name] = _literal(expression)
  return type(node.name, (base,), attributes)


def _base_class(node: ast.ClassDef, tree: ast.Module) -> type[MethodDeclaration]:
  """The class that `node`, a class of the module `tree`, inherits from: `Method`, or that of another method."""
  names = [base.id for base in node.bases if isinstance(base, ast.Name)]
  if names == [BASE]:
    return MethodDeclaration
  for statement in tree.body:
    if isinstance(statement, ast.ImportFrom) and [alias.name for alias in statement.names if alias.name in names]:
      return _read_class(str(statement.module).rpartition(".")[2])
  raise UnreadableError(f"{node.name} does not inherit from a method of another file")


def _assignments(node: ast.ClassDef) -> dict[str, ast.expr]:
  """The expressions that the body of a class assigns, by name."""
  assignments = {}
  for child in node.body:
    if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
      assignments[child.targets[0].id] = child.value
  return assignments


def _literal(expression: ast.expr) -> Any:
  try:
    return ast.literal_eval(expression)
  except ValueError:
    raise UnreadableError(f"{ast.unparse(expression)} is no literal value") from None


def _leaves(expression: ast.expr, base: type[MethodDeclaration]) -> dict[str, Leaf]:
  """The value of an expression of leaves: {"name": Leaf(…)}, `Base.leaves`, or a union of these."""
  if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.BitOr):
    return _leaves(expression.left, base) | _leaves(expression.right, base)
  if isinstance(expression, ast.Attribute) and expression.attr == "leaves":
    return dict(base.leaves)
  if not isinstance(expression, ast.Dict):
    raise UnreadableError(f"{ast.unparse(expression)} is no dict of leaves")
  leaves = {}
  for key, value in zip(expression.keys, expression.values, strict=True):
    if key is None or not isinstance(value, ast.Call):
      raise UnreadableError(f"{ast.unparse(expression)} is no dict of leaves")
    options = {str(keyword.arg): _literal(keyword.value) for keyword in value.keywords}
    leaves[str(_literal(key))] = Leaf(*map(_literal, value.args), **options)
  return leaves
