"""A packed trial has the FLOPs and the memory that it has alone, whatever else is in its pack."""

from pathlib import Path

import pytest
from packs import job_of, quickly, small

from lora_exp.train.compiled_step import abstract_batch, compile_step, solo_flops
from lora_exp.train.compute.trial_padding import union
from lora_exp.train.costs import trial_cost
from lora_exp.train.costs.trial_cost import TrialCost, trial_costs
from lora_exp.train.plan import make_plan
from lora_exp.train.records.training_record import TrainingRecord
from lora_exp.train.trial import Trial

SHAPE = {"data__seq_len": 16, "train__batch_size": 4}


def _costs(*settings: dict, mapping: str = "map") -> list[TrialCost]:
  """The costs of the trials with these settings, in one pack."""
  cfgs = [small(**SHAPE, **values) for values in settings]
  plans = [make_plan(cfg) for cfg in cfgs]
  trials = [Trial(n, plan, Path()) for n, plan in enumerate(plans)]
  job = job_of(*cfgs, mapping=mapping)
  with quickly():
    step = compile_step(job, abstract_batch(plans[0]))
  return trial_costs(job, union([plan.table for plan in plans]), trials, step)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_cost_of_a_packed_trial_is_its_own(mapping):
  settings = [{"lora__rank": 1}, {"lora__rank": 1, "lora__targets": "attention"}, {"lora__rank": 16}]
  packed = _costs(*settings, mapping=mapping)
  alone = [_costs(values)[0] for values in settings]
  for own, solo in zip(packed, alone, strict=True):
    assert own.flops == pytest.approx(solo.flops, rel=0.03)
    assert own.peak_memory_bytes == pytest.approx(solo.peak_memory_bytes, rel=0.15)
  assert packed[1].flops < packed[0].flops < packed[2].flops


@pytest.mark.parametrize("method", ["lora", "adalora"])  # FLOPs are linear in the rank; and are not
def test_flops_of_each_rank_are_those_of_its_own_step(method):
  cfgs = [small(**SHAPE, model__layers=1, lora__method=method, lora__rank=rank) for rank in (1, 3, 4, 8)]
  plans = [make_plan(cfg) for cfg in cfgs]
  trials = [Trial(n, plan, Path()) for n, plan in enumerate(plans)]
  flops = trial_cost._all_flops(job_of(*cfgs), plans[-1].table, trials)
  assert [flops[trial_cost._shapes(trial)] for trial in trials] == [solo_flops(plan) for plan in plans]


@pytest.mark.slow
def test_full_fine_tuning_costs_more_than_rank_one():
  [lora] = _costs({"lora__rank": 1})
  full = _costs(*[{"lora__method": "full", "train__seed": seed} for seed in (0, 1, 2)])
  assert full[0] == full[2] and full[0].flops > lora.flops and full[0].peak_memory_bytes > lora.peak_memory_bytes


def test_forgetting_is_of_the_exported_step():
  record = TrainingRecord(steps=30, data="rows")
  for step, (loss, retained) in {0: (3.0, 2.0), 10: (2.0, 2.25), 20: (2.5, 4.0)}.items():
    record = record.after_evaluation(step, {"loss": loss, "counted": 1}).after_retention(step, retained)
  assert TrainingRecord(**{**vars(record), "exported_step": 10}).forgetting == 0.25
  assert TrainingRecord(**{**vars(record), "exported_step": 20}).forgetting == 2.0
