"""A multi-layer perceptron for numeric data: `layers.0`, `layers.1`, … and `output`. `model.mlp` has its sizes."""

from collections.abc import Iterator

from lora_exp.config.conversion import shown
from lora_exp.config.number_ranges import MOST_LAYERS, WIDTH
from lora_exp.config.schema import ModelConfig
from lora_exp.models.arch_checks import one_of
from lora_exp.models.family import Family
from lora_exp.models.parameter_shapes import mlp_shapes

CHOICES = {"activation": ("relu", "gelu", "gelu_tanh", "silu"), "init": ("lecun_normal", "xavier_uniform")}


def check_sizes(model: ModelConfig) -> Iterator[str]:
  """Checks that sizes are positive, and that activation and initialisation exist."""
  mlp = model.mlp
  if mlp is None:
    yield "model.mlp=null: model.family=mlp needs its sizes; add model=mlp"
    return
  for name, size in (("inputs", mlp.inputs), ("outputs", mlp.outputs)):
    if size < 1:
      yield f"model.mlp.{name}={size}: must be at least 1"
  if wrong := [width for width in mlp.hidden if width not in WIDTH]:
    yield f"model.mlp.hidden={shown(mlp.hidden)}: each must be {WIDTH.words(wrong[0])}"
  if len(mlp.hidden) > MOST_LAYERS:
    yield f"model.mlp.hidden={shown(mlp.hidden)}: {len(mlp.hidden):,} layers; give at most {MOST_LAYERS:,}"
  for name, choices in CHOICES.items():
    yield from one_of(f"model.mlp.{name}", getattr(mlp, name), choices)


FAMILY = Family(
  name="mlp",
  module="lora_exp.models.modules.multilayer_perceptron:MultilayerPerceptron",
  shapes=mlp_shapes,
  presets={"mlp": ("layers.*",), "all_linear": ("layers.*",), "head": ("output",)},
  axes={"kernel": ("embed", "mlp"), "bias": ("mlp",)},
  check=check_sizes,
)
