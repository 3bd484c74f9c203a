"""`task=evaluate`: computes metrics of a run and its base, or only of a base, on held-out data of any source."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lora_exp.config import Config, DataConfig
from lora_exp.config.eval_checks import requested_metrics
from lora_exp.config.metrics import METRICS
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.data.sources import is_numeric
from lora_exp.lora import methods
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.run_files import EVALUATIONS
from lora_exp.train.answers.requested_metrics import Evaluator, make_evaluators, metric_data
from lora_exp.train.compute.program import Weights
from lora_exp.train.eval_harness.harness import run_harness
from lora_exp.train.evaluating.evaluation import Evaluation, byte_lengths, held_out, put_eval_batches
from lora_exp.train.evaluating.held_out_documents import held_out_documents
from lora_exp.train.evaluating.metric_errors import difference, standard_error
from lora_exp.train.loaded_run import LoadedRun, open_run

Change = tuple[float, float | None]  # difference from the base, and its standard error


def run(cfg: Config) -> None:
  """Prints every metric of `run` and its base on `data` and `retain`; without a run, those of the base.

  The metrics of a run are appended to its evaluations.jsonl, one line for each split and model.
  """
  start_jax(cfg.cache)
  loaded = open_run(cfg, with_base=True)
  method = methods.of(loaded.plan.cfg.lora if cfg.lora.init_from else cfg.lora)
  is_run = (cfg.run is not None and not method.trains_nothing) or cfg.lora.init_from is not None
  if cfg.harness is not None:
    run_harness(cfg, loaded, is_run)
    return
  lines: list[dict] = []
  facts: dict[str, str] = {}
  for split, source, max_tokens in (
    ("held-out", cfg.data, cfg.train.eval_tokens),
    ("retain", cfg.retain, cfg.train.retain_tokens),
  ):
    if source is None:
      continue
    base, *trained = evaluations(loaded, source, max_tokens, is_run)
    lines.append(_line(split, "base", base))
    for name, evaluation in (("base", base), *((method.name, evaluation) for evaluation in trained)):
      _warn_not_finite(split, name, evaluation)
    for evaluation in trained:
      changes = {name: difference(METRICS[name], evaluation, base) for name in evaluation.metrics}
      lines.append(_line(split, method.name, evaluation) | _against_base(changes))
      facts |= _facts(split, source, changes)
  _show_table(lines, "examples" if is_numeric(cfg.data) else "tokens")
  if facts:
    console.show_facts("Trained against base", facts)
  if cfg.run is not None:
    _keep(Path(cfg.run) / EVALUATIONS, cfg, lines)


def evaluations(
  loaded: LoadedRun, source: DataConfig, max_tokens: int | None, with_trained: bool
) -> Iterator[Evaluation]:
  """Evaluates the base on about `max_tokens` held-out tokens of `source`, then the trained model."""
  plan, job = loaded.plan, loaded.job
  ways = plan.layout.batch_ways
  rows = make_rows(source, plan.tokenizer, plan.cfg.cache)
  for warning in rows.warnings:
    console.show_warning(warning)
  batch_size = -(-plan.cfg.train.batch_size // ways) * ways  # a run can be evaluated on another mesh
  batches = list(eval_batches(rows, batch_size, max_tokens))
  evaluators: tuple[Evaluator, ...] = ()
  document_sums, evaluate = None, job.evaluate
  if source is plan.cfg.data and requested_metrics(plan.cfg):
    documents = held_out_documents(plan, rows, batches, None)
    data = metric_data(plan.cfg, plan.tokenizer, rows, documents, batch_size)
    evaluators = make_evaluators(plan.cfg, job, plan.tokenizer, data, documents, batch_size)
    document_sums, evaluate = documents.sum, partial(job.evaluate, segments=documents.segments)
  put = plan.layout.put_batch if source.teacher is None else job.put
  models: list[Weights] = [loaded.base()]
  if with_trained:
    models.append((loaded.params, job.trials, loaded.frozen))
  for params, trials, frozen in models:
    placed = put_eval_batches(batches, put, byte_lengths(source, plan.tokenizer))
    results = held_out(evaluate, params, trials, frozen, placed, document_sums)
    for evaluator in evaluators:
      results = evaluator(params, trials, frozen, results, strict=True)
    yield results[0]


def _warn_not_finite(split: str, model: str, evaluation: Evaluation) -> None:
  """Prints a warning if the loss is not finite, because the table does not show such a loss."""
  loss = evaluation.metrics["loss"]
  if not math.isfinite(loss):
    console.show_warning(f"the {split} loss of the model {model!r} is {loss}: its weights, or its activations in "
                         "model.dtype, are not finite")


def _line(split: str, model: str, evaluation: Evaluation) -> dict:
  """The line of evaluations.jsonl: all declared metrics, null if not applicable, and their standard errors."""
  values = {name: _finite(evaluation.metrics.get(name)) for name in METRICS}
  errors = {name: _finite(standard_error(METRICS[name], evaluation)) for name in evaluation.metrics}
  return {"split": split, "model": model, **values, "tokens": int(evaluation.sums["count"]), "standard_errors": errors}


def _against_base(changes: Mapping[str, Change]) -> dict:
  """The differences from the base by metric. Those of the loss are also under the keys of version 0.1.0."""
  above, error = changes["loss"]
  table = {
    name: {"difference": _finite(change), "standard_error": _finite(error)} for name, (change, error) in changes.items()
  }
  return {"above_base": above, "standard_error": error, "against_base": table}


def _finite(value: float | None) -> float | None:
  """`value`, or None if it is NaN or infinite."""
  return value if value is not None and math.isfinite(value) else None


def _facts(split: str, source: DataConfig, changes: Mapping[str, Change]) -> dict[str, str]:
  """A phrase for each metric: the difference between the trained model and the base."""
  facts = {}
  for name, (change, error) in changes.items():
    metric = METRICS[name]
    unit = f"{metric.unit} " if metric.unit and not is_numeric(source) else ""
    margin = "" if error is None else f" ± {error:.2g}"
    side = "above" if change > 0 else "below"
    key = "forgetting" if (split, name) == ("retain", "loss") else f"{split} {metric.label}"
    facts[key] = f"{abs(change):.4f}{margin} {unit}{side} the base" if change else f"equal to the base{margin}"
  return facts


def _show_table(lines: list[dict], unit: str) -> None:
  """A row for each metric of each split, and a column for each model."""
  models = list(dict.fromkeys(line["model"] for line in lines))
  rows = []
  for split in dict.fromkeys(line["split"] for line in lines):
    by_model = {line["model"]: line for line in lines if line["split"] == split}
    for name in (*METRICS, "tokens"):
      values = [by_model[model].get(name) if model in by_model else None for model in models]
      if any(value is not None for value in values):
        rows.append((split, unit if name == "tokens" else METRICS[name].label, *values))
  console.show_table("Evaluation", ("data", "metric", *models), rows)


def _keep(path: Path, cfg: Config, lines: list[dict]) -> None:
  """Appends the lines with the settings of their data to the run's file; warns if it is read-only."""
  about = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
  settings = {"held-out": asdict(cfg)["data"], "retain": asdict(cfg)["retain"]}
  try:
    with path.open("a", encoding="utf-8") as file:
      for line in lines:
        data = {k: v for k, v in settings[line["split"]].items() if v is not None}
        file.write(json.dumps({**about, **line, "data": data}, ensure_ascii=False) + "\n")
    console.show(f"Written: {display_path(path)}. Compare runs: task=compare. Generate text: task=generate.")
  except PermissionError:
    console.show_warning(f"{path} cannot be written; the results are only shown here")
