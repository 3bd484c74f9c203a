"""Reads a `Study` from the settings of `hydra/sweeper=study` and the overrides on the command line.

    hydra:
      sweeper:
        params:
          lora.rank: choice(1,2,4,8)
          optim.lr: tag(log, interval(1e-4, 1e-2))
          seed: 0,1,2               not searched; each trial is repeated for each seed
        extra: [{lora: frozen}]     additional runs, trained before the first trial

Overrides have priority. A list, a range or an interval replaces that of the file; a single value fixes the parameter.
"""

import importlib.util
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.eval_checks import missing_metric
from lora_exp.config.metrics import METRICS
from lora_exp.config.schema import Config
from lora_exp.sweep.packs.grid_jobs import (
  SEEDS,
  Parse,
  expanded,
  override_key,
  override_texts,
  point_jobs,
  single_override,
)
from lora_exp.sweep.study.study_space import Choice, Interval, Study

SAMPLERS = ("tpe", "nsga2", "random")
COSTS = ("trainable", "forgetting")  # objectives that are not metrics; both are minimised
EXAMPLES = "as lora.rank=choice(1,2,4,8) or 'optim.lr=tag(log, interval(1e-4, 1e-2))'"
INTEGERS = {"n_trials": (1, 10**6), "width": (1, 10**6), "seed": (0, 2**32 - 1)}  # smallest and largest value


