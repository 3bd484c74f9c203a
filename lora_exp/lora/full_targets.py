"""Selection of the base's parameters that are trained in full, from their paths alone. No jax."""

from collections.abc import Mapping, Sequence

from lora_exp.config import InputError
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.targets import advice, as_list, matches


def select_full_paths(
  parameters: Sequence[str],
  table: Sequence[AdaptedModule],
  bias: str = "none",
  train_modules: str | Sequence[str] | None = None,
) -> list[str]:
  """Returns those of `parameters` (dotted paths) that are trained in full.

  `train_modules` are patterns of modules; every parameter in a matching module is trained. `bias` is "none", "all"
  (every bias of the model) or "lora_only" (the biases of the modules in `table`), as in PEFT.

  Raises InputError if a pattern matches no module, if a matching module is adapted, or if there is no bias to train.
  """
  owners = {path: path.rpartition(".")[0] for path in parameters}
  adapted = {row.path for row in table}
  problems: list[str] = []
  selected: set[str] = set()
  containers = _containers(owners)
  for pattern in as_list(train_modules):
    matching_modules = [module for module in containers if matches(pattern, module)]
    inside = [path for path, owner in owners.items() if any(_is_inside(owner, m) for m in matching_modules)]
    if not inside:
      problems.append(f"lora.train_modules={pattern} matches no module; {advice(pattern, containers, {})}")
    adapted_inside = sorted({owners[path] for path in inside} & adapted)
    if adapted_inside:
      problems.append(
        f"lora.train_modules={pattern}: {adapted_inside[0]} is adapted as well; exclude it with lora.exclude, or "
        "remove the pattern"
      )
    selected |= set(inside)
  if bias != "none":
    biases = [p for p, owner in owners.items() if p.endswith(".bias") and (bias == "all" or owner in adapted)]
    if not biases:
      scope = "the model has" if bias == "all" else "the adapted modules have"
      problems.append(f"lora.bias={bias}: {scope} no bias to train; set lora.bias=none")
    selected |= set(biases)
  if problems:
    raise InputError(problems)
  return [path for path in parameters if path in selected]


def _containers(owners: Mapping[str, str]) -> list[str]:
  """The paths of all modules that hold a parameter, directly or in a submodule."""
  paths: set[str] = set()
  for owner in owners.values():
    segments = owner.split(".")
    paths |= {".".join(segments[: n + 1]) for n in range(len(segments))}
  return sorted(paths)


def _is_inside(path: str, module: str) -> bool:
  """Whether the module `path` is `module` or a submodule of it."""
  return path == module or path.startswith(f"{module}.")
