"""The compiled step: trials in a pack train like single runs, padding stays zero, and the base does not change."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packs import Training, bent, job_of, kept, quickly, rows, small, trial

from lora_exp.config import ArchConfig
from lora_exp.models.modules.minigpt_decoder import MiniGPT
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.train.compiled_step import compile_step
from lora_exp.train.compute.optimizer import schedule
from lora_exp.train.compute.step import gradient, over_trials
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.plan import make_plan

TRIALS = (
  {"rank": 2, "alpha": 2.0, "targets": "attention", "dropout": 0.1},
  {"rank": 4, "alpha": 12.0, "targets": ["mlp", "head"], "dropout": 0.2},
  {"rank": 8, "alpha": None, "targets": ["all_linear", "embeddings"], "dropout": 0.05},
)
OPTIM = (
  {"lr": 1e-3, "weight_decay": 0.1, "clip": 0.5},
  {"lr": 3e-3, "weight_decay": 0.01, "clip": 1.0},
  {"lr": 2e-3, "weight_decay": 0.3, "clip": 2.0},
)


def config(n: int, **more):
  lora = {f"lora__{k}": v for k, v in TRIALS[n].items()}
  return small(**lora, **{f"optim__{k}": v for k, v in OPTIM[n].items()}, model__layers=1, **more)


@cache
def pack(mapping: str):
  """The three trials after 50 steps of one program: the training, its losses, its states before and after 10 steps."""
  training = Training(job_of(*map(config, range(3)), mapping=mapping))
  start = kept(training.state)
  losses = training.run(10)
  early = kept(training.state)
  return training, np.concatenate([losses, training.run(40)]), start, early


@cache
def solo(n: int):
  """Trial n alone after 10 steps: the training, its losses, and its state before them."""
  with quickly():
    training = Training(job_of(config(n)))
    start = kept(training.state)
    return training, training.run(10), start


def gradients(job, params, batch):
  """The gradient of every trial at `params`, with dropout, as one program."""

  def all_trials(params, trials, frozen, batch, key):
    one = lambda trial, params: gradient(job.program, params, trial, frozen, batch, key)[0]
    return over_trials(one, job.program.mapping, trials, params)

  with quickly():
    return jax.jit(all_trials)(params, job.trials, job.frozen, batch, job.keys[0])


@cache
def solo_gradient(n: int):
  """Trial n's gradient alone, at what `lax.map` had trained it to after 10 steps."""
  training, _, start = solo(n)
  mine = own(flatten(pack("map")[3].params), n)
  params = jax.tree_util.tree_map_with_path(lambda path, x: mine[dotted(path)][None], start.params)
  return {k: np.asarray(v[0]) for k, v in flatten(gradients(training.job, params, rows(99))).items()}


def own(leaves: dict, n: int) -> dict[str, np.ndarray]:
  """The part of the stacked `leaves` that trial n has alone."""
  wanted = flatten(solo(n)[2].params)
  return {path: np.asarray(leaves[path][n])[tuple(slice(s) for s in x.shape[1:])] for path, x in wanted.items()}


