"""Loading of a finished run, or of a base without an adapter, for evaluation, generation and export."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_exp import lora
from lora_exp.config import Config, InputError, LoraConfig
from lora_exp.lora import methods
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.models.weights import store
from lora_exp.runtime.display_paths import typed_path
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.runtime.run_files import ADAPTER
from lora_exp.train.base import make_base
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Tree, Weights, assemble
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.costs.memory import require_memory
from lora_exp.train.job import Job, make_job
from lora_exp.train.plan import Plan, make_plan
from lora_exp.train.sampling.sampler import make_sampler


@dataclass
class LoadedRun:
  """A run as a pack of one trial. `job` holds the frozen arrays of its base."""

  plan: Plan
  job: Job
  params: Tree  # trained leaves (1, …); {} without an adapter, and with lora=full, whose weights are in `frozen`
  frozen: Tree  # all other arrays

  def single(self) -> tuple[Tree, Hyperparameters]:
    """(params, trial) without the leading axis of trials."""
    params, trial = jax.tree.map(lambda x: x[0], (self.params, self.job.trials))
    return params, trial

  def model(self) -> LanguageModel:
    """The base with its trained adapter: an NNX module that maps token ids (B, T) to logits (B, T, V)."""
    return assemble(self.job.program, *self.single(), self.frozen, None)

  def adapter(self) -> lora.Adapter:
    """The trained leaves by module path; empty for lora=full and lora=frozen, which have no adapter."""
    return take_trial(self.params, self.plan.table, self.plan.full, self.job.program.method, 0)

  def generate(self, prompts: Sequence[str]) -> list[str]:
    """Completions of `prompts`, without the prompts, with the settings in `sample` of the run's config."""
    sampler = make_sampler(self.job.program, self.plan.cfg, self.plan.tokenizer)
    return sampler(*self.single(), self.frozen, prompts)

  def base(self) -> Weights:
    """(params, trials, frozen) with which the job's program computes the base.

    The scales are 0. Parameters that are trained in full, or that the adapter's file changes, have their values in the
    base.
    """
    frozen = flatten(self.job.frozen) if self.plan.full else {}

    def untrained(key_path, x):
      path = dotted(key_path)
      module, _, name = path.rpartition(".")
      return frozen[f"{module}.{lora.FROZEN_PREFIX}{name}"][None].astype(x.dtype) if path in self.plan.full else x

    params = jax.tree_util.tree_map_with_path(untrained, self.job.state.params)
    def given(key_path, x):
      return self.job.given.get(dotted(key_path), x)

    unchanged = jax.tree_util.tree_map_with_path(given, self.job.frozen) if self.job.given else self.job.frozen
    return params, self.job.trials._replace(scale=jnp.zeros_like(self.job.trials.scale)), unchanged


def open_run(
  cfg: Config, with_base: bool = False, dtype: str | None = None, plan: Plan | None = None
) -> LoadedRun:
  """Loads the run in `cfg.run`, or the base of `cfg` if no run is set.

  `dtype` is that of activations, by default `model.dtype`. With lora=full, the trained model replaces the base, and the
  original base is loaded only if `with_base` is set. `plan`: `plan_of(cfg)`, if it is made already.
  """
  full = cfg.run is not None and methods.of(cfg.lora).trains_everything
  plan = plan or plan_of(cfg)
  require_memory(plan, trains=False)
  shardings = plan.layout.shardings(plan.base)
  trained = store.load(Path(str(cfg.run)) / store.FILE, plan.base, shardings) if full else None
  base = make_base(plan)[0] if with_base or trained is None else trained
  if dtype is not None:  # set after the base is made, because the cache key of a pretrained base includes the dtype
    plan = replace(plan, cfg=replace(plan.cfg, model=replace(plan.cfg.model, dtype=dtype)))
  job = make_job(plan, base, 0)
  return LoadedRun(plan, job, job.state.params, job.frozen if trained is None else trained)


def plan_of(cfg: Config) -> Plan:
  """The plan of the run in `cfg.run` with its adapter, or of the base without an adapter."""
  method = methods.of(cfg.lora) if cfg.run or cfg.lora.init_from else methods.get("frozen")
  directory = Path(str(cfg.run))
  if cfg.run:
    _check_finished(directory, method)
  if method.trains_everything or method.trains_nothing:
    cfg = replace(cfg, lora=LoraConfig(method="frozen"))
  elif cfg.run:
    cfg = replace(cfg, lora=replace(cfg.lora, init_from=str(directory / ADAPTER)))
  return make_plan(cfg)


def _check_finished(directory: Path, method: methods.Method) -> None:
  """Raises InputError if the run has not written its trained weights."""
  expected = store.FILE if method.trains_everything else ADAPTER
  if not method.trains_nothing and not (directory / expected).exists():
    raise InputError(
      f"run={directory}: has no {expected}, because the run did not finish; resume it with "
      f"{typed_path('train.resume', directory)}"
    )
