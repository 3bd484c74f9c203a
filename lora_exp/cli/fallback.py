"""The fallback of an experiment: overrides for another model if its own weights are not available."""

import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from lora_exp.config.errors import InputError
from lora_exp.config.old_names import OLD_NAMES, rename_override
from lora_exp.models.weights import locate

HUB = "https://huggingface.co"
TIMEOUT_SECONDS = 5  # timeout of the request that tests whether the hub can be reached


@dataclass(frozen=True)
class Fallback:
  """The overrides to apply before the typed ones, and the reason to show."""

  overrides: list[str]
  reason: str


def find_fallback(composed: DictConfig, typed: Sequence[Override]) -> Fallback | None:
  """The fallback of the composed experiment if its model's weights are not available, else None.

  It applies only to new training runs without a `typed` model.
  """
  overrides = _fallback_setting(composed)
  typed_groups = {override.key_or_group.split(".")[0] for override in typed}
  if not overrides or typed_groups & {"model", "run", "fallback"}:
    return None
  if composed.task != "train" or composed.train.resume is not None or composed.model.weights is None:
    return None
  weights = str(composed.model.weights)
  problem = availability_problem(weights)
  if problem is None:
    return None
  reason = f"model.weights={weights}: {problem}"
  if not locate.is_path(weights):
    reason += f". To use them: hf download {weights} --local-dir DIR, then set model.weights=DIR"
  return Fallback(overrides, f"{reason}. Using the fallback: {' '.join(overrides)}")


def _fallback_setting(composed: DictConfig) -> list[str]:
  """The overrides under `fallback`, or under its old name."""
  old = next(old for old, new in OLD_NAMES.items() if new == "fallback")
  texts = composed.get(old) or composed.get("fallback") or []
  return [rename_override(str(text)) for text in texts]


def availability_problem(weights: str) -> str | None:
  """Why the weights are not available, or None. For a hub id, at most config.json is downloaded."""
  if locate.is_path(weights) or weights == locate.SMOLLM2:
    problem = locate.weights_problem(weights)
    return None if problem is None else problem.partition(": ")[2]
  try:
    if not _in_hub_cache(weights):
      if not _hub_is_reachable():
        return "was not found on this machine, and the hub cannot be reached"
      locate.read_config_json(weights)
  except InputError as error:
    return str(error).removeprefix(f"model.weights={weights}: ")
  return None


def _in_hub_cache(hub_id: str) -> bool:
  """Whether the tensors of a hub model are in huggingface_hub's cache."""
  try:
    from huggingface_hub import try_to_load_from_cache
  except ImportError:
    raise InputError("is not a local path, and a hub id needs huggingface_hub: pip install 'lora_exp[hub]'") from None
  repo, _, revision = hub_id.partition("@")
  files = (locate.SINGLE, locate.INDEX)
  return any(isinstance(try_to_load_from_cache(repo, file, revision=revision or None), str) for file in files)


def _hub_is_reachable() -> bool:
  """Whether the hub responds; huggingface_hub itself would retry for half a minute."""
  if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
    return False
  request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")  # noqa: S310 - the user's hub
  try:
    urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310 - the reply is not read
  except urllib.error.HTTPError:
    return True
  except (OSError, ValueError):
    return False
  return True
