"""Settings of the tasks other than training."""

from dataclasses import dataclass, field


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

  dtype: str | None = None  # of the written tensors: float32 | bfloat16 | float16; null: model.param_dtype
  bound: float | None = None  # maximum change of a logit by merging; null: depends on the dtype, see tasks/export.py


@dataclass
class ReportConfig:
  """How task=report compares the settings of a sweep."""

  metric: str | None = None  # held-out metric that ranks settings (config/metrics.py); null: a study's first, or loss
  margin: float = 0.05  # share of the best setting's gain that a setting may be short of it and still be enough
