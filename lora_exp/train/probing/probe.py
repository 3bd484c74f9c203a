"""The measurements behind `task=advise`: gradients at the base, and short runs of several rates and targets."""

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_exp.config import Config, InputError, StoppedError
from lora_exp.config.override_grammar import quoted
from lora_exp.data.pipeline import train_batches
from lora_exp.data.rows import make_rows
from lora_exp.lora.resizing import update_svd
from lora_exp.models.registry import get_family
from lora_exp.runtime.spectrum import directions
from lora_exp.train.base import make_base
from lora_exp.train.plan import Plan, make_plan, steps_of
from lora_exp.train.probing.kernel_gradients import KernelGradient, kernel_gradients
from lora_exp.train.probing.short_runs import ShortRun, ShortRunner

RATE_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # rates tried, times the configured one
RANKS = (1, 2, 4, 8, 16, 32)  # ranks to which an update of the largest rank is truncated
STEPS = 48  # maximum number of optimizer steps of a short run
BATCHES = 16  # number of batches for the gradients
EVAL_TOKENS = 8192  # maximum number of held-out tokens per evaluation
BEYOND = 2.0  # ratio of a further rate to the best, if that is the lowest or the highest tried


@dataclass(frozen=True)
class Probe:
  """The measurements. Gains are decreases of the held-out loss after `steps` steps."""

  cfg: Config  # whose numbers the short runs vary
  steps: int
  base_loss: float
  gradients: list[KernelGradient]
  rates: dict[float, float]  # learning rate -> gain, at the configured targets and rank; sorted
  targets: dict[str, float]  # targets as typed -> gain, at the configured rank and the best of `rates`
  parameters: dict[str, int]  # targets -> trainable parameters per unit of rank
  ranks: dict[int, float]  # rank -> gain of an update of rank max(RANKS), truncated to it
  directions: dict[str, float]  # module -> number of directions with 90 % of that update's energy


def measure(cfg: Config) -> Probe:
  """Takes the measurements for `cfg`; pretrains the base if it is not cached.

  Raises InputError if `cfg` adapts no module, or if no rate lowers the loss, and StoppedError on a signal.
  """
  try:
    return _measure(cfg)
  except StoppedError:
    raise StoppedError("stopped; a short run saves nothing, so start the command again") from None


def _measure(cfg: Config) -> Probe:
  plan = make_plan(cfg)
  rows = make_rows(cfg.data, plan.tokenizer, cfg.cache)
  steps = min(STEPS, steps_of(cfg, rows.train_rows))
  base, _ = make_base(plan)
  with closing(train_batches(rows, cfg.data, cfg.train.batch_size)) as batches:
    gradients = kernel_gradients(cfg, base, batches, BATCHES)
  plan = make_plan(_short(cfg, steps))
  runner = ShortRunner(plan, base, rows, steps, min(EVAL_TOKENS, cfg.train.eval_tokens or EVAL_TOKENS))
  rates = _rate_gains(plan, runner)
  best = max(rates, key=lambda rate: rates[rate])
  narrower = {name: _with_rate(other, best) for name, other in _narrower(plan)}
  wide = _wide(plan, best)
  further = [_with_rate(plan, rate) for rate in _further_rates(rates)]
  runs = runner.train([wide, *narrower.values(), *further], f"{1 + len(narrower)} targets and ranks")
  rates |= {run.plan.cfg.optim.lr: run.gain for run in runs[1 + len(narrower) :]}
  name = _targets_name(cfg)
  return Probe(
    cfg=plan.cfg,
    steps=steps,
    base_loss=float(runner.base_loss),
    gradients=gradients,
    rates=dict(sorted(rates.items())),
    targets={name: rates[best]} | {key: run.gain for key, run in zip(narrower, runs[1:], strict=False)},
    parameters={key: _parameters_per_rank(p) for key, p in ({name: plan} | narrower).items()},
    ranks=dict(zip(RANKS, map(float, runner.truncated_gains(runs[0], RANKS)), strict=True)),
    directions=dict(_used_directions(runs[0])),
  )


def _short(cfg: Config, steps: int) -> Config:
  """`cfg` with a warmup that fits a short run, and alpha as a number, so that it is the same at every rank."""
  alpha = 2.0 * cfg.lora.rank if cfg.lora.alpha is None else cfg.lora.alpha
  optim = replace(cfg.optim, warmup=min(cfg.optim.warmup, steps // 4))
  return replace(cfg, optim=optim, lora=replace(cfg.lora, alpha=alpha))


def _rate_gains(plan: Plan, runner: ShortRunner) -> dict[float, float]:
  """The gain of each rate. Raises InputError if none lowers the loss."""
  rates = [step * plan.cfg.optim.lr for step in RATE_STEPS]
  runs = runner.train([_with_rate(plan, rate) for rate in rates], f"{len(rates)} rates")
  gains = {rate: run.gain for rate, run in zip(rates, runs, strict=True)}
  if max(gains.values()) <= 0:
    raise InputError(
      f"optim.lr={plan.cfg.optim.lr:g}: none of the rates {', '.join(f'{rate:g}' for rate in rates)} lowers the "
      f"held-out loss in {runner.steps} steps; give another rate, or check the data"
    )
  return gains


def _further_rates(gains: Mapping[float, float]) -> list[float]:
  """A rate beyond the best one if that is the lowest or the highest; else []."""
  rates, values = list(gains), list(gains.values())
  if values[0] == max(values):
    return [rates[0] / BEYOND]
  return [rates[-1] * BEYOND] if values[-1] == max(values) else []


def _with_rate(plan: Plan, rate: float) -> Plan:
  return replace(plan, cfg=replace(plan.cfg, optim=replace(plan.cfg.optim, lr=rate)))


def _wide(plan: Plan, rate: float) -> Plan:
  """A trial of the largest of `RANKS` on the configured targets."""
  cfg = _with_rate(plan, rate).cfg
  return make_plan(replace(cfg, lora=replace(cfg.lora, rank=max(RANKS))))


def _narrower(plan: Plan) -> Iterator[tuple[str, Plan]]:
  """The presets that select some of the configured modules, each with its plan."""
  configured = {row.path for row in plan.table}
  seen = [configured]
  for name in get_family(plan.cfg.model.family).presets:
    try:
      other = make_plan(replace(plan.cfg, lora=replace(plan.cfg.lora, targets=name)))
    except InputError:  # lora.layers or lora.exclude leave none of its modules
      continue
    paths = {row.path for row in other.table}
    if paths < configured and paths not in seen:
      seen.append(paths)
      yield name, other


def _targets_name(cfg: Config) -> str:
  """`lora.targets` as it is typed, with quotes where they are needed."""
  value: Any = cfg.lora.targets
  patterns = [value] if isinstance(value, str) else value
  words = [word if re.fullmatch(r"[\w.*]+", word) else quoted(word) for word in patterns]
  return words[0] if isinstance(value, str) else f"[{','.join(words)}]"


def _parameters_per_rank(plan: Plan) -> int:
  return sum(row.parameters for row in plan.table) // plan.cfg.lora.rank


def _used_directions(run: ShortRun) -> Iterator[tuple[str, float]]:
  """Each module with the number of directions that hold 90 % of its update's energy."""
  adapter = run.adapter
  for row in adapter.rows:
    leaves = {name: np.asarray(x) for name, x in adapter.leaves[row.path].items()}
    _, sigma, _ = update_svd(adapter.kind, leaves, row.scale)
    yield row.path, float(np.mean(directions(sigma)))
