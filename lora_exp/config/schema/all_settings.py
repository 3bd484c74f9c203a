"""All settings of one run."""

from dataclasses import dataclass, field
from typing import Any

from lora_exp.config.schema.data_settings import DataConfig
from lora_exp.config.schema.eval_settings import EvalConfig
from lora_exp.config.schema.lora_settings import LoraConfig
from lora_exp.config.schema.model_settings import ModelConfig
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


@dataclass
class Config:
  """All settings of one run."""

  task: str = "train"  # a file of lora_exp/tasks: train | generate | evaluate | merge | export | plan | report | …
  name: str = "run"  # last part of the run directory's name
  seed: int = 0  # default of train.seed (adapter init and dropout) and data.seed (the order of rows)
  run: str | None = None  # directory of the run (or sweep) that a task works on; null: the base without an adapter
  cache: str = "~/.cache/lora_exp"  # directory of tokenised rows, pretrained bases and compiled programs
  cache_limit: Any = None  # with task=clean: cache size, such as 20GB; removes the oldest entries beyond it
  runs: Any = None  # with task=compare: directories of runs or sweeps
  prompt: str | None = None  # with task=generate
  prompt_file: Any = None  # with task=generate: a file, a directory or a list of files with prompts
  format: str = "peft"  # with task=export: peft | gguf | mlx (the adapter), merged | gguf_merged, base | gguf_base
  out: str | None = None  # output directory of merge and export (null: RUN/export/FORMAT), advise, bench, plan
  push: str | None = None  # with task=export: OWNER/NAME on the Hugging Face Hub to upload the files to; null: none
  harness: Any = None  # with task=evaluate: one or several tasks of lm-eval, instead of `data`
  harness_tasks: str | None = None  # a directory with further tasks of lm-eval; only the command line can set it
  harness_limit: int | None = None  # maximum number of items per task
  harness_shots: int | None = None  # examples before each question; null: as in the task
  model: ModelConfig = field(default_factory=ModelConfig)
  data: DataConfig = field(default_factory=DataConfig)
  pretrain_data: DataConfig | None = None  # what a base is pretrained on
  retain: DataConfig | None = None  # a second source; the rise of its held-out loss measures forgetting
  mesh: MeshConfig = field(default_factory=MeshConfig)
  distributed: DistributedConfig = field(default_factory=DistributedConfig)
  lora: LoraConfig = field(default_factory=LoraConfig)
  optim: OptimConfig = field(default_factory=OptimConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  sample: SampleConfig = field(default_factory=SampleConfig)
  merge: MergeConfig = field(default_factory=MergeConfig)
  export: ExportConfig = field(default_factory=ExportConfig)
  verify: VerifyConfig = field(default_factory=VerifyConfig)
  report: ReportConfig = field(default_factory=ReportConfig)
  filter: FilterConfig = field(default_factory=FilterConfig)
  clean: CleanConfig = field(default_factory=CleanConfig)
  bench: BenchConfig = field(default_factory=BenchConfig)
  plan: PlanConfig = field(default_factory=PlanConfig)
  logger: LoggerConfig = field(default_factory=LoggerConfig)
  fallback: list[str] = field(default_factory=list)  # overrides that apply if model.weights is not available
  expectations: dict[str, float] | None = None  # {name: number}, checked after training; see train/expectations.py
