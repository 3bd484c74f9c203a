"""Expectations of an experiment, checked when its run has finished. A config sets them as `{name: number}`:

    expectations:
      trainable: 294912     # exactly
      loss_falls: 0.1       # the held-out loss falls by at least this fraction of the base's

A name is an entry of `EXPECTATIONS`, or a metric of the last evaluation. The run shows a table of the expected and the
measured values and stores it in summary.json. If an expectation does not hold, the exit code is 1.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp import lora
from lora_exp.config import LoraExpError
from lora_exp.config.metrics import METRICS
from lora_exp.lora.peft_files.adapter_files import WEIGHTS
from lora_exp.runtime import console
from lora_exp.runtime.run_files import ADAPTER
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Tree, assemble
from lora_exp.train.compute.step import outputs
from lora_exp.train.job import Job
from lora_exp.train.trained_weights import frozen_digest


@dataclass(frozen=True)
class FinishedRun:
  """A finished run: what it trained and what it wrote."""

  job: Job
  trials: Hyperparameters  # of the run, each (1,)
  params: Tree  # exported, (1, …)
  summary: Mapping[str, Any]  # summary.json
  directory: Path
  batch: Mapping[str, jax.Array]  # held-out rows


@dataclass(frozen=True)
class Expectation:
  """A measurement of a finished run, and its relation to the expected number: =, ≥ or ≤."""

  label: str
  relation: str
  measure: Callable[[FinishedRun], float | None]  # None if it does not apply to the run

  def holds(self, measured: float | None, expected: float) -> bool:
    """Whether `measured` has the relation to `expected`; False if the measurement does not apply."""
    if measured is None:
      return False
    return {"=": measured == expected, "≥": measured >= expected, "≤": measured <= expected}[self.relation]


Context = Callable[[nnx.Module], AbstractContextManager]


def outputs_of(run: FinishedRun, params: Tree, context: Context = nullcontext) -> jax.Array:
  """The outputs of the model with the adapter `params`, computed inside `context(model)`.

  Computed for one row of text, or for the whole batch of numeric examples.
  """
  rows = slice(1) if "tokens" in run.batch else slice(None)

  @jax.jit
  def call(params, trial, frozen, batch):
    model = assemble(run.job.program, params, trial, frozen, None)
    with context(model):
      return outputs(model, {name: x[rows] for name, x in batch.items()})

  return call(_first_trial(params), _first_trial(run.trials), run.job.frozen, dict(run.batch))


def _first_trial(tree: Any) -> Any:
  """A tree of arrays (N, …) without the leading axis of trials."""
  return jax.tree.map(lambda x: x[0], tree)


def trainable_parameters(run: FinishedRun) -> float:
  """The number of trained parameters."""
  return run.summary["parameters"]["trainable"]


def total_parameters(run: FinishedRun) -> float:
  """The number of parameters of the base and the adapter."""
  return run.summary["parameters"]["total"]


def adapter_bytes(run: FinishedRun) -> float:
  """The size of the adapter's weights file in bytes."""
  return (run.directory / ADAPTER / WEIGHTS).stat().st_size


def loss_falls(run: FinishedRun) -> float | None:
  """The reduction of the held-out loss as a fraction of the base's loss."""
  losses = run.summary["losses"]
  if losses["base"] is None or losses["best"] is None:
    return None
  return 1 - losses["best"] / losses["base"]


def steps_behind_best(run: FinishedRun) -> float:
  """The number of steps between the exported state and the best one."""
  losses = run.summary["losses"]
  return abs(losses["exported_step"] - losses["best_step"])


def base_changed(run: FinishedRun) -> float:
  """1 if any byte of the base changed during training, else 0."""
  return float(frozen_digest(run.job) != run.summary["fingerprints"]["base"])


def off_differs(run: FinishedRun) -> float:
  """The largest difference between an output with the adapters disabled and one with their scale at 0."""
  unscaled = replace(run, trials=run.trials._replace(scale=jnp.zeros_like(run.trials.scale)))
  return float(jnp.abs(outputs_of(run, run.params, lora.disabled) - outputs_of(unscaled, run.params)).max())


def merged_differs(run: FinishedRun) -> float:
  """The largest difference between an output with merged kernels and one with the adapter computed separately."""
  return float(jnp.abs(outputs_of(run, run.params, lora.merged) - outputs_of(run, run.params)).max())


EXPECTATIONS: dict[str, Expectation] = {
  "trainable": Expectation("trainable parameters", "=", trainable_parameters),
  "total": Expectation("parameters of base and adapter", "=", total_parameters),
  "adapter_bytes": Expectation("bytes of the adapter's weights file", "≤", adapter_bytes),
  "loss_falls": Expectation("relative reduction of the held-out loss", "≥", loss_falls),
  "behind_best": Expectation("steps between the exported and the best state", "=", steps_behind_best),
  "base_changed": Expectation("whether a byte of the base changed", "=", base_changed),
  "off_differs": Expectation("largest output difference, adapter disabled vs base", "≤", off_differs),
  "merged_differs": Expectation("largest output difference, merged vs unmerged", "≤", merged_differs),
}


def expectation(name: str) -> Expectation:
  """The expectation of this name: one of `EXPECTATIONS`, or a metric of the last evaluation."""
  if name in EXPECTATIONS:
    return EXPECTATIONS[name]
  metric = METRICS[name]

  def measure(run: FinishedRun) -> float | None:
    """The metric in summary.json; None if it does not apply."""
    return run.summary["scores"]["final"].get(name)

  return Expectation(f"held-out {metric.label} at the end", "≥" if metric.higher_is_better else "≤", measure)


def check(expected: Mapping[str, float], run: FinishedRun) -> dict[str, dict]:
  """Measures every expectation of a config: `{name: {expected, found, holds}}`."""
  results = {}
  for name, number in expected.items():
    measured = expectation(name).measure(run)
    holds = expectation(name).holds(measured, number)
    results[name] = {"expected": number, "found": measured, "holds": holds}
  return results


def show(results: Mapping[str, dict]) -> None:
  """Shows the results of `check` as a table. Raises LoraExpError if an expectation does not hold."""
  rows = []
  for name, result in results.items():
    entry = expectation(name)
    expected = f"{entry.relation} {_number_text(result['expected'])}"
    holds = "yes" if result["holds"] else "NO"
    rows.append((f"{name}: {entry.label}", expected, _number_text(result["found"]), holds))
  console.show_table("Expectations", ("expectation", "expected", "found", "holds"), rows)
  failed = [name for name, result in results.items() if not result["holds"]]
  if failed:
    raise LoraExpError(f"{len(failed)} of {len(results)} expectations do not hold: {', '.join(failed)}")


def _number_text(value: float | None) -> str:
  """A number with thousands separators or four significant digits; '-' for None."""
  if value is None:
    return "-"
  return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
