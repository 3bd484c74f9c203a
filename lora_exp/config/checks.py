"""What is allowed. `check` looks at every setting and returns every problem, a line each; it imports no jax."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.config.credentials import credential_problem
from lora_exp.config.data_checks import data_problems, file_problems, sources
from lora_exp.config.errors import did_you_mean
from lora_exp.config.lora_checks import lora_problems
from lora_exp.config.metrics import METRICS
from lora_exp.config.schema import ADAPTERS, EXAMPLES, INITS, TOKENIZERS, Config, ModelConfig

CHOICES = {
  "task": ("train", "generate", "evaluate", "inspect", "merge", "export", "plan", "report", "dashboard"),
  "format": ("peft", "merged", "base"),
  "model.family": ("minigpt", "gpt2", "llama", "mlp", "hf"),
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.base": ("random", "pretrain", "weights"),
  "data.source": ("stdlib", "text", "jsonl", "chatterbot", "arithmetic", "sentences", *EXAMPLES),
  "data.view": (None, "code", "docs"),
  "data.packing": ("pack", "pad"),
  "data.chat": ("auto", "none"),
  "lora.method": (*ADAPTERS, "bitfit", "full", "frozen"),
  "lora.scaling": ("standard", "rslora"),
  "lora.init": tuple(INITS),
  "lora.bias": ("none", "all", "lora_only"),
  "lora.quant": (None, "int8", "int4", "nf4"),
  "lora.compute": ("auto", "factored", "merged"),
  "optim.name": ("adamw", "adam", "sgd"),
  "optim.schedule": ("constant", "linear", "cosine"),
  "train.export": ("best", "last"),
  "sample.chat": ("auto", "always", "none"),
  "report.metric": METRICS,
  "merge.dtype": (None, "float32", "bfloat16", "float16"),
  "logger.name": ("wandb", "none"),
  "logger.mode": ("auto", "online", "offline"),
}
MLP_CHOICES = {"activation": ("relu", "gelu", "gelu_tanh", "silu"), "init": ("lecun_normal", "xavier_uniform")}

ON_A_RUN = ("merge", "export")  # tasks that need a run
NO_UPDATE = {"frozen": "nothing", "bitfit": "biases alone"}  # what methods trained that change no kernel

# Of a finished run; besides these, every metric.
EXPECTATIONS = ("trainable", "total", "adapter_bytes", "loss_falls", "behind_best", "base_changed", "merged_differs",
                "off_differs")

Allowed = tuple[Callable[[Any], bool], str]
COUNT: Allowed = (lambda x: x >= 1, "at least 1")
NOT_NEGATIVE: Allowed = (lambda x: x >= 0, "0 or more")
POSITIVE: Allowed = (lambda x: x > 0, "above 0")
SHARE: Allowed = (lambda x: 0 < x < 1, "between 0 and 1, both excluded")
RATE: Allowed = (lambda x: 0 <= x < 1, "0 or more and below 1")
SEED: Allowed = (lambda x: 0 <= x < 2**32, "between 0 and 4294967295")
SIZE: Allowed = (lambda x: x >= 1 or x == -1, "at least 1, or -1 for the devices that are left")

NUMBERS: dict[str, Allowed] = {
  "model.layers": COUNT, "model.width": COUNT, "model.heads": COUNT, "model.ff": COUNT, "model.max_len": COUNT,
  "model.vocab_size": COUNT, "model.dropout": RATE, "model.seed": SEED, "model.adapter_lr": POSITIVE,
  "model.pretrain.steps": COUNT, "model.pretrain.batch_size": COUNT, "model.pretrain.lr": POSITIVE,
  "model.pretrain.warmup": NOT_NEGATIVE, "model.pretrain.weight_decay": NOT_NEGATIVE, "model.pretrain.clip": POSITIVE,
  "model.pretrain.dropout": RATE,
  "data.eval_fraction": SHARE, "data.seq_len": COUNT, "data.limit": COUNT, "data.repeat": COUNT,
  "data.seed": SEED, "data.steps": COUNT,
  "data.teacher.rank": COUNT, "data.teacher.strength": POSITIVE, "data.teacher.seed": SEED,
  "mesh.data": SIZE, "mesh.fsdp": SIZE, "mesh.tensor": SIZE, "mesh.trial": SIZE,
  "lora.rank": COUNT, "lora.parameters": POSITIVE, "lora.alpha": POSITIVE, "lora.dropout": RATE,
  "lora.init_std": POSITIVE, "lora.lr_ratio": POSITIVE, "lora.lr_scale": POSITIVE, "lora.budget": POSITIVE,
  "optim.lr": POSITIVE, "optim.warmup": NOT_NEGATIVE, "optim.weight_decay": NOT_NEGATIVE, "optim.eps": POSITIVE,
  "optim.momentum": RATE, "optim.clip": POSITIVE, "optim.accumulate": COUNT,
  "train.steps": COUNT, "train.epochs": POSITIVE, "train.batch_size": COUNT, "train.log_every": COUNT,
  "train.eval_every": NOT_NEGATIVE, "train.eval_tokens": COUNT, "train.retain_tokens": COUNT,
  "train.save_every": NOT_NEGATIVE, "train.seed": SEED,
  "train.stop_at": COUNT,
  "sample.every": NOT_NEGATIVE, "sample.max_tokens": COUNT, "sample.temperature": NOT_NEGATIVE, "sample.top_k": COUNT,
  "sample.top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"), "sample.seed": SEED,
  "merge.bound": NOT_NEGATIVE,
}


def check(cfg: Config) -> list[str]:
  """Every problem of `cfg`, each one line 'path=value: what is allowed'; empty if there is none. Reads no data."""
  parts = (_choices, _numbers, _task, _name, _credentials, _model, _mlp, data_problems, lora_problems, _optim, _train,
           _sample, _promises)
  return [problem for part in parts for problem in part(cfg)]


def export_directory(cfg: Config) -> Path:
  """Where task=merge and task=export write."""
  return Path(cfg.out) if cfg.out else Path(str(cfg.run)) / "export" / ("merged" if cfg.task == "merge" else cfg.format)


def run_directory_problem(path: str, directory: str) -> str | None:
  """Why `directory` holds no run, or None."""
  if not Path(directory).is_dir():
    return f"{path}={directory}: no such directory; give a run directory, as outputs/DAY/TIME-NAME"
  if not (Path(directory) / "config.yaml").is_file():
    return f"{path}={directory}: holds no run (no config.yaml); give a run directory, as outputs/DAY/TIME-NAME"
  return None


def is_sweep(directory: str) -> bool:
  """Whether `directory` holds runs, and is none itself."""
  path = Path(directory)
  return not (path / "config.yaml").is_file() and any(path.glob("*/config.yaml"))


def _value(cfg: Config, path: str) -> Any:
  node: Any = cfg
  for name in path.split("."):
    node = getattr(node, name, None)  # a group may be null
  return node


def _places(cfg: Config, path: str) -> list[str]:
  """The settings that the rule for `path` holds for: rules of `data` hold for each source."""
  group, _, key = path.partition(".")
  return [f"{source}.{key}" for source in sources(cfg)] if group == "data" else [path]


def _choices(cfg: Config) -> Iterator[str]:
  for rule, choices in CHOICES.items():
    for path in _places(cfg, rule):
      value = _value(cfg, path)
      if value not in choices:
        words = [c for c in choices if c is not None]
        names = ", ".join(shown(c) for c in choices)
        yield f"{path}={shown(value)}: choose {names}{did_you_mean(str(value), words)}"


def _numbers(cfg: Config) -> Iterator[str]:
  for rule, (allowed, words) in NUMBERS.items():
    for path in _places(cfg, rule):
      value = _value(cfg, path)
      if value is not None and not allowed(value):
        yield f"{path}={shown(value)}: must be {words}"


def _task(cfg: Config) -> Iterator[str]:
  used = cfg.run if cfg.task in (*ON_A_RUN, "generate", "evaluate") else None
  if used is not None and (problem := run_directory_problem("run", used)):
    yield problem
  if cfg.task == "dashboard":
    yield from _dashboard(cfg)
  if cfg.task == "report" and cfg.run is not None and not Path(cfg.run).is_dir():
    yield f"run={cfg.run}: no such directory; give the directory of a sweep, as outputs/sweeps/DAY/TIME-NAME"
  if cfg.task == "train" and cfg.run:
    yield f"run={cfg.run}: task=train begins a new run; to go on with this one use train.resume={cfg.run}"
  if cfg.task in ON_A_RUN:
    yield from _export(cfg)
  if cfg.task == "inspect":
    yield from _inspect(cfg)
  if cfg.task == "generate":
    if cfg.prompt is not None and cfg.prompt_file is not None:
      yield "prompt, prompt_file: both are given; remove one"
    if cfg.prompt_file is not None:
      yield from file_problems("prompt_file", cfg.prompt_file)
    if cfg.prompt == "":
      yield "prompt: is empty; give a text to go on from, as 'prompt=\"Once upon a time\"'"


def _dashboard(cfg: Config) -> Iterator[str]:
  if cfg.run is None:
    yield "run=null: task=dashboard needs a sweep or a run; add run=outputs/sweeps/DAY/TIME-NAME"
  elif not Path(cfg.run).is_dir():
    yield f"run={cfg.run}: no such directory; give that of a sweep or a run, as outputs/sweeps/DAY/TIME-NAME"
  if importlib.util.find_spec("wandb_workspaces") is None:
    yield "task=dashboard: needs wandb-workspaces: pip install 'lora_exp[dashboard]'"


def _inspect(cfg: Config) -> Iterator[str]:
  if cfg.run is None:
    yield "run=null: task=inspect looks into a run, or every run of a sweep; add run=outputs/DAY/TIME-NAME"
  elif is_sweep(cfg.run):
    return
  elif problem := run_directory_problem("run", cfg.run):
    yield problem
  elif cfg.lora.method in NO_UPDATE:
    yield f"run={cfg.run}: lora={cfg.lora.method} trained {NO_UPDATE[cfg.lora.method]}; there is no ΔW to look into"


def _export(cfg: Config) -> Iterator[str]:
  if cfg.run is None:
    yield f"run=null: task={cfg.task} needs the run that it works on; add run=outputs/DAY/TIME-NAME"
    return
  method = cfg.lora.method
  if cfg.task == "merge" and cfg.format == "base":
    yield "format=base: task=merge writes the merged model; use task=export format=base"
  elif method == "frozen" and cfg.format != "base":
    yield f"run={cfg.run}: lora=frozen trained nothing; the base alone: task=export format=base"
  elif method == "full" and cfg.task == "export" and cfg.format == "peft":
    yield "format=peft: lora=full trains the model itself, and no adapter; use format=merged"
  out = export_directory(cfg)
  for name in ("adapter", "checkpoints", ".hydra"):
    if out.is_relative_to(Path(cfg.run) / name) or out == Path(cfg.run):
      yield f"out={out}: would lie in the run's own files; choose another directory, or none: {cfg.run}/export"
      return
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    what = "is not empty" if out.is_dir() else "is a file"
    yield f"out={out}: {what}, and nothing is overwritten; choose another directory, or move this one"


def _name(cfg: Config) -> Iterator[str]:
  name = cfg.name
  if not name or name in (".", "..") or name.startswith("-") or not name.isprintable() or re.search(r"[/\\]", name):
    yield f"name={shown(name)}: must be a plain file name: letters, digits, - and _, no slash"
  elif len(name.encode()) > 100:
    yield f"name={shown(name)}: must be at most 100 bytes long"
  if not cfg.cache:
    yield "cache: must be a directory, as ~/.cache/lora_exp"


def _credentials(cfg: Config) -> Iterator[str]:
  for path, value in _leaves(asdict(cfg)):
    if isinstance(value, str):
      yield from credential_problem(path, value)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(node, dict | list):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
      yield from _leaves(value, f"{path}.{key}" if path else str(key))
  else:
    yield path, node


def _model(cfg: Config) -> Iterator[str]:
  model = cfg.model
  if model.family in ("minigpt", "gpt2") and model.heads >= 1 and model.width % model.heads:
    yield f"model.heads={model.heads}: must divide model.width={model.width}"
  if model.base == "weights":
    if not model.weights:
      yield "model.weights=null: model.base=weights needs a directory, a file, or a hub id"
    elif problem := _weights_problem(model.weights):
      yield problem
  yield from _tokenizer(model)
  if model.base == "pretrain":
    steps, warmup = model.pretrain.steps, model.pretrain.warmup
    if cfg.pretrain_data is None:
      yield "pretrain_data=null: model.base=pretrain learns from it; add data@pretrain_data=stdlib_code"
    if warmup > steps:
      yield f"model.pretrain.warmup={warmup}: must be at most model.pretrain.steps={steps}"


def _weights_problem(weights: str) -> str | None:
  from lora_exp.models.weights import locate

  return locate.problem(weights)


def _tokenizer(model: ModelConfig) -> Iterator[str]:
  name = model.tokenizer
  if name == "from_weights":
    if not model.weights:
      yield f"model.tokenizer={name}: the weights bring it; set model.weights, or choose {', '.join(TOKENIZERS[:3])}"
  elif name not in TOKENIZERS and not Path(name).exists():
    yield (f"model.tokenizer={shown(name)}: choose {', '.join(TOKENIZERS)}, or give a file or directory with a "
           f"tokenizer{did_you_mean(name, TOKENIZERS)}")


def _mlp(cfg: Config) -> Iterator[str]:
  mlp = cfg.model.mlp
  if cfg.model.family != "mlp":
    return
  if cfg.task == "generate":
    yield "task=generate: model.family=mlp writes no text; see task=evaluate"
  if mlp is None:
    yield "model.mlp=null: model.family=mlp needs its sizes; add model=mlp"
    return
  for key, value in (("inputs", mlp.inputs), ("outputs", mlp.outputs)):
    if value < 1:
      yield f"model.mlp.{key}={value}: must be at least 1"
  if not all(width >= 1 for width in mlp.hidden):
    yield f"model.mlp.hidden={mlp.hidden}: each must be at least 1"
  for key, choices in MLP_CHOICES.items():
    if (value := getattr(mlp, key)) not in choices:
      yield f"model.mlp.{key}={value}: choose {', '.join(choices)}{did_you_mean(value, choices)}"


def _optim(cfg: Config) -> Iterator[str]:
  optim, train = cfg.optim, cfg.train
  if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
    yield f"optim.betas={optim.betas}: must be two numbers, each 0 or more and below 1"
  if optim.accumulate >= 1 and train.batch_size % optim.accumulate:
    yield f"optim.accumulate={optim.accumulate}: must divide train.batch_size={train.batch_size}"


def _train(cfg: Config) -> Iterator[str]:
  steps, epochs = cfg.train.steps, cfg.train.epochs
  if steps is None and epochs is None:
    yield "train.steps=null: give train.steps or train.epochs"
  elif steps is not None and epochs is not None:
    yield f"train.epochs={epochs:g}: train.steps={steps} is set too; add train.steps=null, or train.epochs=null"
  if cfg.train.resume and (problem := run_directory_problem("train.resume", cfg.train.resume)):
    yield problem


def _sample(cfg: Config) -> Iterator[str]:
  if not all(cfg.sample.prompts):
    yield "sample.prompts: must not hold an empty prompt; for no samples sample=none"
  if not all(cfg.sample.stop):
    yield "sample.stop: must not hold an empty text; for none sample.stop=[]"


def _promises(cfg: Config) -> Iterator[str]:
  names = (*EXPECTATIONS, *METRICS)
  for name in cfg.promises or {}:
    if name not in names:
      yield f"promises.{name}: choose {', '.join(names)}{did_you_mean(name, names)}"
