"""A pack: trials that train as one program on one base and one stream of batches. A run is a pack of one trial."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from lora_exp.config import Config, InputError, NoCheckpointError
from lora_exp.data.rows import Rows, make_rows
from lora_exp.data.sources import data_facts
from lora_exp.runtime import console
from lora_exp.train.answers.requested_metrics import Evaluator, make_evaluators
from lora_exp.train.base import make_base
from lora_exp.train.compute.trial_padding import Table, union
from lora_exp.train.evaluating.evaluation import EvalBatch, byte_lengths, put_eval_batches
from lora_exp.train.evaluating.held_out_documents import HeldOutDocuments
from lora_exp.train.evaluating.retention import retain_limit, retained_batches
from lora_exp.train.job import Job, make_job
from lora_exp.train.pack_data import NOT_BEGUN, PackData
from lora_exp.train.plan import Plan
from lora_exp.train.plan_warnings import plan_warnings
from lora_exp.train.records import checkpoint
from lora_exp.train.records.resume_checks import adapter_digest, changed_sources
from lora_exp.train.records.training_record import TrainingRecord
from lora_exp.train.sampling.sampler import Sampler, make_sampler
from lora_exp.train.stop_signals import stop_signals
from lora_exp.train.trial import Trial, common_steps, restore_trial


@dataclass(frozen=True)
class Pack:
  """Everything that training needs: the job, the data, and the record of each trial so far.

  The trials share all settings of the program and the data; `make_job` checks those of the program.
  """

  trials: tuple[Trial, ...]
  records: tuple[TrainingRecord, ...]  # one for each trial
  table: Table  # all modules that any trial adapts, at the largest rank
  job: Job
  rows: Rows
  held_out: list[EvalBatch]
  documents: HeldOutDocuments  # of `held_out`
  evaluators: tuple[Evaluator, ...]  # of the metrics that `eval.metrics` names
  retained: list[EvalBatch]  # of `data@retain`; [] if it is not set
  sampler: Sampler
  started: float  # time.monotonic() when the run began
  solo: bool  # a single run, which shows its samples and results
  retained_data: str | None = None  # fingerprint of the rows of `data@retain`
  resumed: bool = False

  @property
  def plan(self) -> Plan:
    """The plan of the first trial, for settings that all trials share."""
    return self.trials[0].plan

  def sources_of(self, trial: Trial) -> dict[str, str | None]:
    """Fingerprints of what `trial` is trained on, for its checkpoints."""
    adapter = adapter_digest(trial.plan.saved_cfg.lora.init_from)
    return {"fingerprint": self.rows.fingerprint, "retain": self.retained_data, "init_from": adapter}


@stop_signals(at_once=NOT_BEGUN)
def make_pack(trials: Sequence[Trial], data: PackData, started: float, solo: bool) -> Pack:
  """Builds the pack of `trials` at step 0 on its `data`. Makes the base, which may require pretraining."""
  plan = trials[0].plan
  cfg, rows, retain = plan.cfg, data.rows, data.retain
  facts = data_facts(cfg.data) if solo else {}
  if facts:
    console.show_facts("Data", facts | _amounts(cfg, data))
  for warning in rows.warnings:
    console.show_warning(warning)
  for warning in retain.warnings if retain is not None else ():
    console.show_warning(f"data@retain: {warning}")
  for warning in plan_warnings([trial.plan for trial in trials], data.steps):
    console.show_warning(warning)
  limit = retain_limit(plan, data.steps)
  base, base_facts = make_base(plan)
  job = make_job(plan, base, data.steps, _fill_mesh([trial.plan for trial in trials]))
  return Pack(
    trials=tuple(trials),
    records=(TrainingRecord(job.steps, rows.fingerprint, base_facts, retain_limit=limit),) * len(trials),
    table=union([trial.plan.table for trial in trials]),
    job=job,
    rows=rows,
    held_out=list(put_eval_batches(data.held_out, job.put, byte_lengths(cfg.data, plan.tokenizer))),
    documents=data.documents,
    evaluators=make_evaluators(cfg, job, plan.tokenizer, data.metrics, data.documents, cfg.train.batch_size),
    retained=retained_batches(plan, retain, limit),
    sampler=make_sampler(job.program, cfg, plan.tokenizer),
    started=started,
    solo=solo,
    retained_data=None if retain is None else retain.fingerprint,
  )


def _amounts(cfg: Config, data: PackData) -> dict[str, object]:
  """The amounts of data and training, for the table before training."""
  rows, steps = data.rows, data.steps
  epochs = steps * cfg.train.batch_size / max(rows.train_rows, 1)
  return {"documents": f"{rows.documents:,}, of which {rows.eval_documents:,} are held out",
          "training": f"{steps} steps of {cfg.train.batch_size} rows: {epochs:.3g} epochs of {rows.train_rows:,} rows"}


def _fill_mesh(plans: list[Plan]) -> list[Plan]:
  """Repeats the last plan until the mesh axis `trial` divides their number. Results of the copies are ignored."""
  ways = plans[0].layout.mesh.shape["trial"]
  return [*plans, *[plans[-1]] * (-len(plans) % ways if len(plans) > 1 else 0)]


def restore_pack(pack: Pack) -> Pack:
  """Restores a pack from the newest checkpoint step that all its active trials have.

  Raises NoCheckpointError if there is none, and InputError if the data has changed.
  """
  if pack.solo:
    return _restored_pack(pack, None)
  # A kill between the checkpoints of two trials leaves different newest steps.
  *newer, oldest = sorted(common_steps(pack.trials), reverse=True)
  for step in newer:
    with suppress(NoCheckpointError):  # that of one trial is damaged, as a warning has said
      return _restored_pack(pack, step)
  return _restored_pack(pack, oldest)


def _restored_pack(pack: Pack, step: int | None) -> Pack:
  """`restore_pack` from the checkpoints of `step`; None for the newest one of a single run."""
  job, records = pack.job, list(pack.records)
  template = checkpoint.named_leaves(job.state)
  arrays = [_one_trial(template, n) for n in range(len(job.keys))]
  for trial in pack.trials:
    if not trial.active:
      continue  # its values are not used
    step, arrays[trial.index], meta = restore_trial(trial, job.program.method, pack.table, job.state, step)
    records[trial.index] = _restored_record(trial, meta, pack)
  first = arrays[next(trial.index for trial in pack.trials if trial.active)]
  leaves = [_join(name, first, arrays) for name in template]
  state = jax.tree.unflatten(jax.tree.structure(job.state), leaves)
  state = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), state, job.state)
  pack = replace(pack, job=replace(job, state=state), records=tuple(records), resumed=True)
  return _with_recorded_limit(pack, records[next(trial.index for trial in pack.trials if trial.active)])


def _with_recorded_limit(pack: Pack, record: TrainingRecord) -> Pack:
  """The pack with the evaluations on `data@retain` that its trials had so far."""
  plan = pack.plan
  limit = plan.cfg.train.retain_tokens if record.retain_limit == 0 else record.retain_limit
  if plan.cfg.retain is None or limit == retain_limit(plan, pack.job.steps):
    return pack
  rows = make_rows(plan.cfg.retain, plan.tokenizer, plan.cfg.cache)
  return replace(pack, retained=retained_batches(plan, rows, limit))


def _one_trial(named: dict[str, jax.Array], n: int) -> dict[str, jax.Array]:
  """The part (1, …) of trial `n`; scalars have no axis of trials."""
  return {name: x[n : n + 1] if x.ndim else x for name, x in named.items()}


def _join(name: str, first: dict[str, jax.Array], arrays: Sequence[dict[str, jax.Array]]) -> jax.Array:
  """Concatenates an array over the trials; a scalar is the same in all of them."""
  if first[name].ndim == 0:
    return first[name]
  parts = [named[name] for named in arrays]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _restored_record(trial: Trial, meta: dict, pack: Pack) -> TrainingRecord:
  """The record in a checkpoint's metadata. Raises InputError if the data or the base has changed."""
  base = pack.records[trial.index].base
  changed = changed_sources(meta["data"], pack.sources_of(trial), meta["record"].get("base", {}), base)
  if changed:
    raise InputError([f"train.resume={trial.run_dir}: {change}; start a new run" for change in changed])
  return TrainingRecord(**{**meta["record"], "steps": pack.job.steps, "base": base})
