"""Comparison of a merged model with its run, on held-out rows and in the dtype that is written."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import Config, LoraExpError
from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.data.sources import is_numeric
from lora_exp.lora import methods
from lora_exp.lora.quantization import is_quantised
from lora_exp.runtime import console
from lora_exp.train.compute.program import Tree, assemble
from lora_exp.train.compute.step import features, outputs
from lora_exp.train.loaded_run import LoadedRun
from lora_exp.train.merging.merged_run import MergedRun, Rounding, open_merged

# Largest allowed difference of a logit. The bounds for 16 bits allow for its rounding: SmolLM2's logits differ
# from float32 by 1.3 (bfloat16) and 0.16 (float16) without merging, and by 0.84 and 0.13 with merging.
BOUNDS = {"float32": 1e-3, "bfloat16": 2.0, "float16": 0.25}
MOST_TOKENS = 1024  # held-out tokens or examples
MOST_LOGITS = 2**26  # compared logits: 256 MiB in float32
CHUNK = 2**22  # logits compared at a time


@dataclass(frozen=True)
class ModelOutputs:
  """A model's predictions for the N held-out tokens or examples that have a weight."""

  z_NV: np.ndarray  # logits, float32; for numeric examples the outputs (N, O)
  targets_N: np.ndarray  # token ids or classes; for a regression numbers (N, O)


@dataclass(frozen=True)
class OutputDifference:
  """Differences between the merged model and the run on the same tokens or examples."""

  count: int  # N
  logit: float  # largest difference; NaN if a logit is not finite
  kl_mean: float | None  # nats; None for a regression
  kl_most: float | None  # nats; None for a regression
  changed: int | None  # number of changed top-1 predictions; None for a regression
  loss: tuple[float, float]  # of the run and of the merged model


def merge_checked(cfg: Config) -> tuple[LoadedRun, dict[str, Any]]:
  """Merges the run of `cfg` and compares the result with the run. Returns the merged run and the comparison as a dict.

  Raises LoraExpError if a logit changes by more than `merge.bound` or is not finite.
  """
  dtype = cfg.merge.dtype or cfg.model.param_dtype
  bound = BOUNDS[dtype] if cfg.merge.bound is None else cfg.merge.bound
  merged, difference = _merge_and_compare(cfg, dtype)
  _show(difference, merged.rounding, dtype, bound, "examples" if is_numeric(cfg.data) else "tokens")
  if not math.isfinite(difference.logit):
    raise LoraExpError(
      f"the model's logits are not finite in {dtype}, so nothing is written; "
      f"use merge.dtype={'bfloat16' if dtype == 'float16' else 'float32'}"
    )
  if difference.logit > bound:
    raise LoraExpError(
      f"merging changes a logit by {difference.logit:.4g}, more than merge.bound={bound:g}, so nothing is written; "
      f"{'use merge.dtype=float32, which rounds less, or ' if dtype != 'float32' else ''}raise merge.bound"
    )
  return merged.run, {"dtype": dtype, "bound": bound, **asdict(difference), **merged.rounding.shares()}


def _merge_and_compare(cfg: Config, dtype: str) -> tuple[MergedRun, OutputDifference]:
  """Runs both models, one after the other, on the same batches."""
  if methods.of(cfg.lora).trains_everything:  # such a run's weights are float32, whatever the dtype of the base
    cfg = replace(cfg, model=replace(cfg.model, param_dtype="float32"))
  # With compute=auto the run might merge its kernels too, and the comparison would be meaningless.
  cfg = replace(cfg, lora=replace(cfg.lora, compute="factored"))

  def measure(run: LoadedRun) -> tuple[list[Batch], ModelOutputs]:
    batches = held_out_batches(run, cfg)
    return batches, model_outputs(run, batches, dtype)

  merged = open_merged(cfg, dtype=dtype, compute_dtype=dtype, measure=measure)
  batches, before = merged.before
  return merged, compare_outputs(before, model_outputs(merged.run, batches, dtype))


def held_out_batches(run: LoadedRun, cfg: Config) -> list[Batch]:
  """Batches with MOST_TOKENS tokens in total, spread over all held-out rows; one row for each batch shard."""
  rows = make_rows(cfg.data, run.plan.tokenizer, cfg.cache)
  return list(eval_batches(rows, run.plan.layout.batch_ways, MOST_TOKENS))


