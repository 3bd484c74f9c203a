"""Checks of `eval`, and of the settings that name a metric which only `eval.metrics` adds."""

from collections.abc import Iterator

from lora_exp.config.conversion import shown
from lora_exp.config.errors import did_you_mean
from lora_exp.config.metrics import METRICS, REQUESTED
from lora_exp.config.schema import Config

CUSTOM = "custom"  # the metric that `eval.metric_file` adds


def requested_metrics(cfg: Config) -> list[str]:
  """The metrics that a run computes in addition to those that cost nothing."""
  return [*dict.fromkeys(cfg.eval.metrics), *([CUSTOM] if cfg.eval.metric_file else [])]


def eval_problems(cfg: Config) -> Iterator[str]:
  """Yields problems of `eval`, of `report.metric` and of `expectations`, one line each."""
  choices = [name for name in REQUESTED if name != CUSTOM]
  for name in cfg.eval.metrics:
    if name == CUSTOM:
      yield "eval.metrics: custom is not named here; set eval.metric_file=FILE.py on the command line instead"
    elif name in METRICS and name not in REQUESTED:
      yield f"eval.metrics: {name} is always computed where it applies; remove it"
    elif name not in choices:
      yield f"eval.metrics: no such metric {name}; choose {', '.join(choices)}{did_you_mean(name, choices)}"
  if cfg.eval.metric_file and not cfg.eval.metric_file.endswith(".py"):
    yield f"eval.metric_file={cfg.eval.metric_file}: must be a Python file, whose name ends in .py"
  if requested_metrics(cfg) and cfg.model.family == "mlp":
    yield "eval.metrics: model.family=mlp generates no text; set eval.metrics=[]"
  every = cfg.train.eval_every
  if cfg.eval.every > 0 and (every == 0 or cfg.eval.every % every):
    yield f"eval.every={cfg.eval.every}: must be a multiple of train.eval_every={every}"
  if cfg.task == "train":
    yield from _missing_metrics(cfg)
  yield from _harness_problems(cfg)


def harness_tasks(cfg: Config) -> list[str]:
  """The tasks of lm-eval that task=evaluate runs."""
  tasks = cfg.harness if isinstance(cfg.harness, list) else [cfg.harness]
  return [name for name in tasks if name]


def _harness_problems(cfg: Config) -> Iterator[str]:
  if cfg.harness is None:
    return
  if not harness_tasks(cfg) or not all(isinstance(name, str) for name in harness_tasks(cfg)):
    yield f"harness={shown(cfg.harness)}: give one or several tasks of lm-eval, such as harness=hellaswag,gsm8k"
  elif cfg.task != "evaluate":
    yield f"harness={shown(cfg.harness)}: is for task=evaluate; add it, or remove harness"
  elif cfg.model.family == "mlp":
    yield f"harness={shown(cfg.harness)}: model.family=mlp has no text"


def _missing_metrics(cfg: Config) -> Iterator[str]:
  """Settings that need a metric which the run would not compute."""
  names = [("report.metric", cfg.report.metric), *(("expectations", name) for name in cfg.expectations or {})]
  for setting, name in names:
    problem = missing_metric(cfg, str(name))
    if problem is not None:
      yield f"{setting}{'=' if setting == 'report.metric' else '.'}{name}: {problem}"


def missing_metric(cfg: Config, name: str) -> str | None:
  """What to do if the metric `name` is computed only on request, and the run would not compute it; else None."""
  if name not in REQUESTED or name in requested_metrics(cfg):
    return None
  advice = "eval.metric_file=FILE.py" if name == CUSTOM else f"eval.metrics=[{','.join([*cfg.eval.metrics, name])}]"
  return f"runs compute it only on request; add {advice}"
