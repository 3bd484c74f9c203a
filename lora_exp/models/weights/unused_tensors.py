"""Checks of stored tensors that are not loaded, because the model computes their values or uses an equal tensor.

Such a tensor must have the value that is used instead. Otherwise the checkpoint belongs to another model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.tensor_names import StoredNames, TensorNames
from lora_exp.models.weights.locate import checkpoint_format
from lora_exp.models.weights.safetensors_checkpoint import open_safetensors
from lora_exp.models.weights.stored_tensor import Checkpoint, read_whole
from lora_exp.runtime.safetensors_reader import DTYPES, ELEMENTS

BLOCK = 2**20  # elements compared at once
LARGEST_MASK = 2**28  # elements of a mask that is read
MASKED = -1e4  # scores at and below this value mask a position
TOLERANCE = 0.02  # relative; rotary frequencies may be stored in bfloat16


def is_causal_mask(x: np.ndarray, model: ModelConfig) -> bool:
  """Whether x (..., T, S) is nonzero exactly where position t may attend to s <= t, or nonzero everywhere."""
  visible = np.asarray(x, np.float32) != 0
  return bool((visible == np.tril(np.ones(visible.shape[-2:], bool))).all())


def is_masking_score(x: np.ndarray, model: ModelConfig) -> bool:
  """Whether x is the score of masked positions."""
  return bool((np.asarray(x, np.float32) <= MASKED).all())


def are_rotary_frequencies(x: np.ndarray, model: ModelConfig) -> bool:
  """Whether x (r/2,) are the frequencies of the unscaled rotary embedding; no checkpoint stores scaled ones."""
  arch = model.arch or ArchConfig()
  exponents = np.arange(x.size) / max(1, x.size)
  thetas = [theta for theta in (arch.rope_theta, arch.rope_local_theta) if theta is not None]
  return any(np.allclose(np.asarray(x, np.float64), theta**-exponents, rtol=TOLERANCE, atol=1e-7) for theta in thetas)


def are_rotary_factors(x: np.ndarray, model: ModelConfig) -> bool:
  """Whether x (r/2,) are the factors by which the scaling divides each frequency, in short or in long contexts."""
  from lora_exp.models.modules.rotary import frequencies  # imports jax

  arch = model.arch or ArchConfig()
  rotating = int(arch.head_dim * arch.partial_rotary_factor)
  plain, _ = frequencies(rotating, arch.rope_theta, None, 1)
  scaled = [frequencies(rotating, arch.rope_theta, arch.rope_scaling, length)[0] for length in (1, 2**30)]
  return any(x.shape == plain.shape and np.allclose(x, plain / y, rtol=1e-3, atol=0) for y in scaled)


# kind of tensor, as in `TensorNames.computed` -> (check, problem)
CHECKS: Mapping[str, tuple[Callable[[np.ndarray, ModelConfig], bool], str]] = {
  "causal mask": (is_causal_mask, "is not the causal mask that the model uses"),
  "masking score": (is_masking_score, f"is not a score of masked positions, which is at most {MASKED:g}"),
  "rotary factors": (are_rotary_factors, "differs from the factors of model.arch.rope_scaling"),
  "rotary frequencies": (are_rotary_frequencies, "differs from the frequencies of model.arch.rope_theta"),
}


def unused_problems(checkpoint: Checkpoint, unused: list[str], names: StoredNames) -> Iterator[str]:
  """A problem for each tensor in `unused` that the model neither computes nor replaces by an equal one."""
  for name in unused:
    tensor, kind = checkpoint.tensors[name], names.computed(name)
    readable = tensor.dtype in ELEMENTS and math.prod(tensor.shape) <= LARGEST_MASK
    if names.is_of_another_part(name):
      continue
    if names.is_head(name) and names.names is not None:
      embedding = f"{names.prefix}{names.names.token_embedding}.weight"
      if not equal_tensors(checkpoint, name, embedding):
        yield (f"{name} differs from {embedding}, and model.arch.tied=true uses only the latter; set "
               "model.arch.tied=false")
    elif kind is None or names.model is None:
      yield f"{name} is not in the model"
    else:
      is_expected, problem = CHECKS[kind]
      if not readable or not is_expected(read_whole(checkpoint, name, np.float32), names.model):
        yield f"{name} {problem}"


def equal_tensors(checkpoint: Checkpoint, name: str, other: str) -> bool:
  """Whether two tensors of a checkpoint have equal shapes and values. False if one is missing or cannot be read."""
  first, second = checkpoint.tensors.get(name), checkpoint.tensors.get(other)
  if first is None or second is None or first.shape != second.shape or not first.shape:
    return False
  if first.dtype not in DTYPES or second.dtype not in DTYPES:
    return False
  rows = max(1, BLOCK // max(1, math.prod(first.shape[1:])))
  for start in range(0, first.shape[0], rows):
    index = (slice(start, min(start + rows, first.shape[0])),) + (slice(None),) * (len(first.shape) - 1)
    x = np.empty((index[0].stop - start, *first.shape[1:]), np.float64)
    y = np.empty_like(x)
    checkpoint.read(name, [(index, x)])
    checkpoint.read(other, [(index, y)])
    if not np.array_equal(x, y):
      return False
  return True


def has_another_head(path: Path, names: TensorNames | None) -> bool:
  """Whether the safetensors checkpoint at `path` has a head that differs from its token embedding.

  False for other formats and for damaged files, which loading reports.
  """
  if names is None:
    return False
  try:
    if checkpoint_format(path) != "safetensors":
      return False
    checkpoint = open_safetensors(path)
  except (InputError, OSError):
    return False
  endings = tuple(f"{head}.weight" for head in names.unprefixed)
  heads = [name for name in checkpoint.tensors if f".{name}".endswith(tuple(f".{ending}" for ending in endings))]
  embeddings = [name for name in checkpoint.tensors if name.endswith(f"{names.token_embedding}.weight")]
  if len(heads) != 1 or len(embeddings) != 1:
    return False
  readable = all(checkpoint.tensors[name].dtype in DTYPES for name in (*heads, *embeddings))
  return readable and not equal_tensors(checkpoint, heads[0], embeddings[0])
