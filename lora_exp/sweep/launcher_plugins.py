"""Launchers that are Hydra plugins with a package of their own: which one places the runs, and whether it is there."""

import importlib.util
import shutil
import warnings

from omegaconf import DictConfig

# Our class (in _plugins) -> the plugin's, and the extra that installs it.
PLUGINS = {
  "Joblib": ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "joblib"),
  "Ray": ("hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "ray"),
  "Slurm": ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "slurm"),
  "Local": ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher", "slurm"),
}
# Hydra holds our files against the plugin's own settings of the same name, as is meant, and warns that it does.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def plugin_of(node: DictConfig) -> tuple[str, str] | None:
  """The plugin's class, and its extra, that the node of a launcher places runs with; None: they stay here."""
  module, _, name = str(node._target_).rpartition(".")
  return PLUGINS.get(name) if module == "hydra_plugins.lora_exp.placed" else None


def launcher_problems(hydra: DictConfig) -> list[str]:
  """What is missing for the launcher that runs the jobs, or that places a packed launcher's packs."""
  found = plugin_of(hydra.launcher.get("place") or hydra.launcher)
  if found is None:
    return []
  plugin, extra = found
  name, package = hydra.runtime.choices["hydra/launcher"], plugin.split(".")[1].replace("_", "-")
  if not _installed(plugin.rpartition(".")[0]):
    return [f"hydra/launcher={name}: needs {package}: pip install 'lora_exp[{extra}]'"]
  if plugin == PLUGINS["Slurm"][0] and shutil.which("srun") is None:
    local = name.replace("slurm", "local")
    return [f"hydra/launcher={name}: no srun here: type it on a machine of the cluster, or try hydra/launcher={local}"]
  return []


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False
