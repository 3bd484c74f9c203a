"""Models from settings: with random weights, or with shapes alone."""

from dataclasses import asdict
from functools import partial

from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models.registry import get_family

_last_traced: dict[str, tuple[nnx.GraphDef, nnx.State]] = {}


def build_model(cfg: ModelConfig, vocab_size: int) -> nnx.Module:
  """The model of `cfg` with random weights from `cfg.seed`. Raises InputError for an unknown family."""
  model: nnx.Module = get_family(cfg.family).module_class()(cfg, cfg.vocab_size or vocab_size, rngs=nnx.Rngs(cfg.seed))
  return model


def abstract_model(cfg: ModelConfig, vocab_size: int) -> nnx.Module:
  """The same model with `jax.ShapeDtypeStruct` in place of weights: nothing is allocated.

  The last trace is kept, because all trials of a sweep ask for the same model; each call returns a new module.
  """
  key = repr((asdict(cfg), vocab_size))
  if key not in _last_traced:
    _last_traced.clear()
    _last_traced[key] = nnx.split(nnx.eval_shape(partial(build_model, cfg, vocab_size)))
  model: nnx.Module = nnx.merge(*_last_traced[key])
  return model