def read_study(node: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> Study:
  """The study of the node hydra.sweeper and the overrides `typed`. Raises InputError that lists every problem."""
  problems = list(_setting_problems(node))
  overrides = {override_key(o): o for o in [*parse(override_texts(node.get("params") or {})), *typed]}
  space: dict[str, Choice | Interval] = {}
  seeds: list[list[str]] = []
  searched = False
  for key, override in overrides.items():
    if not override.is_sweep_override():
      continue
    try:
      if key in SEEDS:
        seeds.append(list(dict.fromkeys(expanded(override))))
      else:
        searched = True
        space[override.get_key_element()] = _parameter(override)  # with ++, which some settings need in a job
    except InputError as error:
      problems += error.problems
  if not searched:
    problems.append(f"hydra.sweeper.params: no parameter is searched; give a list or an interval, {EXAMPLES}")
  if problems:
    raise InputError(problems)
  return Study(
    fixed=[single_override(o) for o in overrides.values() if not o.is_sweep_override()],
    space=space,
    repeats=[list(runs) for runs in itertools.product(*seeds)],
    extra=_extra_jobs(node, typed, parse),
    n_trials=node["n_trials"], width=node["width"], sampler=node["sampler"], seed=node["seed"], keep=node["keep"],
    objectives=list(node["objectives"]), rungs=list(node["rungs"] or []),
  )  # fmt: skip


def _extra_jobs(node: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> list[list[str]]:
  """The additional runs, with the seeds and single values of the command line."""
  lists = {override_key(o): o for o in typed if o.is_sweep_override() and override_key(o) in SEEDS}
  single = {override_key(o): single_override(o) for o in typed if not o.is_sweep_override()}
  jobs = []
  for point in node.get("extra") or []:
    jobs += point_jobs(point, lists, single, parse)
  return jobs


def _parameter(override: Override) -> Choice | Interval:
  """The values that an override searches. Raises InputError for an empty range or interval."""
  value, text = override.value(), override.input_line
  if isinstance(value, IntervalSweep):
    low, high, step = value.start, value.end, None
  elif isinstance(value, RangeSweep):
    numbers = list(value.range())
    if not numbers:
      raise InputError(f"{text}: the range is empty; its end is excluded")
    low, high, step = min(numbers), max(numbers), abs(value.step)
  else:
    return Choice(tuple(dict.fromkeys(text.partition("=")[2] for text in expanded(override))))
  assert low is not None and high is not None
  log = "log" in value.tags
  if not (math.isfinite(low) and math.isfinite(high) and low <= high):
    raise InputError(f"{text}: an interval needs finite bounds, the smaller one first")
  if log and low <= 0:
    raise InputError(f"{text}: a logarithmic interval needs positive bounds")
  if log and step not in (None, 1):
    raise InputError(f"{text}: tag(log, …) requires an interval, or a range with step 1")
  return Interval(low, high, None if log else step, log)


def _setting_problems(node: Mapping[str, Any]) -> Iterator[str]:
  if importlib.util.find_spec("optuna") is None:
    yield "hydra/sweeper=study: needs optuna: pip install 'lora_exp[study]'"
  for key, (smallest, largest) in INTEGERS.items():
    if not _is_integer(node.get(key)) or node[key] < smallest:
      yield f"{_typed(node, key)}: give an integer of at least {smallest}"
    elif node[key] > largest:
      yield f"{_typed(node, key)}: give at most {largest:,}"
  if node.get("sampler") not in SAMPLERS:
    yield (f"{_typed(node, 'sampler')}: choose {', '.join(SAMPLERS)}"
           f"{did_you_mean(str(node.get('sampler')), SAMPLERS)}")
  objectives = _as_list(node.get("objectives"))
  known = (*METRICS, *COSTS)
  if not objectives or len(set(objectives)) < len(objectives):
    yield f"{_typed(node, 'objectives')}: give a list of one or several of {', '.join(known)}, each once"
  for name in objectives:
    if name not in known:
      yield (f"{_typed(node, 'objectives')}: no such objective {name}; choose {', '.join(known)}"
             f"{did_you_mean(str(name), known)}")
  if node.get("rungs") is not None:
    yield from _pruning_problems(node, objectives)


def _pruning_problems(node: Mapping[str, Any], objectives: list[Any]) -> Iterator[str]:
  rungs, keep = _as_list(node["rungs"]), node.get("keep")
  if not rungs or not all(_is_integer(step) and step > 0 for step in rungs) or sorted(set(rungs)) != rungs:
    yield f"{_typed(node, 'rungs')}: give a list of increasing steps such as [8,16], or null"
  if not isinstance(keep, int | float) or not 0 < keep < 1:
    yield f"{_typed(node, 'keep')}: give the fraction of trials that continues, between 0 and 1"
  if node.get("width") == 1:
    yield (f"{_typed(node, 'rungs')}: prunes the worst of a batch, and with hydra.sweeper.width=1 there is nothing to "
           "compare")
  if len(objectives) != 1 or objectives[0] not in METRICS:
    yield (f"{_typed(node, 'rungs')}: prunes by one metric, which would remove settings with few parameters from the "
           "Pareto front; set it to null, or use one objective: hydra.sweeper.objectives=[loss]")


def _typed(node: Mapping[str, Any], key: str) -> str:
  """A setting of the sweeper in the syntax of the command line."""
  return f"hydra.sweeper.{key}={node.get(key)}"


def _as_list(value: Any) -> list[Any]:
  """`value` if it is a list, else an empty one."""
  return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def study_run_problems(study: Study, cfg: Config) -> Iterator[str]:
  """Problems of a study with the config `cfg` of one of its runs."""
  for name in study.objectives:
    if (problem := missing_metric(cfg, name)) is not None:
      yield f"hydra.sweeper.objectives=[{name}]: {problem}"
  if "forgetting" in study.objectives and cfg.retain is None:
    yield "hydra.sweeper.objectives: forgetting is the loss on a second source, and data@retain=none has none"
  steps, every = cfg.train.steps, cfg.train.eval_every
  if cfg.task != "train":
    yield f"task={cfg.task}: a study needs task=train; remove it"
  elif study.rungs and steps is None:
    yield "hydra.sweeper.rungs: are steps, and train.epochs sets no number of them; give train.steps"
  elif study.rungs and steps is not None and study.rungs[-1] >= steps:
    yield f"hydra.sweeper.rungs: {study.rungs[-1]} is not before the last step, train.steps={steps}"
  for rung in study.rungs:
    if every == 0 or rung % every:
      yield (f"hydra.sweeper.rungs: {rung} is not a multiple of train.eval_every={every}, so there is no held-out loss "
             "to decide by")
