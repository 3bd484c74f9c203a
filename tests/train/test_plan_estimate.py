"""The estimate of a plan against hand counts, the traced program, and the memory that XLA reports."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from packs import small
from runs import environment

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import ArchConfig, Config
from lora_exp.train.compiled_step import solo_flops
from lora_exp.train.costs.collectives import collectives_of
from lora_exp.train.costs.device_kinds import KINDS, kind_of_jax
from lora_exp.train.costs.memory import workload_of
from lora_exp.train.costs.plan_advice import advice
from lora_exp.train.costs.plan_estimate import Hardware, largest_batch, make_estimate
from lora_exp.train.costs.step_flops import step_flops
from lora_exp.train.costs.step_memory import step_memory
from lora_exp.train.costs.workload import VOCABULARY, make_workload
from lora_exp.train.plan import make_plan

LLAMA = {"model__family": "llama", "model__arch": ArchConfig(kv_heads=2, head_dim=8), "model__dropout": 0.0}
CASES = {
  "minigpt": {},
  "llama": LLAMA,
  "gpt2": {"model__family": "gpt2", "model__arch": ArchConfig(activation="gelu_tanh")},
  "factored": {"lora__compute": "factored"},
  "one block": {"lora__layers": [1]},
  "full": {"lora__method": "full"},
  "dora": {"lora__method": "dora", "lora__targets": "qv", "lora__rank": 2},
  "a norm and biases": {"lora__train_modules": ["layer_norm2"], "lora__bias": "lora_only"},
  "a budget": {"lora__parameters": 2000.0},
}


def config(**settings) -> Config:
  return small(data__seq_len=16, train__batch_size=8, **settings)


def card(memory: float, kind: str = "h100") -> Hardware:
  return Hardware(KINDS[kind], int(memory), "gpu")


@pytest.mark.parametrize("case", CASES)
def test_a_workload_from_settings_is_that_of_the_plan(case):
  cfg = config(**CASES[case])
  plan = make_plan(cfg)
  stated, planned = make_workload(cfg, plan.layout.mesh.size), workload_of(plan)
  assert (dict(stated.shapes), list(stated.table), sorted(stated.full)) == (
    dict(sorted(planned.shapes.items(), key=lambda item: list(stated.shapes).index(item[0]))),
    list(planned.table),
    sorted(planned.full),
  )
  assert (stated.cfg, dict(stated.rules.sizes)) == (plan.cfg, dict(plan.layout.mesh.shape))
  assert stated.trained_parameters == plan.parameters()["trainable"]
  assert step_memory(stated, "cpu") == step_memory(planned, "cpu")


@pytest.mark.parametrize("case", ["minigpt", "llama", "gpt2", "factored", "full"])
def test_its_flops_are_those_of_the_traced_step(case):
  plan = make_plan(config(**CASES[case]))
  assert step_flops(workload_of(plan)).total == pytest.approx(solo_flops(plan), rel=0.005)


def test_remat_is_counted_as_traced():
  plan = make_plan(config(model__remat=True, **LLAMA))
  found = step_flops(workload_of(plan))
  assert found.recomputed > 0 and found.total == pytest.approx(solo_flops(plan), rel=0.02)


def test_the_vocabularies_are_those_of_the_tokenizers():
  from lora_exp.data.tokenization import TOKENIZERS, get_tokenizer

  assert {name: get_tokenizer(name).vocab_size for name in TOKENIZERS} == VOCABULARY


def test_bytes_by_kind_add_up_and_follow_from_the_counts():
  work = make_workload(config(), 1)
  memory = step_memory(work, "gpu")
  parts = asdict(memory)
  assert sum(parts.values()) == memory.total and memory.state + memory.work + memory.base + memory.batch == memory.total
  assert memory.base == 4 * work.base_parameters and memory.adapters == 4 * work.trained_parameters
  assert (memory.optimizer, memory.gradients) == (2 * memory.adapters, 2 * memory.adapters)
  assert memory.batch == 5 * 4 * 8 * 16
  quantised = step_memory(work.with_settings(lora={"quant": "nf4"}), "gpu")
  kernels = sum(row.fan_in * row.fan_out for row in work.table)
  assert memory.base - quantised.base == pytest.approx(kernels * (4 - 0.5 - 4 / 64), abs=2)


@pytest.mark.parametrize(("model", "vocabulary", "length", "rows", "measured"), [
  ("smollm2_135m", 49152, 512, 16, 4.86e9),
  ("llama3_2_1b", 128256, 1024, 4, 8.62e9),
])  # fmt: skip
def test_the_memory_that_an_h100_needed(model, vocabulary, length, rows, measured):
  """The README's measurements by tests/bench/gpu.py."""
  typed = [f"model={model}", f"data.seq_len={length}", f"train.batch_size={rows}", "model.base=random",
           "model.dtype=bfloat16", "model.param_dtype=bfloat16", "model.tokenizer=bytes",
           f"model.vocab_size={vocabulary}", "lora.rank=8", "lora.targets=all_linear"]  # fmt: skip
  work = make_workload(check_command_line(typed).jobs[0], 1)
  assert step_memory(work, "gpu").total == pytest.approx(measured, rel=0.1)


