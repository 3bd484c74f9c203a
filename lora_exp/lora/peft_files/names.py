"""Names of modules and parameters in PEFT's files."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

PREFIX = "base_model.model."  # prefix of every module's name
BASE = "base_layer"  # PEFT's name of an adapted module within its wrapper
OUTPUT_BIAS = "lora_B.bias"  # added to B's outputs, before the scale
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # rows of an embedding that replace those of the base


class ExpertNames(NamedTuple):
  """The names of a module with the kernels of all experts."""

  ours: str  # the end of our path
  stored: tuple[str, ...]  # the modules of one expert, whose outputs are concatenated; `{}` is its number


class TiedHead(NamedTuple):
  """A head that is the embedding table."""

  path: str  # our path of the table
  head: str  # PEFT's name of the head


@dataclass(frozen=True)
class Naming:
  """The names that PEFT and transformers give to the modules of a model family."""

  prefix: str = ""  # prefix of our module paths: "model." (the Llama family), "transformer." (GPT-2)
  bare: tuple[str, ...] = ("lm_head",)  # modules without the prefix, which are torch.nn.Linear in every family
  conv1d: bool = False  # kernels are stored as (in, out), as in GPT-2's Conv1D
  tied: TiedHead | None = None  # None: the head has its own kernel
  model_type: str = ""  # for messages
  tables: tuple[str, ...] = ("embed_tokens", "wte", "wpe")  # embedding modules
  experts: tuple[ExpertNames, ...] = ()  # in the order of transformers' parameters


def module_name(naming: Naming | None, path: str) -> str:
  """Returns PEFT's name of the module at `path`; the path itself without a `naming`."""
  return path if naming is None or path in naming.bare else naming.prefix + path


def expert_modules(naming: Naming | None, paths: Iterable[str]) -> dict[str, str]:
  """Returns PEFT's names of the modules that hold the factors of experts, for those of `paths` that are experts.

  PEFT wraps the module of all experts once for each adapted parameter; the wrapper of the first one is innermost.
  """
  rows = naming.experts if naming is not None else ()
  adapted = set(paths)
  modules: dict[str, str] = {}
  for i, row in enumerate(rows):
    for path in sorted(adapted):
      if path.endswith(f".{row.ours}"):
        parent = path.removesuffix(row.ours)
        wrappers = sum(f"{parent}{other.ours}" in adapted for other in rows[i + 1 :])
        modules[path] = module_name(naming, path).rpartition(".")[0] + f".{BASE}" * wrappers
  return modules


def parameter_name(naming: Naming | None, path: str) -> tuple[str, bool]:
  """Returns PEFT's name of the parameter at `path`, and whether its array is stored transposed."""
  if naming is None:
    return path, False
  owner, _, leaf = path.rpartition(".")
  transposed = leaf == "kernel" and (owner in naming.bare or not naming.conv1d)
  return f"{module_name(naming, owner)}.{'bias' if leaf == 'bias' else 'weight'}", transposed


def trained_modules(full: Iterable[str]) -> tuple[list[str], list[str]]:
  """Splits fully trained parameters into complete modules (by path) and single biases (by path of the parameter)."""
  owners = {path: path.rpartition(".")[0] for path in full}
  complete_modules = list(dict.fromkeys(owner for path, owner in owners.items() if not path.endswith(".bias")))
  return complete_modules, [path for path, owner in owners.items() if owner not in complete_modules]
