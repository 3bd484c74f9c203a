"""Problems of a config that depend on files, directories and installed packages, one line each."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_exp.cli.tasks import task_names
from lora_exp.config.allowed_values import choice_problem
from lora_exp.config.checks import TASKS_OF_A_RUN, export_directory, lies_in_run_files
from lora_exp.config.conversion import shown
from lora_exp.config.errors import did_you_mean
from lora_exp.config.schema import TOKENIZERS, Config, EvalConfig, ModelConfig
from lora_exp.models.weights import locate
from lora_exp.runtime.files import file_problem, path_problem
from lora_exp.runtime.run_directory import is_sweep, run_directory_problem
from lora_exp.runtime.run_files import ADAPTER

METRIC_PACKAGES = {"rouge_l": "rouge_score", "chrf": "sacrebleu"}  # metric -> module that computes it


def file_problems(cfg: Config) -> Iterator[str]:
  """Problems of paths that do not exist or have the wrong contents, of existing outputs, and of missing packages."""
  yield from _task_problems(cfg)
  yield from _model_problems(cfg.model)
  yield from _eval_problems(cfg.eval)
  yield from _harness_problems(cfg)
  if cfg.train.resume:
    yield from _run_problems("train.resume", cfg.train.resume)
  if cfg.lora.init_from is not None:
    yield from _adapter_problems(cfg.lora.init_from)


def _harness_problems(cfg: Config) -> Iterator[str]:
  if cfg.harness is not None and importlib.util.find_spec("lm_eval") is None:
    yield f"harness={shown(cfg.harness)}: needs lm-eval: pip install 'lora_exp[harness]'"
  if cfg.harness_tasks is not None and not Path(cfg.harness_tasks).is_dir():
    yield f"harness_tasks={cfg.harness_tasks}: no such directory; give one with task files of lm-eval"


def _eval_problems(settings: EvalConfig) -> Iterator[str]:
  for name in settings.metrics:
    if name in METRIC_PACKAGES and importlib.util.find_spec(METRIC_PACKAGES[name]) is None:
      yield f"eval.metrics: {name} needs the package {METRIC_PACKAGES[name]}: pip install 'lora_exp[metrics]'"
  if settings.metric_file is not None:
    problem = file_problem("eval.metric_file", settings.metric_file) or _metric_file_problem(settings.metric_file)
    if problem is not None:
      yield problem


def _metric_file_problem(file: str) -> str | None:
  """Why the file in eval.metric_file cannot define a metric: Python cannot parse it, or it names no `score`.

  The file is not run.
  """
  try:
    module = ast.parse(Path(file).read_bytes())
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: null bytes; others: too deep
    line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
    return f"eval.metric_file={file}{line}: {error.msg if isinstance(error, SyntaxError) else str(error) or 'too deep'}"
  names = {getattr(node, key, None) for node in ast.walk(module) for key in ("name", "asname", "id")}
  if names.isdisjoint(("score", "*", "globals")):  # the last two may define it
    return f"eval.metric_file={file}: has no function score(prediction, reference, prompt) that returns a number"
  return None


def _run_problems(setting: str, directory: str) -> Iterator[str]:
  problem = run_directory_problem(setting, directory)
  if problem is not None:
    yield problem


def _task_problems(cfg: Config) -> Iterator[str]:
  if cfg.task not in task_names():
    yield choice_problem("task", cfg.task, task_names())
  if cfg.task in (*TASKS_OF_A_RUN, "generate", "chat", "evaluate") and cfg.run is not None:
    yield from _run_problems("run", cfg.run)
  if cfg.task in TASKS_OF_A_RUN and cfg.run is not None:
    yield from _output_problems(cfg, Path(cfg.run))
  if cfg.task == "dashboard":
    yield from _dashboard_problems(cfg)
  if cfg.task == "inspect" and cfg.run is not None:
    yield from _inspect_problems(cfg, cfg.run)
  if cfg.task == "report" and cfg.run is not None and not Path(cfg.run).is_dir():
    yield f"run={cfg.run}: no such directory; give the directory of a sweep, such as outputs/sweeps/DAY/TIME-NAME"
  if cfg.task in ("list", "clean") and cfg.run is not None and not Path(cfg.run).is_dir():
    yield f"run={cfg.run}: no such directory; give one with runs, such as outputs"
  if cfg.task == "compare":
    yield from _comparison_problems(cfg)
  if cfg.task == "generate" and cfg.prompt_file is not None:
    yield from _prompt_problems(cfg.prompt_file)


def _prompt_problems(given: Any) -> Iterator[str]:
  """Why `prompt_file` is no file or directory, and no list of them."""
  paths = given if isinstance(given, list) else [given]
  if not paths or not all(isinstance(path, str) for path in paths):
    yield f"prompt_file={shown(given)}: give a file, a directory, or a list of files"
    return
  yield from filter(None, (path_problem("prompt_file", path) for path in paths))


def _comparison_problems(cfg: Config) -> Iterator[str]:
  directories = cfg.runs if isinstance(cfg.runs, list) else [cfg.runs] if cfg.runs else []
  if not directories:
    yield "runs=null: task=compare needs runs or sweeps; add runs='[outputs/DAY/TIME-NAME,outputs/DAY/TIME-NAME]'"
  for directory in directories:
    if not Path(str(directory)).is_dir():
      yield f"runs: {directory}: no such directory; task=list shows the runs"


def _output_problems(cfg: Config, run: Path) -> Iterator[str]:
  """Existing files at the path of the exported files."""
  out = export_directory(cfg)
  if lies_in_run_files(out, run):
    return  # `config.check` reports it
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    obstacle = "is not empty" if out.is_dir() else "is a file"
    given = f"out={out}" if cfg.out else f"{out}, where task={cfg.task} writes without out=DIR,"
    yield f"{given}{':' if cfg.out else ''} {obstacle}, and nothing is overwritten; {_other_place(cfg)}"


def _other_place(cfg: Config) -> str:
  """What to do where the directory of the exported files is taken."""
  return "choose another directory, or move this one" if cfg.out else "give out=DIR with another one, or move it away"


def _dashboard_problems(cfg: Config) -> Iterator[str]:
  if cfg.run is not None and not Path(cfg.run).is_dir():
    yield f"run={cfg.run}: no such directory; give that of a sweep or a run, such as outputs/sweeps/DAY/TIME-NAME"
  if importlib.util.find_spec("wandb_workspaces") is None:
    yield "task=dashboard: needs wandb-workspaces: pip install 'lora_exp[dashboard]'"


def _inspect_problems(cfg: Config, run: str) -> Iterator[str]:
  if is_sweep(run):
    return
  problem = run_directory_problem("run", run)
  if problem is not None:
    yield problem


def _model_problems(model: ModelConfig) -> Iterator[str]:
  problem = locate.weights_problem(model.weights) if model.base == "weights" and model.weights else None
  if problem is not None:
    yield problem
  name = model.tokenizer
  if name not in TOKENIZERS and not Path(name).exists():
    yield (f"model.tokenizer={shown(name)}: choose {', '.join(TOKENIZERS)}, or give a file or directory with a "
           f"tokenizer{did_you_mean(name, TOKENIZERS)}")


def _adapter_problems(directory: str) -> Iterator[str]:
  """Why the directory in lora.init_from is not an adapter."""
  folder = Path(directory)
  if folder.is_file():
    yield f"lora.init_from={directory}: is a file; give its directory, which must also contain adapter_config.json"
  elif not folder.is_dir():
    is_id = locate.HUB_ID.fullmatch(directory)
    hub = f"; download it from the hub with: hf download {directory} --local-dir DIR" if is_id else ""
    yield f"lora.init_from={directory}: no such directory; give one with adapter_config.json{hub}"
  elif not (folder / "adapter_config.json").is_file():
    yield f"lora.init_from={directory}: contains no adapter_config.json{_adapter_hint(folder)}"


def _adapter_hint(folder: Path) -> str:
  """A hint at what the directory `folder`, which is not an adapter, contains instead."""
  if (folder / ADAPTER).is_dir():
    return " (a run's adapter is in RUN/adapter)"
  if (folder / "config.json").is_file():
    return "; it contains a complete model, which model.weights reads"
  inner = sorted(file.parent.name for file in folder.glob("*/adapter_config.json"))
  if not inner:
    return ""
  return f"; the subdirectory {inner[0]} contains one" if len(inner) == 1 else (
    f"; the subdirectories {', '.join(inner[:3])} contain one")