def test_a_mesh_splits_what_its_rules_split():
  cfg = config(**LLAMA)
  one = make_workload(cfg, 1)
  sharded = make_workload(replace(cfg, mesh=replace(cfg.mesh, data=1, fsdp=8)), 8)
  split = make_workload(replace(cfg, mesh=replace(cfg.mesh, data=1, tensor=2)), 2)
  whole = step_memory(one, "gpu")
  assert step_memory(sharded, "gpu").base < whole.base / 7 and step_memory(sharded, "gpu").gathered > 0
  assert step_memory(split, "gpu").base < whole.base and step_memory(split, "gpu").gathered == 0
  assert step_memory(split, "gpu").activations < whole.activations
  assert 8 * step_memory(sharded, "gpu").activations == pytest.approx(whole.activations, rel=1e-3)
  assert not collectives_of(one)
  [gathers, gradients] = collectives_of(sharded)
  own = {path: sharded.rules.local_size(path, shape) for path, shape in sharded.shapes.items()}
  divided = sum(4 * size for path, size in _sizes(sharded).items() if own[path] < size)
  assert (gathers.name, gathers.axis, gathers.bytes) == ("all-gather", "fsdp", divided * 7 // 8)
  assert (gradients.name, gradients.bytes) == ("all-reduce", int(2 * 7 / 8 * 4 * one.trained_parameters))
  [features] = collectives_of(split)
  # Forward: o_proj and down_proj of both blocks, and the embedding. Backward: all inputs but that of the first q, k, v.
  assert (features.count, features.bytes) == (4 + 4 + 2, (4 + 4 + 2) * 8 * 16 * 32 * 4)


def _sizes(work) -> dict[str, int]:
  return {path: work.rules.local_size(path, shape, gathered=True) for path, shape in work.shapes.items()}


def test_the_largest_batch_and_pack_are_the_last_that_fit():
  work = make_workload(config(), 1)
  need = make_estimate(work, card(1e12)).memory.total
  estimate = make_estimate(work, card(3 * need))
  batch, pack = largest_batch(estimate), estimate.largest_pack

  def total(rows: int) -> int:
    return step_memory(work.with_settings(train={"batch_size": rows}), "gpu").total

  assert total(batch) <= 3 * need < total(batch + 1)
  assert need + (pack - 1) * estimate.further <= 3 * need < need + pack * estimate.further
  none = make_estimate(work, card(work.base_parameters))
  assert (largest_batch(none), none.largest_pack, none.fits) == (0, 0, False)
  assert largest_batch(make_estimate(work, card(1e18))) == 2**20  # the limit of train.batch_size


def test_advice_fits_as_it_says_and_combines_changes_if_needed():
  work = make_workload(small(data__seq_len=16, train__batch_size=64, model__width=64, model__ff=256, **LLAMA), 8)
  need = make_estimate(work, card(1e12)).memory.total
  single = advice(make_estimate(work, card(0.8 * need)))
  assert single and all(change.fits and change.memory <= 0.8 * need for change in single)
  assert any(change.overrides == "model.remat=true" for change in single)
  [together] = advice(make_estimate(work, card(0.3 * need)))
  assert together.fits and len(together.overrides.split()) > 2
  [hopeless] = advice(make_estimate(work, card(1000)))
  assert not hopeless.fits and "it still does not fit" in hopeless.reason


def test_devices_are_found_by_the_names_that_jax_gives():
  names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100_40gb", "NVIDIA A100-SXM4-80GB": "a100",
           "TPU v4": "tpu_v4", "TPU v5 lite": "tpu_v5e", "NVIDIA L40S": "l40s", "NVIDIA L4": "l4",
           "NVIDIA GeForce RTX 4090": "rtx4090", "TPU v6 lite": "tpu_v6e", "NVIDIA H200": "h200"}  # fmt: skip
  assert {name: kind_of_jax(name) for name in names} == {name: KINDS[key] for name, key in names.items()}
  assert kind_of_jax("Radeon") is None


COMPARE = """
import json
from packs import small
from lora_exp.config import ArchConfig
from lora_exp.train.compiled_step import compile_abstract
from lora_exp.train.costs.memory import estimate
from lora_exp.train.plan import make_plan

SIZES = dict(data__seq_len=64, train__batch_size=16, model__width=64, model__ff=64, model__max_len=64, model__heads=4)
LLAMA = dict(model__family="llama", model__arch=ArchConfig(kv_heads=2, head_dim=16), model__dropout=0.0, model__ff=128)
ratios = []
for mesh, model in (({}, {}), ({}, LLAMA), ({"mesh__data": 4, "mesh__tensor": 2}, {})):
  plan = make_plan(small(**(SIZES | mesh | model)))
  ratios.append(estimate(plan).solo / compile_abstract(plan, 1).peak_memory_bytes)
print(json.dumps(ratios))
"""


@pytest.mark.slow
def test_the_memory_is_within_a_tenth_of_xla():
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  code = "import sys; sys.path.insert(0, 'tests/helpers')\n" + COMPARE
  done = subprocess.run([sys.executable, "-c", code], env=environment() | flags, text=True, capture_output=True,
                        timeout=600)  # fmt: skip
  assert done.returncode == 0, done.stderr
  ratios = json.loads(done.stdout.splitlines()[-1])
  assert len(ratios) == 3 and all(0.9 < ratio < 1.1 for ratio in ratios), ratios
