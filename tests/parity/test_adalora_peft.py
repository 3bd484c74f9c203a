"""AdaLoRA against PEFT: the regulariser, every average and importance, the schedule, and whole runs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_exp.lora import methods
from lora_exp.lora.methods import rank_allocation

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SIZES = {"first": (10, 16), "second": (16, 12), "third": (12, 6)}
RANK, ALPHA, STEPS, EVERY, BEGIN, END = 4, 8.0, 40, 4, 6, 12
NAMES = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_e": "lora_E"}


class StoredTensor(torch.nn.Module):
  """Three layers that answer with a loss, to which `base_model` of PEFT adds its regulariser."""

  def __init__(self):
    super().__init__()
    for name, (fan_in, fan_out) in SIZES.items():
      setattr(self, name, torch.nn.Linear(fan_in, fan_out, bias=False))

  def forward(self, x, y):
    out = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
    return SimpleNamespace(loss=((out - y) ** 2).mean())


def pair(target=2, orthogonal=0.5):
  """PEFT's model, its kernels (I, O) and its adapter's leaves as our params; e is not zero, so that all leaves move."""
  torch.manual_seed(0)
  config = peft.AdaLoraConfig(
    target_modules=list(SIZES),
    init_r=RANK,
    target_r=target,
    lora_alpha=ALPHA,
    total_step=STEPS,
    tinit=BEGIN,
    tfinal=END,
    deltaT=EVERY,
    orth_reg_weight=orthogonal,
  )
  theirs = peft.get_peft_model(StoredTensor(), config)
  kernels, params = {}, {}
  for name in SIZES:
    module = layer(theirs, name)
    for factor in (module.lora_A, module.lora_B, module.lora_E):
      torch.nn.init.normal_(factor["default"], std=0.3)
    kernels[name] = jnp.asarray(module.base_layer.weight.detach().numpy().T.copy())
    params[name] = ours_of(module)
  return theirs, kernels, params


def layer(model, name):
  return model.get_submodule(f"base_model.model.{name}")


def ours_of(module, get=lambda name, p: p.detach()):
  """A module's arrays as our leaves; `get` may look up something else of the same shape."""
  arrays = {name: get(theirs, getattr(module, theirs)["default"]).numpy().copy() for name, theirs in NAMES.items()}
  return {name: jnp.asarray(x.ravel() if name == "lora_e" else x.T) for name, x in arrays.items()}


def ours_loss(params, kernels, x, y):
  """The same loss with our formula; PEFT's scale is alpha/(r + 1e-5)."""
  for i, name in enumerate(SIZES):
    x = x @ methods.get("adalora").adapted(kernels[name], params[name], ALPHA / (RANK + 1e-5))
    x = jnp.tanh(x) if i < 2 else x
  return jnp.square(x - y).mean()


def batches():
  rng = np.random.default_rng(1)
  for _ in range(STEPS):
    yield rng.normal(size=(16, 10)).astype(np.float32), rng.normal(size=(16, 6)).astype(np.float32)


def close(got, want, what):
  largest = np.abs(want).max()
  assert np.abs(np.asarray(got) - np.asarray(want)).max() <= 2e-4 * largest + 1e-12, what


@pytest.mark.parametrize("orthogonal", [0.5, 0.1])
def test_the_regulariser_and_its_gradient_are_pefts(orthogonal):
  theirs, kernels, params = pair(orthogonal=orthogonal)
  x, y = next(batches())
  out = theirs.base_model(torch.tensor(x), torch.tensor(y))
  out.loss.backward()
  penalty = lambda p: orthogonal * rank_allocation.orthogonality(rank_allocation.adapters(p))
  whole = lambda p: ours_loss(p, kernels, jnp.asarray(x), jnp.asarray(y)) + penalty(p)
  value, grads = jax.jit(jax.value_and_grad(whole))(params)
  np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
  for name in SIZES:
    want = ours_of(layer(theirs, name), lambda _, p: p.grad)
    for leaf, g in grads[name].items():
      close(g, want[leaf], f"{name}.{leaf}")


