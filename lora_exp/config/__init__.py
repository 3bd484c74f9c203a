"""Settings as typed dataclasses, their checks, and the errors that a user can cause.

Nothing here needs a file, the network or jax: `schema` (all settings), `conversion` (plain values to `Config`),
`checks` (allowed values), `metrics` (all metrics), `errors`. Checks of files are in `cli.file_checks`; checks specific
to a data source, model family or method are in its package.
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
  RewindError,
  StoppedError,
  did_you_mean,
  nearest,
)
from lora_exp.config.schema import (
  ArchConfig,
  Config,
  DataConfig,
  EvalConfig,
  ExportConfig,
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
  VerifyConfig,
)

__all__ = [
  "ArchConfig",
  "Config",
  "DataConfig",
  "DiskError",
  "DivergedError",
  "EvalConfig",
  "ExportConfig",
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
  "RewindError",
  "StoppedError",
  "TeacherConfig",
  "TrainConfig",
  "VerifyConfig",
  "check",
  "did_you_mean",
  "nearest",
  "to_config",
]
