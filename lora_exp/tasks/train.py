"""`task=train`: trains a run, or resumes one."""

from pathlib import Path

from lora_exp.config import Config, InputError
from lora_exp.runtime.console import phase
from lora_exp.runtime.device import start_jax
from lora_exp.runtime.locks import run_lock
from lora_exp.runtime.output_stream import without_waiting
from lora_exp.runtime.saved_config import save_config
from lora_exp.train.plan import make_plan
from lora_exp.train.single_run import train_run


def run(cfg: Config, run_dir: Path) -> None:
  """Locks the run directory, writes config.yaml, and trains.

  If a run cannot be resumed with the given settings, its config.yaml is restored.
  """
  with run_lock(run_dir), without_waiting():
    start_jax(cfg.cache)
    with phase("check the settings against the model"):
      plan = make_plan(cfg)
    previous = save_config(plan.saved_cfg, run_dir)
    try:
      train_run(plan, run_dir)
    except InputError:
      if previous is not None:
        save_config(previous, run_dir)
      raise
