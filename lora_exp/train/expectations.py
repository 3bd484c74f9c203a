"""What an experiment promises, measured when its run has ended: `promises: {name: number}` in its config.

    promises:
      trainable: 294912     # exactly
      loss_falls: 0.1       # held-out loss, by at least this share of the base's

Each name is a measurement of the finished run below and says how it compares with the number. The table
"promised / found / holds" closes the run, summary.json keeps it, and a promise that is broken makes the exit code 1.
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
from lora_exp.runtime import console
from lora_exp.train.hyperparameters import Hyperparameters
from lora_exp.train.job import Job
from lora_exp.train.program import Tree, assemble
from lora_exp.train.step import outputs
from lora_exp.train.trained_weights import frozen_digest


@dataclass(frozen=True)
class End:
  """A finished run: what it trained, what it wrote."""

  job: Job
  trials: Hyperparameters  # of the run, as a pack of one
  params: Tree  # exported, (1, …)
  summary: Mapping[str, Any]  # summary.json
  dir: Path
  batch: Mapping[str, jax.Array]  # held-out rows


@dataclass(frozen=True)
class Expectation:
  """A measurement of the end of a run, and how it compares with the number promised: =, ≥ or ≤."""

  words: str
  relation: str
  measure: Callable[[End], float | None]  # None: the run has no such thing, and the promise is broken

  def holds(self, found: float | None, promised: float) -> bool:
    if found is None:
      return False
    return {"=": found == promised, "≥": found >= promised, "≤": found <= promised}[self.relation]


def _fall(before: float | None, after: float | None) -> float | None:
  return None if before is None or after is None else 1 - after / before


Context = Callable[[nnx.Module], AbstractContextManager]


def outputs_of(end: End, params: Tree, around: Context = nullcontext) -> jax.Array:
  """What the model with the adapter `params` says, `around` it: of a batch of examples, or of one row of text."""
  rows = slice(1) if "tokens" in end.batch else slice(None)
  one = lambda tree: jax.tree.map(lambda x: x[0], tree)

  @jax.jit
  def call(params, trial, frozen, batch):
    model = assemble(end.job.program, params, trial, frozen, None)
    with around(model):
      return outputs(model, {name: x[rows] for name, x in batch.items()})

  return call(one(params), one(end.trials), end.job.frozen, dict(end.batch))


def merged_differs(end: End) -> float:
  """The largest difference that merging makes to an output."""
  trained = end.params
  return float(jnp.abs(outputs_of(end, trained, lora.merged) - outputs_of(end, trained)).max())


def off_differs(end: End) -> float:
  """The largest difference between an output with the adapters off and one with their scale at 0."""
  off = replace(end, trials=end.trials._replace(scale=jnp.zeros_like(end.trials.scale)))
  return float(jnp.abs(outputs_of(end, end.params, lora.disabled) - outputs_of(off, end.params)).max())


EXPECTATIONS: dict[str, Expectation] = {
  "trainable": Expectation("trainable parameters", "=", lambda end: end.summary["parameters"]["trainable"]),
  "total": Expectation("parameters, the adapter's too", "=", lambda end: end.summary["parameters"]["total"]),
  "adapter_bytes": Expectation(
    "bytes of the adapter's file", "≤", lambda end: (end.dir / "adapter/adapter_model.safetensors").stat().st_size
  ),
  "loss_falls": Expectation(
    "fall of the held-out loss, as a share of the base's", "≥",
    lambda end: _fall(end.summary["losses"]["base"], end.summary["losses"]["best"]),
  ),
  "behind_best": Expectation(
    "steps from the exported state to the best", "=",
    lambda end: abs(end.summary["losses"]["exported_step"] - end.summary["losses"]["best_step"]),
  ),
  "base_changed": Expectation(
    "whether a byte of the base changed", "=",
    lambda end: float(frozen_digest(end.job) != end.summary["fingerprints"]["base"]),
  ),
  "off_differs": Expectation("outputs with the adapter off, from the base's", "≤", off_differs),
  "merged_differs": Expectation("outputs with A·B merged, from those unmerged", "≤", merged_differs),
}


def expectation(name: str) -> Expectation:
  """The expectation of this name: one of `EXPECTATIONS`, or a metric of the last evaluation."""
  if name in EXPECTATIONS:
    return EXPECTATIONS[name]
  metric = METRICS[name]

  def measure(end: End) -> float | None:
    """The metric in summary.json; None if it does not apply."""
    return end.summary["scores"]["final"].get(name)

  return Expectation(f"held-out {metric.label} at the end", "≥" if metric.higher_is_better else "≤", measure)


def check(promises: Mapping[str, float], end: End) -> dict[str, dict]:
  """`{name: {promised, found, holds}}` of every promise of a config."""
  found = {name: expectation(name).measure(end) for name in promises}
  return {
    name: {"promised": promised, "found": found[name], "holds": expectation(name).holds(found[name], promised)}
    for name, promised in promises.items()
  }


def show(results: Mapping[str, dict]) -> None:
  """The table of promises. Raises LoraExpError if one is broken."""
  number = lambda x: "-" if x is None else f"{x:,.0f}" if float(x).is_integer() else f"{x:.4g}"
  rows = [
    (f"{name}: {expectation(name).words}", f"{expectation(name).relation} {number(r['promised'])}", number(r["found"]),
     "yes" if r["holds"] else "NO")
    for name, r in results.items()
  ]
  console.show_table("Promises", ("promise", "promised", "found", "holds"), rows)
  broken = [name for name, result in results.items() if not result["holds"]]
  if broken:
    raise LoraExpError(f"{len(broken)} of {len(results)} promises of this run do not hold: {', '.join(broken)}")
