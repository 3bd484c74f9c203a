"""PEFT's names of modules and parameters."""

from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "base_model.model."  # before every module's name

@dataclass(frozen=True)
class Naming:
  """How PEFT, and transformers below it, call the modules of a family."""

  prefix: str = ""  # before our module paths: "model." (the Llama family), "transformer." (GPT-2)
  bare: tuple[str, ...] = ("lm_head",)  # modules without the prefix; torch's Linear in every family
  conv1d: bool = False  # kernels are stored (in, out), as GPT-2's Conv1D does
  tied: tuple[str, str] | None = None  # our path of the table and PEFT's name of the head, where they are one
  model_type: str = ""  # for messages
  tables: tuple[str, ...] = ("embed_tokens", "wte", "wpe")  # modules that are look-ups


def module_name(naming: Naming | None, path: str) -> str:
  """PEFT's name of our module."""
  return path if naming is None or path in naming.bare else naming.prefix + path


def parameter_name(naming: Naming | None, path: str) -> tuple[str, bool]:
  """PEFT's name of our parameter, and whether it is stored transposed. Without a naming it is our own."""
  if naming is None:
    return path, False
  owner, _, leaf = path.rpartition(".")
  turned = leaf == "kernel" and (owner in naming.bare or not naming.conv1d)
  return f"{module_name(naming, owner)}.{'bias' if leaf == 'bias' else 'weight'}", turned


def trained_modules(full: Iterable[str]) -> tuple[list[str], list[str]]:
  """The modules that are trained whole, and the biases beside them, of parameters by their own paths."""
  owners = {path: path.rpartition(".")[0] for path in full}
  whole = list(dict.fromkeys(owner for path, owner in owners.items() if not path.endswith(".bias")))
  return whole, [path for path, owner in owners.items() if owner not in whole]
