"""Model families. Each gives NNX modules, target presets and logical axes; none knows adapters or meshes."""

from dataclasses import asdict

from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models import gpt2, llama, minigpt, mlp
from lora_exp.models.family import Family, LanguageModel, Names

FAMILIES: dict[str, Family] = {
  "minigpt": minigpt.FAMILY,
  "gpt2": gpt2.FAMILY,
  "llama": llama.FAMILY,
  "mlp": mlp.FAMILY,
}


def build(cfg: ModelConfig, vocab_size: int) -> nnx.Module:
  """The model of `cfg` with random weights from `cfg.seed`."""
  return FAMILIES[cfg.family].build(cfg, cfg.vocab_size or vocab_size, rngs=nnx.Rngs(cfg.seed))


def abstract(cfg: ModelConfig, vocab_size: int) -> nnx.Module:
  """The same model with shapes in place of weights; nothing is allocated. Traced once, and new at each call."""
  key = repr((asdict(cfg), vocab_size))
  if key not in _traced:
    _traced.clear()  # the trials of a sweep ask for one and the same
    _traced[key] = nnx.split(nnx.eval_shape(lambda: build(cfg, vocab_size)))
  model: nnx.Module = nnx.merge(*_traced[key])
  return model


_traced: dict[str, tuple[nnx.GraphDef, nnx.State]] = {}


__all__ = ["FAMILIES", "Family", "LanguageModel", "Names", "abstract", "build"]
