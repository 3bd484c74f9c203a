"""A study as `hydra/sweeper=study` describes it: the space that is searched, what is to be small, when it is pruned.

    hydra:
      sweeper:
        params:
          lora.rank: choice(1,2,4,8)
          optim.lr: tag(log, interval(1e-4, 1e-2))
          train.seed: 0,1,2         not searched: a trial is repeated for each seed
        extra: [{lora: frozen}]     runs beside the trials, before the first

What is typed wins: a list, a range or an interval takes the place of the file's, and one value fixes the parameter.
Imports no optuna, so that every command line can be checked quickly.
"""

import importlib.util
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.metrics import METRICS
from lora_exp.config.schema import Config
from lora_exp.sweep.grid_jobs import Parse, one, points, texts, values

SAMPLERS = ("tpe", "nsga2", "random")
COSTS = ("trainable", "forgetting")  # objectives that are no metric; low is good
SEEDS = ("train.seed", "data.seed", "model.seed")
SEARCHED = "as lora.rank=choice(1,2,4,8) or 'optim.lr=tag(log, interval(1e-4, 1e-2))'"


@dataclass(frozen=True)
class Choice:
  """One of these overrides' values."""

  values: tuple[str, ...]


@dataclass(frozen=True)
class Span:
  """A number between two others, both included; whole if they are, and in steps if there is a `step`."""

  low: float
  high: float
  step: float | None = None
  log: bool = False  # drawn evenly in its logarithm

  @property
  def whole(self) -> bool:
    return isinstance(self.low, int)


@dataclass(frozen=True)
class Study:
  """Everything that a study is, but for the directory it lies in."""

  fixed: list[str]  # overrides of every run
  space: dict[str, Choice | Span]  # by the setting's path
  repeats: list[list[str]]  # overrides of the runs of one trial: its seeds
  extra: list[list[str]]  # overrides of each run that is none of a trial
  n_trials: int
  width: int
  sampler: str
  seed: int
  objectives: list[str]
  rungs: list[int]
  keep: float

  def job(self, params: Mapping[str, Any], repeat: int) -> list[str]:
    """The overrides of one run of a trial."""
    return [*self.fixed, *(f"{key}={value}" for key, value in params.items()), *self.repeats[repeat]]

  def examples(self) -> list[list[str]]:
    """A few jobs that have each value of the space at least once, and both ends of a span."""
    columns = {k: s.values if isinstance(s, Choice) else (str(s.low), str(s.high)) for k, s in self.space.items()}
    count = max(len(self.repeats), *map(len, columns.values()))
    at = lambda column, n: column[min(n, len(column) - 1)]
    jobs = [self.job({k: at(c, n) for k, c in columns.items()}, min(n, len(self.repeats) - 1)) for n in range(count)]
    return [*jobs, *self.extra]

  @property
  def signs(self) -> list[int]:
    """For each objective, 1 if it is minimised and -1 if it is maximised."""
    return [METRICS[name].sign if name in METRICS else 1 for name in self.objectives]

  @property
  def points(self) -> float:
    """How many there are in the space; infinite where a parameter is continuous."""
    return math.prod(map(_points, self.space.values()))


def _points(part: Choice | Span) -> float:
  if isinstance(part, Choice):
    return len(part.values)
  step = part.step or (1 if part.whole else 0)
  return round((part.high - part.low) / step) + 1 if step else math.inf


