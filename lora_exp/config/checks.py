"""`check`: every problem of a config that can be found without files, the network or jax, one line each."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_exp.config.allowed_values import choice_problems, range_problems
from lora_exp.config.bench_checks import bench_problems
from lora_exp.config.conversion import shown
from lora_exp.config.credentials import credential_problem
from lora_exp.config.data_checks import data_problems
from lora_exp.config.errors import did_you_mean
from lora_exp.config.eval_checks import eval_problems
from lora_exp.config.lora_checks import lora_problems
from lora_exp.config.metrics import METRICS
from lora_exp.config.override_grammar import typed
from lora_exp.config.schema import TOKENIZERS, Config

TASKS_OF_A_RUN = ("merge", "export")  # tasks that need a run
ADAPTER_FORMATS, BASE_FORMATS = ("peft", "gguf", "mlx"), ("base", "gguf_base")  # values of `format`
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
# Expectations of an experiment for a finished run, in addition to the metrics.
EXPECTATIONS = ("trainable", "total", "adapter_bytes", "loss_falls", "behind_best", "base_changed", "merged_differs",
                "off_differs")
MOST_NAME_BYTES = 100
ADDRESS = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")  # host:port
SIZE = re.compile(r"\d{1,15}(\.\d{1,15})? ?([KMGT]?B)?", re.IGNORECASE)
MOST_PORT = 65535


def check(cfg: Config) -> list[str]:
  """Every problem of `cfg`, one line each: 'path=value: what is allowed'."""
  parts = (choice_problems, range_problems, _task_problems, _name_problems, _credential_problems, _distributed_problems,
           _model_problems, _mlp_problems, data_problems, lora_problems, _optim_problems, _train_problems,
           _sample_problems, eval_problems, _expectation_problems, bench_problems)  # fmt: skip
  return [problem for part in parts for problem in part(cfg)]


def export_directory(cfg: Config) -> Path:
  """The directory that task=merge and task=export write."""
  if cfg.out:
    return Path(cfg.out)
  return Path(str(cfg.run)) / "export" / ("merged" if cfg.task == "merge" else cfg.format)


def _task_problems(cfg: Config) -> Iterator[str]:
  if cfg.task == "dashboard" and cfg.run is None:
    yield "run=null: task=dashboard needs a sweep or a run; add run=outputs/sweeps/DAY/TIME-NAME"
  if cfg.task == "inspect" and cfg.run is None:
    yield "run=null: task=inspect needs a run or a sweep to inspect; add run=outputs/DAY/TIME-NAME"
  if cfg.task == "clean":
    yield from _size_problems(cfg)
  if cfg.task == "plan" and cfg.plan.memory is not None and SIZE.fullmatch(str(cfg.plan.memory)) is None:
    yield f"plan.memory={shown(cfg.plan.memory)}: must be a size such as 24GB, or a number of bytes"
  if cfg.task == "advise":
    yield from _advise_problems(cfg)
  if cfg.task == "train" and cfg.run:
    yield f"run={cfg.run}: task=train starts a new run; to continue this one, use {typed('train.resume', cfg.run)}"
  if cfg.task in TASKS_OF_A_RUN:
    yield from _export_problems(cfg)
  if cfg.task == "chat" and (cfg.prompt is not None or cfg.prompt_file is not None or cfg.sample.merged):
    yield "task=chat: reads messages from the terminal; remove prompt=, prompt_file= and sample.merged="
  if cfg.task == "verify":
    yield from _verify_problems(cfg)
  if cfg.task == "generate":
    if cfg.prompt is not None and cfg.prompt_file is not None:
      yield "prompt, prompt_file: both are given; remove one"
    if cfg.prompt == "":
      yield "prompt: is empty; give a text to continue, such as 'prompt=\"Once upon a time\"'"


def _size_problems(cfg: Config) -> Iterator[str]:
  for name, value in (("cache_limit", cfg.cache_limit), ("clean.min_size", cfg.clean.min_size)):
    if value is not None and SIZE.fullmatch(str(value)) is None:
      yield f"{name}={shown(value)}: must be a number of bytes, or a size such as 100MB or 20GB"


def _advise_problems(cfg: Config) -> Iterator[str]:
  if cfg.run is not None:
    yield f"run={cfg.run}: task=advise comes before training and takes no run; remove it"
  for name in ("parameters", "rank_pattern", "alpha_pattern", "init_from"):
    value = getattr(cfg.lora, name)
    if value is not None:
      yield f"lora.{name}={shown(value)}: task=advise predicts one rank for all targets; remove it"


def _export_problems(cfg: Config) -> Iterator[str]:
  if cfg.run is None:
    yield f"run=null: task={cfg.task} needs a run to work on; add run=outputs/DAY/TIME-NAME"
    return
  if cfg.task == "merge" and cfg.format in BASE_FORMATS:
    yield f"format={cfg.format}: task=merge writes the merged model; use task=export format={cfg.format}"
  if cfg.export.rank is not None and cfg.format not in ADAPTER_FORMATS:
    yield f"export.rank={cfg.export.rank}: converts an adapter; use format={', '.join(ADAPTER_FORMATS)}"
  if cfg.push is not None and not HUB_NAME.fullmatch(cfg.push):
    yield f"push={shown(cfg.push)}: must be a repository on the Hugging Face Hub, as OWNER/NAME"
  out = export_directory(cfg)
  if lies_in_run_files(out, Path(cfg.run)):
    yield f"out={out}: is inside the run's own files; choose another directory, or omit it for {cfg.run}/export"


def _verify_problems(cfg: Config) -> Iterator[str]:
  verify = cfg.verify
  if verify.adapter is None:
    yield "verify.adapter=null: task=verify needs an exported adapter; add verify.adapter=RUN/export/peft"
  for backend, name in (("url", "url"), ("file", "file")):
    if verify.backend == backend and getattr(verify, name) is None:
      yield f"verify.{name}=null: verify.backend={backend} needs it"
  if verify.url is not None and not verify.url.startswith(("http://", "https://")):
    yield f"verify.url={shown(verify.url)}: must begin with http:// or https://"


def lies_in_run_files(out: Path, run: Path) -> bool:
  """Whether the output directory `out` is the run directory or inside one that the run wrote."""
  return out == run or any(out.is_relative_to(run / name) for name in ("adapter", "checkpoints", ".hydra"))


def _name_problems(cfg: Config) -> Iterator[str]:
  name = cfg.name
  if not name or name in (".", "..") or name.startswith("-") or not name.isprintable() or re.search(r"[/\\]", name):
    yield f"name={shown(name)}: must be a plain file name: letters, digits, - and _, no slash"
  elif len(name.encode()) > MOST_NAME_BYTES:
    yield f"name={shown(name)}: must be at most {MOST_NAME_BYTES} bytes long"
  if not cfg.cache:
    yield "cache: must be a directory, such as ~/.cache/lora_exp"


def _credential_problems(cfg: Config) -> Iterator[str]:
  for path, value in _leaves(asdict(cfg)):
    if isinstance(value, str):
      yield from credential_problem(path, value)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted path, value) of every value in nested dicts and lists."""
  if isinstance(node, dict | list):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
      yield from _leaves(value, f"{path}.{key}" if path else str(key))
  else:
    yield path, node