def as_leaves(name, state):
  """One of PEFT's dictionaries of averages, as our leaves."""
  key = lambda theirs: f"{name}.{theirs}.default"
  arrays = {ours: state[key(theirs)].numpy() for ours, theirs in NAMES.items()}
  return {ours: x.ravel() if ours == "lora_e" else x.T for ours, x in arrays.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("target", [2, 1])
def test_a_run_prunes_what_peft_prunes(optimizer, target):
  """The training loop of PEFT's documentation, side by side: averages, choice and weights after every step."""
  theirs, kernels, params = pair(target)
  allocator = theirs.base_model.rankallocator
  inner = {"sgd": optax.sgd(0.1), "adamw": optax.adamw(1e-2, weight_decay=0.01)}[optimizer]
  trained = [p for p in theirs.parameters() if p.requires_grad]
  torch_inner = {
    "sgd": lambda: torch.optim.SGD(trained, lr=0.1),
    "adamw": lambda: torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01),
  }[optimizer]()
  rule = rank_allocation.allocate(inner, steps=STEPS, budget=target, every=EVERY, begin=BEGIN / STEPS, end=END / STEPS)
  state = rule.init(params)

  @jax.jit
  def step(params, state, x, y):
    updates, state = rule.update(jax.grad(ours_loss)(params, kernels, x, y), state, params)
    return optax.apply_updates(params, updates), state

  pruned = set()
  for i, (x, y) in enumerate(batches(), 1):
    params, state = step(params, state, x, y)
    torch_inner.zero_grad()
    theirs.base_model(torch.tensor(x), torch.tensor(y)).loss.backward()
    torch_inner.step()
    before = allocator.exp_avg_ipt, allocator.exp_avg_unc
    theirs.base_model.update_and_allocate(i)
    if i <= STEPS - END:  # the last pruning is by the averages of the step before, which PEFT then drops
      averages = before if i == STEPS - END else (allocator.exp_avg_ipt, allocator.exp_avg_unc)
      for name in SIZES:
        for got, want in zip((state.sensitivity[name], state.uncertainty[name]), averages, strict=True):
          want = as_leaves(name, want)
          for leaf in NAMES:
            close(got[leaf], want[leaf], f"step {i}: {name}.{leaf}")
    for name in SIZES:
      want = ours_of(layer(theirs, name))
      assert ((params[name]["lora_e"] != 0) == (want["lora_e"] != 0)).all(), f"step {i}: {name}"
      for leaf in NAMES:
        close(params[name][leaf], want[leaf], f"step {i}: {name}.{leaf}")
    pruned.add(sum(rank_allocation.kept_ranks(params).values()))
  assert sum(rank_allocation.kept_ranks(params).values()) == target * len(SIZES)
  assert len(pruned) > 3, "the run pruned in several goes"


def test_importance_is_pefts():
  """PEFT keeps no score: its threshold is found by asking for every budget in turn, which orders the ranks."""
  theirs, _, _ = pair()
  allocator = theirs.base_model.rankallocator
  generator = torch.Generator().manual_seed(3)
  for name, p in theirs.base_model.model.named_parameters():
    if "lora_" in name:
      allocator.exp_avg_ipt[name] = torch.rand(p.shape, generator=generator)
      allocator.exp_avg_unc[name] = torch.rand(p.shape, generator=generator)
  means, spreads = (
    {(name,): as_leaves(name, part) for name in SIZES} for part in (allocator.exp_avg_ipt, allocator.exp_avg_unc)
  )
  scores = rank_allocation.importance(means, spreads)
  real = {path: jnp.ones(RANK, bool) for path in scores}
  for budget in range(len(SIZES) * RANK - 1, 0, -1):
    pattern = allocator.mask_to_budget(theirs.base_model.model, budget)
    chosen = rank_allocation.choose(scores, real, budget / len(SIZES), STEPS, BEGIN, STEPS - END)
    for name in SIZES:
      assert list(np.asarray(chosen[(name,)])) == pattern[f"{name}.lora_E.default"], budget


def test_the_schedule_is_pefts():
  theirs, _, _ = pair()
  allocator = theirs.base_model.rankallocator
  total, target = RANK * len(SIZES), 2 * len(SIZES)
  for t in range(STEPS + 1):
    want, _ = allocator.budget_schedule(t)
    assert int(rank_allocation.budget_at(t, BEGIN, STEPS - END, total, target)) == want, t
