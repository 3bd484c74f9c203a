"""Settings of the tasks other than training."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SampleConfig:
  """Sampling from the model, during training and with task=generate."""

  prompts: list[str] = field(default_factory=list)  # one sample for each; empty: no samples
  every: int = 0  # steps between samples; 0: only before and after training
  max_tokens: int = 48  # tokens to generate after the prompt
  temperature: float = 0.8  # 0: greedy
  top_k: int | None = None  # sample from the k most probable tokens
  top_p: float | None = None  # sample from the most probable tokens with this total probability
  seed: int = 0
  stop: list[str] = field(default_factory=list)  # strings that end a sample; they are cut off
  merged: bool = False  # with task=generate: merge the adapter into the kernels first
  chat: str = "auto"  # prompts as chat turns: auto (as in the run's data; without a run: none) | always | none


@dataclass
class MergeConfig:
  """The merged model that task=merge and task=export write."""

  dtype: str | None = None  # dtype of the written tensors: float32 | bfloat16 | float16; null: model.param_dtype
  bound: float | None = None  # maximum change of a logit by merging; null: depends on the dtype, see tasks/export.py


@dataclass
class FilterConfig:
  """The runs that task=list shows, and whose checkpoints task=clean removes. A text matches any part of the value."""

  name: str | None = None  # the name of the directory; * and ? are wildcards, as in the other texts
  model: str | None = None  # family, or name of the weights
  data: str | None = None  # source, view, and name of the file
  method: str | None = None
  rank: int | None = None
  status: str | None = None  # done | stopped | failed | diverged | unfinished | training | …
  days: float | None = None  # runs that ended within this many days


@dataclass
class CleanConfig:
  """What task=clean deletes."""

  days: float = 30.0  # cache entries that were not used, and checkpoints of runs that ended, for this many days
  min_size: Any = 0  # smallest entry or checkpoint directory to delete: bytes, or a size such as 100MB
  checkpoints: bool = True  # also checkpoints of finished runs, which are then no longer resumable
  delete: bool = False  # false: only show what would be deleted


@dataclass
class PlanConfig:
  """The hardware that task=plan plans for; null means that of this machine."""

  kind: str | None = None  # kind of device: a name in train/costs/device_kinds.py, such as h100, a100 or tpu_v5e
  devices: int | None = None  # number of devices; with `kind`, null: 1
  memory: Any = None  # memory per device, such as 24GB; with `kind`, null: as in the table of kinds
  compile: bool = False  # also compile the step with XLA on this machine, and compare its memory with the estimate


@dataclass
class ReportConfig:
  """How task=report compares the settings of a sweep."""

  metric: str | None = None  # held-out metric that ranks settings (config/metrics.py); null: a study's first, or loss
  margin: float = 0.05  # a setting is enough if it falls short of the best gain by less than this share


@dataclass
class BenchConfig:
  """What task=bench measures, and how often."""

  parts: list[str] = field(default_factory=list)  # of step, data, eval, generate, startup and pack
  turns: int = 5  # repetitions of each measurement; the table shows the median
  seconds: float = 0.5  # minimum duration of a turn
  pack: int = 4  # number of trials in the pack
  ranks: list[int] | None = None  # ranks of the trials in turn; null: lora.rank for all
