"""Settings: what exists (`schema`), what is allowed (`checks`), what goes wrong (`errors`). Imports no jax."""

from lora_exp.config.errors import (
  DiskError,
  DivergedError,
  InputError,
  InUseError,
  LoraExpError,
  NoCheckpointError,
  StoppedError,
  did_you_mean,
  nearest,
)
from lora_exp.config.schema import (
  Config,
  DataConfig,
  LoggerConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  PretrainConfig,
  SampleConfig,
  TrainConfig,
)

__all__ = [
  "Config",
  "DataConfig",
  "DiskError",
  "DivergedError",
  "InUseError",
  "InputError",
  "LoggerConfig",
  "LoraConfig",
  "LoraExpError",
  "MeshConfig",
  "ModelConfig",
  "NoCheckpointError",
  "OptimConfig",
  "PretrainConfig",
  "SampleConfig",
  "StoppedError",
  "TrainConfig",
  "did_you_mean",
  "nearest",
]
