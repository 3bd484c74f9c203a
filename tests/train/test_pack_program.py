"""The programs of a pack: what is computed once for all trials, and what only for some."""

import re

import jax
import numpy as np
import pytest
from packs import bent, job_of, rows, small

import lora_exp.train.job
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compiled_step import abstract_batch, lower_step
from lora_exp.train.plan import make_plan

PRODUCT = re.compile(r"dot_general.*?batching_dims = \[.*?: \(tensor<(\S+)>, tensor<(\S+)>\)")


@pytest.mark.parametrize("settings", [{}, {"lora__targets": "all_linear"}, {"lora__dropout": 0.1}])
def test_frozen_products_take_the_rows_of_all_trials(settings, monkeypatch):
  monkeypatch.setattr(lora_exp.train.job, "mapping_of", lambda layout: "vmap")  # as on a GPU
  cfgs = [small(lora__rank=rank, train__batch_size=4, data__seq_len=16, **settings) for rank in (2, 3)]
  job = job_of(*cfgs)
  text = lower_step(job, abstract_batch(make_plan(cfgs[0]))).as_text()
  operands = {shape.rpartition("x")[0] for pair in PRODUCT.findall(text) for shape in pair}
  kernels = {path: x.shape for path, x in flatten(job.frozen).items() if path.endswith("kernel")}
  copied = {f"2x{i}x{o}" for shape in kernels.values() for i, o in (shape, shape[::-1])}
  assert operands and kernels and not operands & copied


def test_a_loop_skips_trials_that_are_not_live():
  job = job_of(*[small(lora__rank=rank) for rank in (1, 4, 8)], mapping="map")
  params, batch = bent(job.state.params), job.program.layout.put_batch(rows())
  every = jax.device_get(job.evaluate(params, job.trials, job.frozen, batch, segments=3))
  some = jax.device_get(job.evaluate(params, job.trials, job.frozen, batch, segments=3, live=np.array([1, 0, 1], bool)))
  for x, y in zip(jax.tree.leaves(every), jax.tree.leaves(some), strict=True):
    np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]])
    assert not y[1].any()
  assert every["loss"].all()


def test_all_trials_have_the_losses_of_the_base_at_step_0():
  job = job_of(*[small(lora__rank=rank, lora__targets=targets) for rank, targets in ((1, "mlp"), (8, "attention"))])
  sums = job.evaluate(job.state.params, job.trials, job.frozen, job.program.layout.put_batch(rows()))
  for x in jax.tree.leaves(sums):
    assert x[0] == x[1]
