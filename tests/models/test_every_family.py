"""Every family: an untrained adapter changes nothing, bfloat16 is near float32, and eight devices train as one."""

import json
from functools import cache, partial

import jax
import numpy as np
import pytest
from packs import bent, job_of, quickly, rows, small
from runs import script_output
from tiny_models import GEMMA, MIXTRAL, OLMO2, PHI3

from lora_exp.config import ArchConfig, Config
from lora_exp.lora import eject
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.step import batch_loss, gradient

BFLOAT16 = ("model__dtype", "model__param_dtype")
FAMILIES = {
  "gpt2": {"model__family": "gpt2", "model__layers": 1, "model__arch": ArchConfig(activation="gelu_tanh")},
  "llama": {
    "model__family": "llama", "model__layers": 1,
    "model__arch": ArchConfig(kv_heads=2, head_dim=6, tied=False, qkv_bias=True),
  },
  "gemma": {"model__family": "llama", "model__arch": ArchConfig(**GEMMA)},
  "olmo2": {"model__family": "olmo2", "model__layers": 1, "model__arch": ArchConfig(**OLMO2)},
  "mixtral": {"model__family": "mixtral", "model__layers": 1, "model__arch": ArchConfig(**MIXTRAL)},
  "phi3": {"model__family": "phi3", "model__layers": 1, "model__arch": ArchConfig(**PHI3)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


def config(family: str, **more) -> Config:
  return small(**{"model__dropout": 0.0, **FAMILIES[family], **more})


@cache
def job(family: str, **more):
  return job_of(config(family, **more))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_changes_no_logit(family):
  of = job(family, lora__targets="all_linear")
  params, trained, trial = jax.tree.map(lambda x: x[0], (of.state.params, bent(of.state.params), of.trials))

  @partial(jax.jit, static_argnames="adapted")
  def logits(params, frozen, tokens, adapted=True):
    model = assemble(of.program, params, trial, frozen, None)
    if not adapted:
      eject(model)
    return model(tokens)

  tokens = rows()["tokens"]
  found, base = logits(params, of.frozen, tokens), logits(params, of.frozen, tokens, adapted=False)
  np.testing.assert_array_equal(found, base)
  assert np.abs(logits(trained, of.frozen, tokens) - base).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_with_remat_is_near_the_float32_gradient(family):
  wide = job(family, lora__targets="all_linear")
  low = job(family, lora__targets="all_linear", model__remat=True, **dict.fromkeys(BFLOAT16, "bfloat16"))
  batch = rows()
  results = []
  for of in (wide, low):
    params, trial = jax.tree.map(lambda x: x[0], (bent(wide.state.params), of.trials))
    frozen = jax.tree.map(lambda x, like: x.astype(like.dtype), wide.frozen, of.frozen)

    def loss_of(params, of=of, trial=trial, frozen=frozen):
      return batch_loss(of.program, params, trial, frozen, batch, None).loss

    results.append(jax.jit(jax.value_and_grad(loss_of))(params))
  (loss, grads), (low_loss, low_grads) = results
  assert float(low_loss) == pytest.approx(float(loss), rel=0.01) and low_loss != loss
  for path, g in flatten(grads).items():
    assert np.abs(flatten(low_grads)[path] - g).max() <= 0.1 * np.abs(g).max(), path


def gradients(family: str, **mesh: int) -> dict[str, list]:
  """The gradient of each trained array on one batch, as nested lists."""
  sizes = {f"mesh__{axis}": ways for axis, ways in mesh.items()}
  targets = ["all_linear", "embeddings"]
  of = job_of(config(family, model__vocab_size=264, train__batch_size=8, lora__targets=targets, **sizes))
  params, trial = jax.tree.map(lambda x: x[0], (bent(of.state.params), of.trials))
  found = jax.jit(lambda *args: gradient(of.program, *args, of.keys[0])[0])
  grads = found(params, trial, of.frozen, of.program.layout.put_batch(rows(batch=8, length=14)))
  return {path: np.asarray(x).tolist() for path, x in flatten(grads).items()}


MESHES = {"gpt2": {"data": 2, "fsdp": 2, "tensor": 2}, "llama": {"data": 1, "fsdp": 2, "tensor": 4},
          "phi3": {"data": 1, "fsdp": 2, "tensor": 4}}  # fmt: skip
CHILD = """
import json
from packs import quickly
from test_every_family import MESHES, gradients
with quickly():
  print(json.dumps({family: gradients(family, **mesh) for family, mesh in MESHES.items()}))
"""


@pytest.mark.slow
def test_the_gradient_on_eight_devices_is_that_of_one():
  """Also where the tensor axis cuts the fused kernel through the keys, and where key heads are fewer than its ways."""
  for family, many in json.loads(script_output(CHILD)).items():
    for path, wanted in gradients(family).items():
      g = np.array(wanted)
      assert np.abs(g).max() > 0, path
      assert np.abs(np.array(many[path]) - g).max() <= 1e-5 * np.abs(g).max(), (family, path)
