"""`task=evaluate harness=TASK,…`: tasks of EleutherAI's lm-evaluation-harness with a run and its base as models."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.config import Config, InputError, did_you_mean
from lora_exp.config.eval_checks import harness_tasks
from lora_exp.lora import methods
from lora_exp.runtime import console
from lora_exp.runtime.run_files import HARNESS
from lora_exp.train.loaded_run import LoadedRun

Results = Mapping[str, Any]  # what lm-eval returns


def run_harness(cfg: Config, loaded: LoadedRun, is_run: bool) -> None:
  """Evaluates the base, and with `is_run` the trained model, on `cfg.harness`; appends the results to harness.jsonl.

  Raises InputError for unknown tasks, and for data that cannot be loaded.
  """
  os.environ.setdefault("TQDM_DISABLE", "1")  # bars of lm-eval's own; read when tqdm is imported
  from lora_exp.train.eval_harness.harness_model import HarnessModel  # imports lm-eval, which is optional

  models = {"base": loaded.base()}
  if is_run:
    method = methods.of(loaded.plan.cfg.lora)
    models[method.name] = (loaded.params, loaded.job.trials, loaded.frozen)
  results = {name: _evaluate(cfg, HarnessModel(loaded.plan, loaded.job, model)) for name, model in models.items()}
  lines = [line for name, result in results.items() for line in _lines(name, result)]
  _add_differences(lines, results)
  _show(lines)
  if cfg.run is not None:
    _keep(Path(cfg.run) / HARNESS, cfg, lines)


def _evaluate(cfg: Config, model: Any) -> Results:
  """lm-eval's results for one model. Raises InputError."""
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager

  names = harness_tasks(cfg)
  manager = TaskManager(include_path=cfg.harness_tasks)
  for name in names:
    if name not in manager.all_tasks:
      where = f"or {cfg.harness_tasks}" if cfg.harness_tasks else "(harness_tasks=DIR adds files)"
      raise InputError(f"harness={name}: no such task in lm-eval {where}{did_you_mean(name, manager.all_tasks)}")
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  try:
    results = simple_evaluate(
      model=model, tasks=names, task_manager=manager, limit=cfg.harness_limit, num_fewshot=cfg.harness_shots,
      bootstrap_iters=100, log_samples=True)  # fmt: skip
  except (OSError, ValueError, KeyError, RuntimeError) as error:  # datasets raises its errors as these
    reason = " ".join(str(error).split())
    raise InputError(f"harness={','.join(names)}: lm-eval failed: {type(error).__name__}: {reason}. Without a network, "
                     "give task files whose data is local with harness_tasks=DIR") from error
  assert results is not None
  return results


def _lines(model: str, results: Results) -> Iterator[dict[str, Any]]:
  """A line for each task and metric."""
  for task, values in results["results"].items():
    for key, value in values.items():
      name, _, filtered = key.partition(",")
      if filtered and not name.endswith("_stderr") and isinstance(value, int | float):
        yield {"task": task, "metric": name, "filter": filtered, "model": model, "value": _finite(value),
               "standard_error": _finite(values.get(f"{name}_stderr,{filtered}")),
               "items": results.get("n-samples", {}).get(task, {}).get("effective")}


def _add_differences(lines: Sequence[dict[str, Any]], results: Mapping[str, Results]) -> None:
  """Adds to the lines of the trained model its difference from the base, and the paired error over the items."""
  base = {(line["task"], line["metric"], line["filter"]): line for line in lines if line["model"] == "base"}
  for line in lines:
    key = line["task"], line["metric"], line["filter"]
    if line["model"] == "base" or line["value"] is None or base[key]["value"] is None:
      continue
    line["difference"] = line["value"] - base[key]["value"]
    pairs = [_item_values(results[model], *key) for model in ("base", line["model"])]
    if len(pairs[0]) == len(pairs[1]) > 1:
      gains = np.subtract(pairs[1], pairs[0])
      line["difference_error"] = float(gains.std(ddof=1) / math.sqrt(len(gains)))


def _item_values(results: Results, task: str, metric: str, filtered: str) -> list[float]:
  """The value of a metric for each item of a task; [] if it is not a mean over items."""
  samples = [sample for sample in results.get("samples", {}).get(task, []) if sample.get("filter") == filtered]
  values = [sample.get(metric) for sample in sorted(samples, key=_item_number)]
  return [float(value) for value in values if isinstance(value, int | float | np.number)]


def _item_number(sample: Mapping[str, Any]) -> int:
  return int(sample["doc_id"])


def _finite(value: Any) -> float | None:
  """`value`, or None if it is not a finite number."""
  return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _show(lines: Sequence[Mapping[str, Any]]) -> None:
  rows = []
  for line in lines:
    name = line["metric"] if line["filter"] == "none" else f"{line['metric']} ({line['filter']})"
    against = _with_error(line["difference"], line.get("difference_error"), "+") if "difference" in line else "-"
    rows.append((line["task"], name, line["model"], _with_error(line["value"], line["standard_error"]), against,
                 line["items"]))
  console.show_table("lm-eval", ("task", "metric", "model", "value", "against base", "items"), rows)


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
  if value is None:
    return "-"
  return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.2g}")


def _keep(path: Path, cfg: Config, lines: Sequence[Mapping[str, Any]]) -> None:
  """Appends the lines to the run's file; warns if it is read-only."""
  about = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "limit": cfg.harness_limit, "shots": cfg.harness_shots}
  try:
    with path.open("a", encoding="utf-8") as file:
      for line in lines:
        file.write(json.dumps({**about, **line}, ensure_ascii=False) + "\n")
  except PermissionError:
    console.show_warning(f"{path} cannot be written; the results are only shown here")