def model_outputs(run: LoadedRun, batches: Sequence[Batch], dtype: str) -> ModelOutputs:
  """The outputs of the run's model, with its frozen arrays in `dtype`, for the tokens that have a weight.

  With a large vocabulary, only the first tokens of each row are used (MOST_LOGITS).
  """
  program, layout = run.job.program, run.plan.layout
  length = max(1, MOST_LOGITS // run.plan.vocab_size // len(batches))
  params, trial = run.single()

  @jax.jit
  def call(params: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    model = assemble(program, params, trial, _cast(frozen, dtype), None)
    z = outputs(model, batch) if "x" in batch else model.logits(features(model, batch)[:, :length])
    return z.astype(jnp.float32)

  z_parts, target_parts = [], []
  with console.progress("compare", len(batches), "batches") as bar:
    for batch in batches:
      with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        z = np.asarray(call(params, run.frozen, layout.put_batch(batch)))
      targets, weights = batch["y" if "x" in batch else "targets"], batch["weights"]
      if "x" not in batch:
        targets, weights = targets[:, :length], weights[:, :length]
      z_parts.append(z[weights > 0])
      target_parts.append(targets[weights > 0])
      bar.advance()
  return ModelOutputs(np.concatenate(z_parts), np.concatenate(target_parts))


def _cast(frozen: Tree, dtype: str) -> Tree:
  """Casts floating-point arrays to `dtype`; quantised kernels stay quantised."""

  def cast(x: Any) -> Any:
    return x if is_quantised(x) or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

  return jax.tree.map(cast, frozen, is_leaf=is_quantised)


def compare_outputs(before: ModelOutputs, after: ModelOutputs) -> OutputDifference:
  """Compares the outputs of two models; probabilities are computed in float64."""
  targets, count = before.targets_N, len(before.targets_N)
  size = max(1, CHUNK // before.z_NV.shape[1])
  chunks = [slice(n, n + size) for n in range(0, count, size)]
  logit = float(np.max([np.abs(after.z_NV[chunk] - before.z_NV[chunk]).max() for chunk in chunks]))
  if not np.issubdtype(targets.dtype, np.integer):
    loss_before, loss_after = (float(np.square(model.z_NV - targets).mean()) for model in (before, after))
    return OutputDifference(count, logit, None, None, None, (loss_before, loss_after))
  kl, losses, changed = [], [], 0
  for chunk in chunks:
    log_p, log_q = _log_softmax(before.z_NV[chunk]), _log_softmax(after.z_NV[chunk])
    kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    index = np.arange(len(log_p)), targets[chunk]
    losses.append(-np.stack([log_p[index], log_q[index]]))
    changed += int((log_p.argmax(-1) != log_q.argmax(-1)).sum())
  kl_N, loss_2N = np.concatenate(kl), np.concatenate(losses, axis=1)
  loss_before, loss_after = loss_2N.mean(axis=1).tolist()
  return OutputDifference(count, logit, float(kl_N.mean()), float(kl_N.max()), changed, (loss_before, loss_after))


def _log_softmax(z_NV: np.ndarray) -> np.ndarray:
  z_NV = z_NV.astype(np.float64)
  z_NV -= z_NV.max(-1, keepdims=True)
  return z_NV - np.log(np.exp(z_NV).sum(-1, keepdims=True))


def _show(difference: OutputDifference, rounding: Rounding, dtype: str, bound: float, unit: str) -> None:
  """Shows the result of the comparison as a table."""
  before, after = difference.loss
  facts = {"largest difference of a logit": f"{difference.logit:.3g} (at most {bound:g} is allowed)"}
  if difference.kl_mean is not None:
    facts["KL divergence"] = f"mean {difference.kl_mean:.2g} nats, maximum {difference.kl_most:.2g}"
  if difference.changed is not None:
    facts[f"{unit} whose top-1 prediction changes"] = f"{difference.changed:,} of {difference.count:,}"
  facts["held-out loss"] = f"{before:.6g} → {after:.6g}"
  shares = rounding.shares()
  if shares["update_kept"] is not None:
    facts["share of the update ΔW in the kernels"] = f"{shares['update_kept']:.2%}"
    facts["rounding error of the update"] = f"{shares['update_error']:.2g} ‖ΔW‖"
  console.show_facts(f"Merged vs unmerged model, {difference.count:,} held-out {unit} in {dtype}", facts)
