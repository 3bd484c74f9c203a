"""A run of a sweep as Hydra composed it. Imports no jax."""

from dataclasses import dataclass
from pathlib import Path

from lora_exp.config.schema import Config


@dataclass(frozen=True)
class SweepRun:
  """One run of a sweep: its number, its config and its directory."""

  number: int
  cfg: Config
  run_dir: Path
  overrides: str  # as typed, separated by spaces


@dataclass(frozen=True)
class PackedSweep:
  """The settings of a sweep that trains in packs."""

  directory: Path
  width: int | None  # maximum number of runs in a pack; None: as many as fit in memory
  repeat_failed: bool  # whether failed runs are trained again
