"""What an experiment runs instead where the weights of its model cannot be had: `otherwise` in its config."""

import os
import urllib.error
import urllib.request
from collections.abc import Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from lora_exp.config.errors import InputError
from lora_exp.models.weights import locate

HUB = "https://huggingface.co"
SECONDS = 5  # to wait for the hub


def instead(composed: DictConfig, typed: Sequence[Override]) -> tuple[list[str], str] | None:
  """The overrides to lay under what was `typed`, and why; None where the model can be had, or was typed.

  Only a training that begins has an alternative.
  """
  chosen = any(override.key_or_group.split(".")[0] in ("model", "run", "otherwise") for override in typed)
  if not composed.otherwise or chosen or composed.task != "train" or composed.train.resume is not None:
    return None
  name = str(composed.model.weights)
  if composed.model.weights is None or (problem := absence(name)) is None:
    return None
  others = [str(text) for text in composed.otherwise]
  why = f"model.weights={name}: {problem}"
  if not locate.is_path(name):
    why += f". With a network: hf download {name} --local-dir DIR, and then model.weights=DIR"
  return others, f"{why}. Now it is: {' '.join(others)}"


def absence(name: str) -> str | None:
  """Why the weights called `name` cannot be had, or None. Of a hub id at most config.json is downloaded."""
  if locate.is_path(name) or name == locate.SMOLLM2:
    problem = locate.problem(name)
    return None if problem is None else problem.partition(": ")[2]
  try:
    if not _cached(name):
      if not _reachable():
        return "is not here, and the hub cannot be reached"
      locate.config_json(name)
  except InputError as error:
    return str(error).removeprefix(f"model.weights={name}: ")
  return None


def _cached(name: str) -> bool:
  try:
    from huggingface_hub import try_to_load_from_cache
  except ImportError:
    raise InputError("is no path here, and a hub id needs huggingface_hub: pip install 'lora_exp[hub]'") from None
  repo, _, revision = name.partition("@")
  files = (locate.SINGLE, locate.INDEX)
  return any(isinstance(try_to_load_from_cache(repo, file, revision=revision or None), str) for file in files)


def _reachable() -> bool:
  """Whether the hub answers at all; its own library would try for half a minute."""
  if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
    return False
  try:
    urllib.request.urlopen(urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD"), timeout=SECONDS)
  except urllib.error.HTTPError:
    return True
  except (OSError, ValueError):
    return False
  return True
