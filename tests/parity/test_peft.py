"""Against PEFT and torch: the same adapter computes the same, and its file is read by PEFT as it is."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_exp import lora
from lora_exp.lora import initialization

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SIZES = {"linear1": (24, 40), "linear2": (40, 12)}


class Ours(nnx.Module):
  """Two layers with a ReLU between them, so that gradients pass through both adapters."""

  def __init__(self, rngs: nnx.Rngs):
    self.linear1 = nnx.Linear(*SIZES["linear1"], rngs=rngs)
    self.linear2 = nnx.Linear(*SIZES["linear2"], rngs=rngs)

  def __call__(self, x):
    return self.linear2(nnx.relu(self.linear1(x)))


class StoredTensor(torch.nn.Module):
  """The same in torch."""

  def __init__(self):
    super().__init__()
    self.linear1 = torch.nn.Linear(*SIZES["linear1"])
    self.linear2 = torch.nn.Linear(*SIZES["linear2"])

  def forward(self, x):
    return self.linear2(torch.relu(self.linear1(x)))


def pair(tmp_path, rank=3, alpha=7.0, scaling="standard", compute="factored", **settings):
  """Our adapted model with B drawn at random, and PEFT's from our file on the same base."""
  ours, theirs = Ours(nnx.Rngs(0)), StoredTensor()
  for name in SIZES:
    module = getattr(theirs, name)
    module.weight.data = torch.tensor(np.asarray(getattr(ours, name).kernel[...]).T.copy())
    module.bias.data = torch.tensor(np.asarray(getattr(ours, name).bias[...]).copy())
  table = lora.inject(
    ours, list(SIZES), rank=rank, alpha=alpha, scaling=scaling, compute=compute, key=jax.random.key(1), **settings
  )
  for i, row in enumerate(table):
    module = getattr(ours, row.path)
    module.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(10 + i), module.lora_b.shape)
  adapter = replace(lora.extract_adapter(ours), rows=tuple(table))
  assert lora.save_adapter(tmp_path, adapter, lora.Naming(), {"scaling": scaling})
  config = tmp_path / "adapter_config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": None}))  # no language model
  return ours, peft.PeftModel.from_pretrained(theirs, str(tmp_path), is_trainable=True), table


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"rank": 5, "alpha": 2.0, "scaling": "rslora"},
    {"rank_pattern": {"linear2": 6}, "alpha_pattern": {"linear1": 11.0}},
    {"rank": 16, "alpha": 4.0, "compute": "merged"},
  ],
)
def test_peft_computes_the_same_from_our_file(tmp_path, settings):
  ours, theirs, _ = pair(tmp_path, **settings)
  x = np.random.default_rng(0).normal(size=(9, 24)).astype(np.float32)
  want = theirs(torch.tensor(x)).detach().numpy()
  np.testing.assert_allclose(ours(jnp.asarray(x)), want, atol=2e-6, rtol=2e-5)
  base = theirs.get_base_model()
  with theirs.disable_adapter():
    assert np.abs(base(torch.tensor(x)).detach().numpy() - want).max() > 1e-2, "the adapter did nothing"


@pytest.mark.parametrize("compute", ["factored", "merged"])
def test_gradients_of_a_and_b_are_pefts(tmp_path, compute):
  ours, theirs, table = pair(tmp_path, compute=compute)
  x = np.random.default_rng(1).normal(size=(9, 24)).astype(np.float32)
  graph, trainable, rest = nnx.split(ours, nnx.LoRAParam, ...)
  grads = jax.grad(lambda t: (nnx.merge(graph, t, rest)(jnp.asarray(x)) ** 2).sum())(trainable)
  (theirs(torch.tensor(x)) ** 2).sum().backward()
  for row in table:
    module = theirs.get_submodule(f"base_model.model.{row.path}")
    for ours_name, theirs_name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
      want = getattr(module, theirs_name)["default"].weight.grad.numpy().T
      got = np.asarray(grads[row.path][ours_name][...])
      assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_twenty_adamw_steps_follow_pefts(tmp_path):
  ours, theirs, table = pair(tmp_path)
  graph, trainable, rest = nnx.split(ours, nnx.LoRAParam, ...)
  params, rest = nnx.to_pure_dict(trainable), nnx.to_pure_dict(rest)
  rule = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
  opt = rule.init(params)
  adam = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, eps=1e-8, weight_decay=0.1)
  rng, losses = np.random.default_rng(2), []
  for _ in range(20):
    x, y = rng.normal(size=(9, 24)).astype(np.float32), rng.normal(size=(9, 12)).astype(np.float32)
    loss = lambda p, x=x, y=y: ((nnx.merge(graph, p, rest)(jnp.asarray(x)) - y) ** 2).mean()
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt = rule.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    adam.zero_grad()
    torch_loss = ((theirs(torch.tensor(x)) - torch.tensor(y)) ** 2).mean()
    torch_loss.backward()
    adam.step()
    losses.append((float(value), torch_loss.item()))
  ours_losses, torch_losses = np.array(losses).T
  np.testing.assert_allclose(ours_losses, torch_losses, rtol=1e-5)


def test_a_starts_as_pefts_does():
  """The same distribution, U(±1/sqrt(in)): equal bounds and equal standard deviations over many draws."""
  theirs = peft.get_peft_model(StoredTensor(), peft.LoraConfig(r=256, target_modules=["linear1"]))
  want = theirs.get_submodule("base_model.model.linear1").lora_A["default"].weight.detach().numpy()
  got = np.asarray(initialization.draw_a(jax.random.key(0), "kaiming", 24, 24, 256))
  bound = 1 / np.sqrt(24)
  assert np.abs(got).max() <= bound >= np.abs(want).max()
  assert abs(got.std() - want.std()) < 0.03 * want.std()


def test_our_config_states_what_differs_from_pefts_defaults(tmp_path):
  _, _, table = pair(tmp_path, rank=3, alpha=7.0)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  read, default = peft.LoraConfig.from_pretrained(str(tmp_path)).to_dict(), peft.LoraConfig().to_dict()
  left_out = default.keys() - config.keys()
  assert {name: read[name] for name in left_out} == {name: default[name] for name in left_out}
  assert (config["r"], config["lora_alpha"]) == (3, 7.0)
