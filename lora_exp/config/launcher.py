"""Launchers that come with a package of their own: whether it is installed."""

import importlib.util

from omegaconf import DictConfig

EXTRAS = {"hydra_joblib_launcher": "joblib", "hydra_ray_launcher": "ray", "hydra_submitit_launcher": "slurm"}


def launcher_problems(hydra: DictConfig) -> list[str]:
  """What is missing for the launcher that runs the jobs, or that places a packed launcher's packs."""
  node = hydra.launcher.get("place") or hydra.launcher
  package = str(node.get("plugin", "")).split(".")[1:2]
  if not package or _installed(f"hydra_plugins.{package[0]}"):
    return []
  name = hydra.runtime.choices["hydra/launcher"]
  extra = EXTRAS.get(package[0])
  install = f"pip install 'lora_exp[{extra}]'" if extra else f"install the package that has {package[0]}"
  return [f"hydra/launcher={name}: needs {package[0]}: {install}"]


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # no plugin at all
    return False
