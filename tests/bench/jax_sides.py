"""Training steps of other JAX libraries on the files of `our_side.write_case`, with our decoder as the base model.

`qwix_step` puts qwix's LoRA on the modules. `ragged_step` trains N adapters in one step, as SkyRL's tx does: the rows
of all adapters are one batch, sorted by adapter, and `jax.lax.ragged_dot` multiplies each group with its own A and B.
Both compute whole logits and differentiate by `jax.grad`, and Adam updates the adapters.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from our_side import case_settings, plan_of
from safetensors.numpy import load_file

from lora_exp.models.factory import build_model
from lora_exp.train.base import make_base
from lora_exp.train.plan import Plan


class JaxStep:
  """A model, its optimizer and one batch. `train(model, optimizer, tokens, labels)` returns losses (N,)."""

  def __init__(self, model: nnx.Module, train: Callable[..., jax.Array], tokens: np.ndarray, labels: np.ndarray):
    self.model, self.train = model, train
    self.optimizer = nnx.Optimizer(model, optax.adam(1e-4), wrt=nnx.LoRAParam)
    self.tokens, self.labels = jnp.asarray(tokens), jnp.asarray(labels)

  def run(self, steps: int) -> list[float]:
    """Trains `steps` times, waits for the device, and returns the loss of the first adapter in each step."""
    losses = [self.train(self.model, self.optimizer, self.tokens, self.labels) for _ in range(steps)]
    return [float(loss[0]) for loss in jax.block_until_ready(losses)]


def base_model(directory: Path, settings: list[str]) -> tuple[nnx.Module, Plan]:
  """Our decoder with the weights of a case and without an adapter."""
  plan = plan_of([text for text in case_settings(directory, settings) if not text.startswith("lora.init_from=")])
  model = build_model(plan.cfg.model, plan.vocab_size)
  nnx.update(model, make_base(plan)[0])
  return model, plan


def leaves_of(directory: Path) -> dict[str, np.ndarray]:
  """The adapter of a case: A (I, R) and B (R, O) by `PATH.lora_a` and `PATH.lora_b`."""
  tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
  name = re.compile(r"base_model\.model\.model\.(.*)\.lora_([AB])\.weight")
  matches = {key: name.fullmatch(key) for key in tensors}
  return {f"{m[1]}.lora_{m[2].lower()}": tensors[key].T for key, m in matches.items() if m}


def losses_of(model: Any, tokens: jax.Array, labels: jax.Array, adapters: int) -> jax.Array:
  """The mean loss of each adapter's rows, (N,)."""
  losses_BT = optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels)
  return losses_BT.reshape(adapters, -1).mean(axis=1)


def trained_step(adapters: int) -> Callable[..., jax.Array]:
  """The compiled step. The gradient of an adapter is that of its own mean loss."""

  @nnx.jit
  def train(model: nnx.Module, optimizer: nnx.Optimizer, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    def total(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
      losses = losses_of(model, tokens, labels, adapters)
      return losses.sum(), losses

    (_, losses), grads = nnx.value_and_grad(total, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(model)
    optimizer.update(model, grads)
    return losses

  return train


def qwix_step(directory: Path, settings: list[str]) -> JaxStep:
  """The step with qwix's LoRA."""
  import qwix

  batch = np.load(directory / "batch.npz")
  model, plan = base_model(directory, settings)
  paths = "|".join(re.escape(row.path).replace(r"\.", "/") for row in plan.table)
  rule = qwix.LoraRule(module_path=paths, rank=plan.cfg.lora.rank, alpha=plan.table[0].alpha)
  model = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]), jnp.asarray(batch["tokens"]))
  for path, x in leaves_of(directory).items():
    module, _, leaf = path.rpartition(".")
    variable = getattr(module_at(model, module), f"kernel_{leaf}")
    assert variable.get_value().shape == x.shape, path
    variable.set_value(jnp.asarray(x))
  return JaxStep(model, trained_step(1), batch["tokens"], batch["labels"])


def module_at(model: nnx.Module, path: str) -> Any:
  """The module at a dotted path."""
  module: Any = model
  for name in path.split("."):
    module = module[int(name)] if name.isdigit() else getattr(module, name)
  return module


class RaggedLinear(nnx.Module):
  """y = x·W + s·(x·A)·B with A and B of the adapter to which a row of the batch belongs."""

  def __init__(self, linear: nnx.Linear, a_IR: np.ndarray, b_RO: np.ndarray, scale: float, adapters: int):
    self.kernel, self.bias, self.scale, self.adapters = linear.kernel, linear.bias, scale, adapters
    self.lora_a = nnx.LoRAParam(jnp.stack([jnp.asarray(a_IR)] * adapters))
    self.lora_b = nnx.LoRAParam(jnp.stack([jnp.asarray(b_RO)] * adapters))

  def __call__(self, x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    sizes = jnp.full(self.adapters, len(rows) // self.adapters, jnp.int32)
    thin = jax.lax.ragged_dot(rows, self.lora_a[...], sizes)
    y = rows @ self.kernel[...] + self.scale * jax.lax.ragged_dot(thin, self.lora_b[...], sizes)
    y = y if self.bias is None else y + self.bias[...]
    return y.reshape(*x.shape[:-1], -1)


def ragged_step(directory: Path, settings: list[str], adapters: int) -> JaxStep:
  """The step of `adapters` adapters with equal values, each on the batch of the case."""
  batch = np.load(directory / "batch.npz")
  model, plan = base_model(directory, settings)
  leaves = leaves_of(directory)
  for row in plan.table:
    parent, _, name = row.path.rpartition(".")
    module = module_at(model, parent)
    a_IR, b_RO = leaves[f"{row.path}.lora_a"], leaves[f"{row.path}.lora_b"]
    setattr(module, name, RaggedLinear(getattr(module, name), a_IR, b_RO, row.scale, adapters))
  tokens, labels = (np.concatenate([batch[name]] * adapters) for name in ("tokens", "labels"))
  return JaxStep(model, trained_step(adapters), tokens, labels)
