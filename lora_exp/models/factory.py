"""Builds models from settings, with random weights or with shapes only."""

from dataclasses import asdict
from functools import partial

from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models.registry import get_family
from lora_exp.runtime.mesh import flatten

_last_traced: dict[str, tuple[nnx.GraphDef, nnx.State]] = {}


def build_model(cfg: ModelConfig, vocab_size: int) -> nnx.Module:
  """Builds the model of `cfg` with random weights from `cfg.seed`. Raises InputError for an unknown family."""
  model: nnx.Module = get_family(cfg.family).module_class()(cfg, cfg.vocab_size or vocab_size, rngs=nnx.Rngs(cfg.seed))
  return model


def abstract_model(cfg: ModelConfig, vocab_size: int) -> nnx.Module:
  """Builds the same model with `jax.ShapeDtypeStruct` in place of weights, without allocating arrays.

  The last trace is cached, because all trials of a sweep build the same model. Each call returns a new module.
  """
  key = repr((asdict(cfg), vocab_size))
  if key not in _last_traced:
    _last_traced.clear()
    _last_traced[key] = nnx.split(nnx.eval_shape(partial(build_model, cfg, vocab_size)))
  model: nnx.Module = nnx.merge(*_last_traced[key])
  return model


def built_shapes(cfg: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
  """The shapes of all parameters by dotted path, from the abstract model."""
  parameters = nnx.to_pure_dict(nnx.state(abstract_model(cfg, vocab_size), nnx.Param))
  return {path: tuple(x.shape) for path, x in flatten(parameters).items()}