def read(node: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> Study:
  """The study of `node`, which is hydra.sweeper, and of what was typed. Raises InputError with every problem."""
  problems = list(_problems(node))
  last = {o.get_key_element(): o for o in [*parse(texts(node.get("params") or {})), *typed]}
  searched = {key: o for key, o in last.items() if o.is_sweep_override() and key not in SEEDS}
  space, seeds = {}, []
  for key, override in last.items():
    try:
      if key in searched:
        space[key] = _part(override)
      elif override.is_sweep_override():
        seeds.append(list(dict.fromkeys(values(override))))
    except InputError as error:
      problems += error.problems
  if not searched:
    problems.append(f"hydra.sweeper.params: there is nothing to search; give a list or an interval, {SEARCHED}")
  if problems:
    raise InputError(problems)
  fixed = [one(o) for o in last.values() if not o.is_sweep_override()]
  lists = {o.get_key_element(): o for o in typed if o.is_sweep_override() and o.get_key_element() in SEEDS}
  single = {o.get_key_element(): one(o) for o in typed if not o.is_sweep_override()}
  extra = [job for point in node.get("extra") or [] for job in points(point, lists, single, parse)]
  names = ("n_trials", "width", "sampler", "seed", "keep")
  return Study(fixed, space, [list(runs) for runs in itertools.product(*seeds)], extra,
               objectives=list(node["objectives"]), rungs=list(node["rungs"] or []), **{n: node[n] for n in names})


def _part(override: Override) -> Choice | Span:
  value, text = override.value(), override.input_line
  if isinstance(value, IntervalSweep):
    low, high, step = value.start, value.end, None
  elif isinstance(value, RangeSweep):
    numbers = list(value.range())
    if not numbers:
      raise InputError(f"{text}: holds no number; the end of a range is not part of it")
    low, high, step = min(numbers), max(numbers), abs(value.step)
  else:
    found = tuple(dict.fromkeys(v.partition("=")[2] for v in values(override)))
    return Choice(found)
  assert low is not None and high is not None
  log = "log" in value.tags
  if not (math.isfinite(low) and math.isfinite(high) and low <= high):
    raise InputError(f"{text}: an interval goes from a smaller number to a larger one")
  if log and low <= 0:
    raise InputError(f"{text}: a logarithm needs numbers above 0")
  if log and step not in (None, 1):
    raise InputError(f"{text}: tag(log, …) goes with an interval, or a range with step 1")
  return Span(low, high, None if log else step, log)


def _problems(node: Mapping[str, Any]) -> Iterator[str]:
  at = lambda key: f"hydra.sweeper.{key}={node.get(key)}"
  if importlib.util.find_spec("optuna") is None:
    yield "hydra/sweeper=study: needs optuna: pip install 'lora_exp[study]'"
  for key, least in {"n_trials": 1, "width": 1, "seed": 0}.items():
    if not _whole(node.get(key)) or node[key] < least:
      yield f"{at(key)}: give a whole number from {least} on"
  if node.get("sampler") not in SAMPLERS:
    yield f"{at('sampler')}: choose {', '.join(SAMPLERS)}{did_you_mean(str(node.get('sampler')), SAMPLERS)}"
  objectives = node.get("objectives")
  listed = list(objectives) if isinstance(objectives, Sequence) and not isinstance(objectives, str) else []
  known = (*METRICS, *COSTS)
  if not listed or len(set(listed)) < len(listed):
    yield f"{at('objectives')}: give a list of one or several of {', '.join(known)}, each once"
  for name in listed:
    if name not in known:
      yield f"{at('objectives')}: no such objective {name}; choose {', '.join(known)}{did_you_mean(str(name), known)}"
  yield from _rung_problems(node, at, listed)


def _rung_problems(node: Mapping[str, Any], at: Any, objectives: list[str]) -> Iterator[str]:
  rungs, keep = node.get("rungs"), node.get("keep")
  if rungs is None:
    return
  steps = list(rungs) if isinstance(rungs, Sequence) and not isinstance(rungs, str) else []
  if not steps or not all(_whole(s) and s > 0 for s in steps) or sorted(set(steps)) != steps:
    yield f"{at('rungs')}: give a list of steps that rise, as [8,16], or null"
  if not isinstance(keep, int | float) or not 0 < keep < 1:
    yield f"{at('keep')}: give the share that goes on, between 0 and 1"
  if node.get("width") == 1:
    yield f"{at('rungs')}: prunes the worst of a batch, and with hydra.sweeper.width=1 there is nothing to compare"
  if len(objectives) != 1 or objectives[0] not in METRICS:
    yield (f"{at('rungs')}: prunes by one metric, which would take the settings with few parameters from a Pareto front; "
           "leave it null, or search one metric alone, as hydra.sweeper.objectives=[loss]")


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def run_problems(study: Study, cfg: Config) -> Iterator[str]:
  """What of a study does not fit the runs that it would make."""
  if "forgetting" in study.objectives and cfg.retain is None:
    yield "hydra.sweeper.objectives: forgetting is the loss on a second source, and data@retain=none has none"
  steps, every = cfg.train.steps, cfg.train.eval_every
  if cfg.task != "train":
    yield f"task={cfg.task}: a study trains; leave it out"
  elif study.rungs and steps is None:
    yield "hydra.sweeper.rungs: are steps, and train.epochs sets no number of them; give train.steps"
  elif study.rungs and steps is not None and study.rungs[-1] >= steps:
    yield f"hydra.sweeper.rungs: {study.rungs[-1]} is not before the last step, train.steps={steps}"
  for rung in study.rungs:
    if every == 0 or rung % every:
      yield (f"hydra.sweeper.rungs: {rung} is no multiple of train.eval_every={every}, so there is no held-out loss to "
             "decide by")
