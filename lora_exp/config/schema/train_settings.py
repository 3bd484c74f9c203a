"""Settings of the training: mesh, processes, optimizer, length, loggers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class MeshConfig:
  """Devices along each mesh axis; -1 takes the remaining devices."""

  data: int = -1  # splits the batch
  fsdp: int = 1  # splits the batch and the base's parameters
  tensor: int = 1  # splits heads, feed-forward and vocabulary
  trial: int = 1  # splits the trials of a pack


@dataclass
class DistributedConfig:
  """The processes that train one run together; without a coordinator, a single process."""

  coordinator: str | None = None  # HOST:PORT of process 0; auto: JAX finds all three (SLURM, TPU, Open MPI)
  processes: int | None = None  # number of processes; null: JAX finds it
  process: int | None = None  # index of this process, from 0; null: JAX finds it
  timeout: int = 300  # seconds to wait for the other processes at the start


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
  seed: int = 0  # for adapter init and dropout; null: `seed`
  resume: str | None = None  # run directory of the run to resume
  on_nan: str = "stop"  # a step with NaN or infinity never changes the weights. stop: end the run, with exit code 5 |
  # skip: continue with the next batch | rewind: go back to the last checkpoint, and leave out this batch
  stop_at: int | None = None  # stop after this step with a checkpoint, as on a signal (exit code 75)


@dataclass
class LoggerConfig:
  """Where metrics are logged besides metrics.jsonl."""

  name: Any = "wandb"  # lora_exp/train/loggers/NAME_logger.py: wandb | tensorboard | trackio | mlflow, a list, or none
  mode: str = "auto"  # mode of wandb: auto (online if an API key is configured, else offline) | online | offline
  project: str = "lora_exp"  # project of wandb and trackio, experiment of mlflow
  group: str | None = None  # group of the run, in wandb and trackio
  tags: list[str] = field(default_factory=list)  # tags of the run, in wandb and mlflow

  @property
  def names(self) -> list[str]:
    """The loggers in `name`."""
    return list(self.name) if isinstance(self.name, list) else [self.name]
