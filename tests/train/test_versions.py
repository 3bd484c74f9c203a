"""The versions in summary.json."""

import importlib.metadata

import lora_exp
from lora_exp.train import run_summary


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
  """A run from a clone that was not installed ends as any other."""
  installed = importlib.metadata.version

  def version(name: str) -> str:
    if name in ("lora_exp", "wandb"):
      raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  versions = run_summary._versions()
  assert versions["lora_exp"] == lora_exp.__version__
  assert versions["jax"] == installed("jax")
  assert "wandb" not in versions
