"""Settings: what exists (`schema`), what is allowed (`checks`), what goes wrong (`errors`). Imports no jax.

`typed` makes a `Config` of a mapping; `overrides`, `compose`, `saved` and `rundir` are the steps of `commandline`.
"""

from lora_exp.config.checks import check
from lora_exp.config.conversion import to_config
from lora_exp.config.errors import (
  DiskError,
  DivergedError,
  InputError,
  InUseError,
  LoraExpError,
  MemoryFullError,
  NoCheckpointError,
  ReachedError,
  StoppedError,
  did_you_mean,
  nearest,
)
from lora_exp.config.schema import (
  ADAPTERS,
  ArchConfig,
  Config,
  DataConfig,
  LoggerConfig,
  LoraConfig,
  MergeConfig,
  MeshConfig,
  MlpConfig,
  ModelConfig,
  OptimConfig,
  PretrainConfig,
  ReportConfig,
  SampleConfig,
  TeacherConfig,
  TrainConfig,
)

__all__ = [
  "ADAPTERS",
  "ArchConfig",
  "Config",
  "DataConfig",
  "DiskError",
  "DivergedError",
  "InUseError",
  "InputError",
  "LoggerConfig",
  "LoraConfig",
  "LoraExpError",
  "MemoryFullError",
  "MergeConfig",
  "MeshConfig",
  "MlpConfig",
  "ModelConfig",
  "NoCheckpointError",
  "OptimConfig",
  "PretrainConfig",
  "ReachedError",
  "ReportConfig",
  "SampleConfig",
  "StoppedError",
  "TeacherConfig",
  "TrainConfig",
  "check",
  "did_you_mean",
  "nearest",
  "to_config",
]
