"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their scalings for longer contexts."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_exp.config import ArchConfig

Array = jax.Array


class PositionView(NamedTuple):
  """The positional inputs of a layer: the rotation of each position, and its attention mask."""

  cos_BT1r: Array  # r: number of rotated features of a head
  sin_BT1r: Array
  mask_BTS: Array


def position_views(
  arch: ArchConfig, positions_BT: Array, mask_BTS: Array, slot: Array | int, cached: bool
) -> tuple[PositionView, PositionView]:
  """Returns the views for full-attention and sliding-window layers; positions int (B, T), mask bool (B, T, S).

  With a cache, the context length is its number of slots, so that all its keys use the same frequencies.
  """
  rotating = int(arch.head_dim * arch.partial_rotary_factor)
  length = mask_BTS.shape[-1] if cached else positions_BT.max() + 1
  full = PositionView(*rotations(positions_BT, rotating, arch.rope_theta, arch.rope_scaling, length), mask_BTS)
  if arch.window is None:
    return full, full
  T, S = mask_BTS.shape[1:]
  distance = slot + jnp.arange(T)[:, None] - jnp.arange(S)
  local_theta = arch.rope_local_theta
  local = full if local_theta is None else rotations(positions_BT, rotating, local_theta, None, length)
  return full, PositionView(local[0], local[1], mask_BTS & (distance < arch.window))


def rotations(
  positions_BT: Array, rotating: int, theta: float, scaling: dict[str, Any] | None, length: Array | int
) -> tuple[Array, Array]:
  """Cosine and sine (B, T, 1, r) of each position's rotation of `rotating` features, in float32; see `frequencies`."""
  frequency, amplitude = frequencies(rotating, theta, scaling, length)
  angle = positions_BT[..., None, None] * jnp.concatenate([frequency, frequency])
  if amplitude == 1.0:
    return jnp.cos(angle), jnp.sin(angle)
  return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def frequencies(
  rotating: int, theta: float, scaling: dict[str, Any] | None, length: Array | int
) -> tuple[Array, float]:
  """The frequencies (r/2,), float32, of `rotating` features, and the factor of cosines and sines.

  The frequencies are theta^(-2i/r); `scaling` changes them for longer contexts. `linear` divides them by `factor`
  (arXiv 2306.15595). `llama3` divides frequencies with fewer than `low_freq_factor` periods in the original context,
  leaves those with more than `high_freq_factor` unchanged, and interpolates in between. `longrope` (arXiv 2402.13753)
  divides each by its own factor from one of two lists: as in transformers, the long list if `length`, the longest
  context, exceeds the original. `yarn` (arXiv 2309.00071) interpolates as `llama3` does, with bounds in numbers of
  periods. `dynamic` increases theta if `length` exceeds the original.
  """
  frequency = theta ** (-jnp.arange(0, rotating, 2, dtype=jnp.float32) / rotating)
  kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
  if scaling is not None and kind == "linear":
    frequency = frequency / scaling["factor"]
  if scaling is not None and kind == "llama3":
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    unscaled = jnp.clip((turns - low) / (high - low), 0, 1)
    frequency = unscaled * frequency + (1 - unscaled) * frequency / scaling["factor"]
  amplitude = 1.0
  if scaling is not None and kind == "dynamic":
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    stretch = factor * jnp.maximum(length, original) / original - (factor - 1)
    frequency = frequency * stretch ** (-jnp.arange(0, rotating, 2, dtype=jnp.float32) / (rotating - 2))
  if scaling is not None and kind == "yarn":
    unscaled = 1 - yarn_ramp(rotating, theta, scaling)
    frequency = unscaled * frequency + (1 - unscaled) * frequency / scaling["factor"]
    amplitude = scaling["attention_factor"]
  if scaling is not None and kind == "longrope":
    beyond = length > scaling["original_max_position_embeddings"]
    frequency = frequency / jnp.where(beyond, jnp.array(scaling["long_factor"]), jnp.array(scaling["short_factor"]))
    amplitude = scaling["attention_factor"]
  return frequency, amplitude


def yarn_ramp(rotating: int, theta: float, scaling: dict[str, Any]) -> Array:
  """How far each frequency is interpolated in YaRN, from 0 to 1, float32 (r/2,)."""

  def index_of(periods: float) -> float:
    """The fractional index of the frequency with `periods` periods in the original context."""
    length = scaling["original_max_position_embeddings"]
    return rotating * math.log(length / (periods * 2 * math.pi)) / (2 * math.log(theta))

  low, high = index_of(scaling["beta_fast"]), index_of(scaling["beta_slow"])
  if scaling["truncate"]:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotating - 1)
  if low == high:
    high += 0.001  # as in transformers
  return jnp.clip((jnp.arange(rotating // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)


def rotate(x_BTHh: Array, view: PositionView) -> Array:
  """Rotates each pair (i, i + r/2) of the first r features of a head; the other features are unchanged."""
  rotating = view.cos_BT1r.shape[-1]
  if rotating == x_BTHh.shape[-1]:
    return _turn(x_BTHh, view)
  return jnp.concatenate([_turn(x_BTHh[..., :rotating], view), x_BTHh[..., rotating:]], axis=-1)


def _turn(x_BTHr: Array, view: PositionView) -> Array:
  first, second = jnp.split(x_BTHr.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x_BTHr * view.cos_BT1r + turned * view.sin_BT1r).astype(x_BTHr.dtype)
