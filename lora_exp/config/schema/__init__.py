"""Every setting as a typed dataclass, with a comment on each field: its meaning, unit and choices.

These classes define which settings exist. The YAML files under `conf/` hold the values, `checks.py` checks them. A
field of type `Any` takes a string or a list of strings, a union that OmegaConf does not support.
"""

from lora_exp.config.schema.all_settings import Config
from lora_exp.config.schema.data_settings import DataConfig, TeacherConfig
from lora_exp.config.schema.eval_settings import EvalConfig
from lora_exp.config.schema.lora_settings import INITS, LoraConfig
from lora_exp.config.schema.model_settings import (
  SMOLLM2,
  TOKENIZERS,
  ArchConfig,
  MlpConfig,
  ModelConfig,
  PretrainConfig,
)
from lora_exp.config.schema.serving_settings import ExportConfig, VerifyConfig
from lora_exp.config.schema.task_settings import (
  BenchConfig,
  CleanConfig,
  FilterConfig,
  MergeConfig,
  PlanConfig,
  ReportConfig,
  SampleConfig,
)
from lora_exp.config.schema.train_settings import (
  DistributedConfig,
  LoggerConfig,
  MeshConfig,
  OptimConfig,
  TrainConfig,
)

__all__ = [
  "INITS",
  "SMOLLM2",
  "TOKENIZERS",
  "ArchConfig",
  "BenchConfig",
  "CleanConfig",
  "Config",
  "DataConfig",
  "DistributedConfig",
  "EvalConfig",
  "ExportConfig",
  "FilterConfig",
  "LoggerConfig",
  "LoraConfig",
  "MergeConfig",
  "MeshConfig",
  "MlpConfig",
  "ModelConfig",
  "OptimConfig",
  "PlanConfig",
  "PretrainConfig",
  "ReportConfig",
  "SampleConfig",
  "TeacherConfig",
  "TrainConfig",
  "VerifyConfig",
]
