"""The declarations of methods, read from their files without importing them, because they import jax.

A method whose sizes depend on its own functions (IA³) is imported after all.
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
  tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and _assigned(node).get("name") == name:
      cls = _class_of(node, tree)
      return cls() if cls is not None else None
  return None


def _class_of(node: ast.ClassDef, tree: ast.Module) -> type[MethodDeclaration] | None:
  """A class with the declared attributes of `node`, a class of the module `tree`; None if it must be imported."""
  if len(node.bases) != 1 or not isinstance(node.bases[0], ast.Name):
    return None
  if COMPUTED & {child.name for child in node.body if isinstance(child, ast.FunctionDef)}:
    return None
  base = MethodDeclaration if node.bases[0].id == BASE else _imported_class(node.bases[0].id, tree)
  if base is None:
    return None
  attributes = {key: value for key, value in _assigned(node).items() if hasattr(base, key) or key in ("name", "title")}
  for child in node.body:
    if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name) and child.targets[0].id == "leaves":
      leaves = _leaves(child.value, base)
      if leaves is None:
        return None
      attributes["leaves"] = leaves
  return type(node.name, (base,), attributes)


def _imported_class(name: str, tree: ast.Module) -> type[MethodDeclaration] | None:
  """The class `name` that the module `tree` imports from another file of the folder."""
  for node in tree.body:
    if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
      declared = _declared(str(node.module).rpartition(".")[2])
      return type(declared) if declared is not None else None
  return None


def _assigned(node: ast.ClassDef) -> dict[str, Any]:
  """The literal values that the body of a class assigns, by name."""
  values = {}
  for child in node.body:
    if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
      try:
        values[child.targets[0].id] = ast.literal_eval(child.value)
      except ValueError:
        continue  # an expression, such as the format of files
  return values


def _leaves(node: ast.expr, base: type[MethodDeclaration]) -> dict[str, Leaf] | None:
  """The value of an expression of leaves: {"name": Leaf(…)}, `Base.leaves`, or a union of these; None for others."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    left, right = _leaves(node.left, base), _leaves(node.right, base)
    return None if left is None or right is None else left | right
  if isinstance(node, ast.Attribute) and node.attr == "leaves":
    return dict(base.leaves)
  if not isinstance(node, ast.Dict):
    return None
  leaves = {}
  for key, value in zip(node.keys, node.values, strict=True):
    if not isinstance(key, ast.Constant) or not isinstance(value, ast.Call):
      return None
    arguments = [ast.literal_eval(argument) for argument in value.args]
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in value.keywords}
    leaves[str(key.value)] = Leaf(*arguments, **options)
  return leaves
