"""Settings of the adapter."""

from dataclasses import dataclass
from typing import Any

INITS = {  # lora.init -> the distribution of A; the name of a method (pissa, olora) is allowed too
  "kaiming": "U(±1/√in)",
  "he_uniform": "U(±√(6/in))",
  "xavier_uniform": "U(±√(6/(in + rank)))",
  "normal": "N(0, init_std²)",
  "gaussian": "N(0, 1/rank²)",
  "orthogonal": "orthonormal columns",
}


@dataclass
class LoraConfig:
  """The adapter: its method, target modules, rank and initialisation."""

  method: str = "lora"  # a file of lora/methods: lora | dora | vera | … | bitfit (biases) | full | frozen
  rank: int = 8  # R
  parameters: float | None = None  # number of adapter parameters, or a fraction of the base's if < 1; sets the rank
  alpha: float | None = 16.0  # scale = alpha/rank; null: 2 * rank, and larger ranks then need lower learning rates
  scaling: str = "standard"  # standard: alpha/rank | rslora: alpha/sqrt(rank)
  targets: Any = "all_linear"  # a preset, path or re:expression, or a list of them
  exclude: Any = None  # patterns of modules that are not adapted
  layers: Any = None  # indices of the blocks to adapt; null: all
  rank_pattern: dict[str, int] | None = None  # {pattern: rank}, the first match wins
  alpha_pattern: dict[str, float] | None = None  # {pattern: alpha}
  dropout: float = 0.0  # dropout rate of A's input, in training only
  init: str = "kaiming"  # distribution of A, see INITS; pissa and olora compute A and B from the base's kernel
  init_std: float | None = None  # standard deviation of init=normal; null: 1/sqrt(rank)
  lr_ratio: float = 1.0  # learning rate of B divided by that of A (LoRA+)
  lr_scale: float = 1.0  # recommended learning rate of the method divided by that of LoRA, see optim/adamw.yaml
  bias: str = "none"  # biases that are also trained: none | all | lora_only (of the adapted modules)
  train_modules: Any = None  # patterns of modules trained in full, such as a norm or the head
  quant: str | None = None  # quantisation of the adapted kernels: null (none) | int8 | int4 | nf4
  budget: float | None = None  # for adalora: final average rank per module, at most `rank`
  options: dict[str, Any] | None = None  # settings of the method, see its file in lora/methods
  init_from: str | None = None  # directory of an adapter to start from; it sets method, rank, alpha and targets
  compute: str = "auto"  # auto | factored x·A·B | merged x·(W + s·A·B)