def _distributed_problems(cfg: Config) -> Iterator[str]:
  coordinator, count, number = cfg.distributed.coordinator, cfg.distributed.processes, cfg.distributed.process
  if coordinator is None:
    for name, value in (("processes", count), ("process", number)):
      if value is not None:
        yield f"distributed.{name}={value}: needs distributed.coordinator=HOST:PORT, or distributed.coordinator=auto"
    return
  if cfg.task != "train":
    yield f"distributed.coordinator={shown(coordinator)}: only task=train runs in several processes; remove it"
  if coordinator != "auto" and not ADDRESS.fullmatch(coordinator):
    yield f"distributed.coordinator={shown(coordinator)}: must be HOST:PORT of process 0, or auto"
  elif coordinator != "auto" and not 1 <= int(coordinator.rpartition(":")[2]) <= MOST_PORT:
    yield f"distributed.coordinator={shown(coordinator)}: the port must be from 1 to {MOST_PORT}"
  if count is not None and number is not None and number >= count:
    yield f"distributed.process={number}: must be below distributed.processes={count}, because it counts from 0"


def _model_problems(cfg: Config) -> Iterator[str]:
  model = cfg.model
  if model.base == "weights" and not model.weights:
    yield "model.weights=null: model.base=weights needs a directory, a file, or a hub id"
  if model.tokenizer == "from_weights" and not model.weights:
    yield (f"model.tokenizer={model.tokenizer}: the weights include the tokenizer; set model.weights, or choose "
           f"{', '.join(TOKENIZERS[:3])}")
  if model.base == "pretrain":
    steps, warmup = model.pretrain.steps, model.pretrain.warmup
    if cfg.pretrain_data is None:
      yield "pretrain_data=null: model.base=pretrain trains on it; add data@pretrain_data=stdlib_code"
    if warmup > steps:
      yield f"model.pretrain.warmup={warmup}: must be at most model.pretrain.steps={steps}"


def _mlp_problems(cfg: Config) -> Iterator[str]:
  if cfg.model.family == "mlp" and cfg.task in ("generate", "chat"):
    yield f"task={cfg.task}: model.family=mlp generates no text; use task=evaluate"


def _optim_problems(cfg: Config) -> Iterator[str]:
  optim, train = cfg.optim, cfg.train
  if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
    yield f"optim.betas={optim.betas}: must be two numbers, each 0 or more and below 1"
  if optim.accumulate >= 1 and train.batch_size % optim.accumulate:
    yield f"optim.accumulate={optim.accumulate}: must divide train.batch_size={train.batch_size}"


def _train_problems(cfg: Config) -> Iterator[str]:
  steps, epochs = cfg.train.steps, cfg.train.epochs
  if steps is None and epochs is None:
    yield "train.steps=null: give train.steps or train.epochs"
  elif steps is not None and epochs is not None:
    yield f"train.epochs={epochs:g}: train.steps={steps} is set too; add train.steps=null, or train.epochs=null"


def _sample_problems(cfg: Config) -> Iterator[str]:
  if not all(cfg.sample.prompts):
    yield "sample.prompts: must not contain an empty prompt; use sample=none for no samples"
  if not all(cfg.sample.stop):
    yield "sample.stop: must not contain an empty string; use sample.stop=[] for none"


def _expectation_problems(cfg: Config) -> Iterator[str]:
  names = (*EXPECTATIONS, *METRICS)
  for name in cfg.expectations or {}:
    if name not in names:
      yield f"expectations.{name}: choose {', '.join(names)}{did_you_mean(name, names)}"
