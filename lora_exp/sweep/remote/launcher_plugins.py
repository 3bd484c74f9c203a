"""Launchers from Hydra plugins (joblib, Ray, submitit): which one runs the jobs, and whether it is installed."""

import importlib.util
import shutil
import warnings

from omegaconf import DictConfig

# Class in hydra_plugins.lora_exp.external_launchers -> the plugin's class and the extra that installs it.
PLUGINS = {
  "Joblib": ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "joblib"),
  "Ray": ("hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "ray"),
  "Slurm": ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "slurm"),
  "Local": ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher", "slurm"),
}
# Hydra warns that it validates our launcher files against the plugin's schema of the same name, which is intended.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def launcher_plugin(node: DictConfig) -> tuple[str, str] | None:
  """The plugin's class and extra for the config node of a launcher; None if jobs run in this process."""
  module, _, name = str(node._target_).rpartition(".")
  return PLUGINS.get(name) if module == "hydra_plugins.lora_exp.external_launchers" else None


def launcher_problems(hydra: DictConfig) -> list[str]:
  """Error messages for requirements of the launcher that are missing."""
  plugin = launcher_plugin(hydra.launcher.get("place") or hydra.launcher)
  if plugin is None:
    return []
  cls, extra = plugin
  name, package = hydra.runtime.choices["hydra/launcher"], cls.split(".")[1].replace("_", "-")
  if not _is_installed(cls.rpartition(".")[0]):
    return [f"hydra/launcher={name}: needs {package}: pip install 'lora_exp[{extra}]'"]
  if cls == PLUGINS["Slurm"][0] and shutil.which("srun") is None:
    local = name.replace("slurm", "local")
    return [f"hydra/launcher={name}: srun is not available; run this on the cluster, or use hydra/launcher={local}"]
  return []


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # raised if its parent package is missing
    return False