def padding(leaves: dict, n: int) -> dict[str, np.ndarray]:
  """The part of the stacked `leaves` that trial n does not have alone."""
  mine, rank = flatten(solo(n)[2].params), TRIALS[n]["rank"]
  cut = lambda path, x: x[:, rank:] if path.endswith("lora_a") else x[rank:]
  return {path: np.asarray(x[n] if path not in mine else cut(path, x[n])) for path, x in leaves.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_every_packed_gradient_equals_its_solo_run(mapping):
  found = flatten(gradients(pack(mapping)[0].job, pack("map")[3].params, rows(99)))
  for n in range(3):
    alone, packed = solo_gradient(n), own(found, n)
    largest = max(np.abs(g).max() for g in alone.values())
    for path, g in alone.items():
      assert np.abs(g).max() > 1e-4 * largest, f"trial {n}: {path} has no gradient to compare"
      assert np.abs(packed[path] - g).max() <= 1e-5 * np.abs(g).max(), f"trial {n}: {path}"
    for path, g in padding(found, n).items():
      assert not g.any(), f"trial {n}: the padding of {path} has a gradient"


@pytest.mark.parametrize("mapping", ["map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_a_trial_in_a_pack_has_the_losses_of_its_solo_run(mapping):
  losses = pack(mapping)[1]
  for n in range(3):
    np.testing.assert_allclose(losses[:10, n], solo(n)[1][:, 0], rtol=1e-5)
  assert len({float(x) for x in losses[9]}) == 3  # three trials, not one three times


@pytest.mark.slow
def test_without_dropout_a_packed_trial_is_bit_equal_to_solo():
  """In the program that a person runs, and wide enough for LLVM to add the norms' sums in several ways."""
  sizes = {"family": "llama", "layers": 3, "width": 192, "heads": 4, "ff": 512, "dropout": 0.0}
  of = {f"model__{k}": v for k, v in sizes.items()} | {"model__arch": ArchConfig(kv_heads=2, head_dim=48)}
  cfgs = [small(lora__rank=4, lora__targets=targets, optim__lr=1e-2, **of) for targets in ("qv", "all_linear")]
  packed, alone = Training(job_of(*cfgs)), Training(job_of(cfgs[0]))
  np.testing.assert_array_equal(packed.run(3)[:, 0], alone.run(3)[:, 0])
  leaves = flatten(packed.state.params)
  for path, x in flatten(alone.state.params).items():
    assert np.array_equal(leaves[path][0], x[0]), path


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_padding_is_bitwise_zero_after_fifty_steps_of_adamw(mapping):
  state = pack(mapping)[0].state
  assert int(state.step) == 50
  adam = [s for s in jax.tree.leaves(state.opt, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")]
  assert len(adam) == 1
  for name, tree in {"params": state.params, "mu": adam[0].mu, "nu": adam[0].nu}.items():
    leaves = flatten(tree)
    for n in range(3):
      for path, x in padding(leaves, n).items():
        assert not any(x.tobytes()), f"{name} of trial {n}: the padding of {path} moved"
      for path, x in own(leaves, n).items():
        assert x.any(), f"{name} of trial {n}: {path} did not train"


def test_the_pack_starts_each_trial_as_it_would_start_alone():
  packed = flatten(pack("map")[2].params)
  for n in range(3):
    for path, x in flatten(solo(n)[2].params).items():
      np.testing.assert_array_equal(own(packed, n)[path], x[0], err_msg=path)


def test_a_trial_is_taken_out_at_its_own_ranks():
  job, *_ = pack("map")
  taken = take_trial(job.state.params, make_plan(config(0)).table, [], "lora", 0).leaves
  mine = own(flatten(job.state.params), 0)
  assert {f"{path}.{name}" for path, weights in taken.items() for name in weights} == mine.keys()
  for path, x in mine.items():
    module, name = path.rsplit(".", 1)
    np.testing.assert_array_equal(taken[module][name], x)


def test_one_trial_that_breaks_leaves_the_others_their_bits():
  training, _, start, early = pack("map")
  job, compiled = training.job, training.step.compiled
  trials, state = job.trials._replace(lr=job.trials.lr.at[1].set(jnp.nan)), start
  for i in range(10):
    state, metrics = compiled(state, trials, job.frozen, rows(i), job.keys)
  assert metrics["finite"].tolist() == [True, False, True]
  for path, x in flatten(state.params).items():
    assert np.isfinite(x[1]).all(), path  # what is not finite reaches no weight
    for n in (0, 2):
      assert np.asarray(x[n]).tobytes() == flatten(early.params)[path][n].tobytes(), path


def test_the_base_has_no_gradient_and_keeps_its_bytes():
  cfg = config(0, model__seed=3)  # a base of its own
  job = job_of(cfg)
  base = {path: np.asarray(x).tobytes() for path, x in flatten(job.frozen).items()}
  training = Training(job)
  training.run(3)
  adapters = flatten(training.state.params)
  assert all(path.endswith(("lora_a", "lora_b")) for path in adapters)
  assert not any("lora" in path for path in base)
  moments = {path for path, x in flatten(training.state.opt).items() if x.ndim > 1}
  assert moments == adapters.keys()  # the optimizer keeps nothing for the base
  assert {path: np.asarray(x).tobytes() for path, x in flatten(job.frozen).items()} == base


def test_full_trains_every_parameter():
  job = job_of(small(lora__method="full", model__layers=1, optim__weight_decay=0.0))
  assert flatten(job.state.params).keys() == flatten(solo(0)[0].job.frozen).keys() and not flatten(job.frozen)
  before = kept(job.state.params)
  with quickly():
    training = Training(job)
    training.run(2)
  for path, x in flatten(training.state.params).items():
    assert (np.asarray(x) != flatten(before)[path]).any(), f"{path} did not train"


def test_frozen_trains_nothing_and_is_measured_by_the_same_step():
  job = job_of(small(lora__method="frozen", model__layers=1))
  assert flatten(job.frozen).keys() == flatten(solo(0)[0].job.frozen).keys() and not flatten(job.state.params)
  batch = rows()
  with quickly():
    training = Training(job)
    before = job.evaluate(training.state.params, job.trials, job.frozen, batch)
    training.run(1)
    after = job.evaluate(training.state.params, job.trials, job.frozen, batch)
  assert before["loss"] == after["loss"] and np.isfinite(before["loss"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulated_gradients_equal_the_full_batch_gradient(method):
  batch = rows(5, batch=4)
  batch["weights"][0] = 0  # a part with nothing to count
  batch["weights"][1, 3:] = 0  # and one with little
  assert len(set(batch["weights"].sum(1))) == 4
  found = []
  for parts in (1, 2, 4):
    job = job_of(small(model__layers=1, model__dropout=0.0, lora__method=method, optim__accumulate=parts))
    found.append({k: np.asarray(v) for k, v in flatten(gradients(job, bent(job.state.params), batch)).items()})
  largest = max(np.abs(g).max() for g in found[0].values())
  for other in found[1:]:
    for path, g in found[0].items():
      # The key's bias has no gradient but rounding: softmax does not see it.
      bound = 1e-5 * (largest if path.endswith("key.bias") else np.abs(g).max())
      assert np.abs(other[path] - g).max() <= bound, path


def instructions(training: Training) -> list[str]:
  """The compiled program without the names and lines of its source."""
  text = re.sub(r"metadata=\{[^}]*\}", "", training.step.compiled.as_text())
  return [line for line in text.splitlines() if "=" in line and not line[:1].isdigit()]


def test_lr_alpha_dropout_and_length_do_not_recompile():
  one, losses, _ = solo(0)
  cfg = config(0, train__steps=7)
  cfg.lora.alpha, cfg.lora.dropout = 7.0, 0.4
  cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.clip = 5e-3, 0.0, 3.0
  two = job_of(cfg, steps=7)
  start = kept(two.state)
  with quickly():
    training = Training(two)
    own_losses = training.run(3)[:, 0]
  assert (own_losses[1:] != losses[1:3, 0]).all()  # the numbers do enter
  # The same program, so what is compiled for one run is found in the cache for the other.
  assert instructions(one) == instructions(training)
  state = start
  for i, loss in enumerate(own_losses):
    state, metrics = one.step.compiled(state, two.trials, two.frozen, rows(i), two.keys)
    assert metrics["loss"][0] == loss


def test_a_step_of_other_data_traces_nothing_again(monkeypatch):
  traces = []
  real = MiniGPT.hidden
  monkeypatch.setattr(MiniGPT, "hidden", lambda *args: traces.append(1) or real(*args))
  job = job_of(config(0))
  with quickly():
    training = Training(job)
    training.run(1)
    assert traces
    first = len(traces)
    training.run(3)
    assert len(traces) == first
    for seed in range(3):
      job.evaluate(training.state.params, job.trials, job.frozen, job.program.layout.put_batch(rows(seed)))
  assert len(traces) == first + 1


def test_the_state_of_a_step_lies_where_the_next_step_wants_it():
  """Otherwise the second step would compile again, and donation would be lost."""
  training, *_ = pack("map")
  compiled = training.step.compiled
  inputs = jax.tree.leaves(compiled.input_shardings[0][0])
  outputs = jax.tree.leaves(compiled.output_shardings[0])
  leaves = jax.tree.leaves(training.state)
  assert all(a.is_equivalent_to(b, x.ndim) for a, b, x in zip(inputs, outputs, leaves, strict=True))
  assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in leaves)


def test_nothing_is_dropped_in_evaluation():
  rates = [config(2) for _ in range(2)]
  rates[0].lora.dropout, rates[1].lora.dropout = 0.0, 0.7
  job = job_of(*rates)
  with quickly():
    sums = job.evaluate(bent(job.state.params), job.trials, job.frozen, rows())
  assert all(sums[name][0] == sums[name][1] for name in ("loss", "correct"))


def test_rate_0_in_a_dropout_pack_has_the_undropped_gradient():
  found = []
  for rate in (0.0, 0.7):
    cfgs = [config(2, model__dropout=0.0) for _ in range(2)]
    cfgs[0].lora.dropout, cfgs[1].lora.dropout = 0.0, rate
    job = job_of(*cfgs)
    found.append(flatten(gradients(job, bent(job.state.params), rows())))
  for path, g in found[0].items():
    assert np.abs(found[1][path][0] - g[0]).max() <= 1e-5 * np.abs(g[0]).max(), path
    if "emb" not in path:  # nothing is dropped before a look-up
      assert np.abs(found[1][path][1] - g[1]).max() > 1e-2 * np.abs(g[1]).max(), path


@pytest.mark.parametrize("place", ["model", "lora"])
def test_each_step_draws_other_dropout_masks(place):
  rates = {"model__dropout": 0.0, "lora__dropout": 0.0, f"{place}__dropout": 0.3}
  job = job_of(small(**rates, optim__lr=0.0, model__layers=1))
  with quickly():
    training, batch = Training(job), job.program.layout.put_batch(rows())
    state = training.state._replace(params=bent(training.state.params))
    losses = []
    for _ in range(4):  # without a learning rate, only the masks differ
      state, metrics = training.step(state, batch)
      losses.append(float(metrics["loss"][0]))
  assert len(set(losses)) == 4, losses


def test_the_schedules_warm_up_and_fall_to_zero_at_the_last_step():
  share = lambda name, step: float(schedule(small(optim__schedule=name, optim__warmup=4).optim, jnp.float32(20), step))
  for name in ("constant", "linear", "cosine"):
    assert [share(name, s) for s in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert share(name, 4) == 1
  assert share("constant", 19) == 1
  assert share("linear", 12) == pytest.approx(0.5) and share("cosine", 12) == pytest.approx(0.5)
  assert share("linear", 20) == 0 and share("cosine", 20) == pytest.approx(0, abs=1e-7)
  assert share("linear", 8) == pytest.approx(0.75) and share("cosine", 8) == pytest.approx(0.8535534)


def test_clipping_is_per_trial_and_logs_the_unclipped_norm():
  tight, loose = (config(1, optim__name="sgd") for _ in range(2))
  for cfg, clip in ((tight, 1e-3), (loose, 1e3)):
    cfg.optim.clip, cfg.optim.lr, cfg.lora.dropout = clip, 1.0, 0.0
  job = job_of(tight, loose)
  before = kept(job.state.params)
  batch = job.program.layout.put_batch(rows())
  with quickly():
    compiled = compile_step(job, batch)
  state, metrics = compiled(job.state, batch)
  step = jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, before)
  moved = [float(optax.tree.norm(trial(step, n))) for n in range(2)]
  norms = np.asarray(metrics["grad_norm"])
  assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 2e-3
  assert moved == pytest.approx([1e-3, norms[1]], rel=1e-3)
