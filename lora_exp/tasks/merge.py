"""What a run trained goes into its base's kernels: merged in float32, rounded once, checked on held-out rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp import lora
from lora_exp.config import Config, LoraConfig, LoraExpError
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.records import Batch
from lora_exp.data.rows import make_rows
from lora_exp.lora import methods
from lora_exp.lora.quantization import dense, is_quantised
from lora_exp.runtime import console
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.train.job import make_job
from lora_exp.train.loaded_run import LoadedRun, open_run
from lora_exp.train.step import Tree, assemble, features, outputs
from lora_exp.train.trials import take_trial

# Of a logit's difference. In 16 bits it is what that arithmetic does anyway: SmolLM2's logits (up to 33) change by 1.3
# (bfloat16) and 0.16 (float16) from float32 without any merging, and by 0.84 and 0.13 when it is merged.
BOUNDS = {"float32": 1e-3, "bfloat16": 2.0, "float16": 0.25}
PROBE = 1024  # held-out tokens, or examples, that both models answer
PROBED = 2**26  # logits compared at most, 256 MiB of them in float32
PIECE = 2**22  # logits looked at together


class Rounding(NamedTuple):
  """Sums over the elements of what was merged: how the update W' - W came through the dtype of the kernels.

  Scalar arrays; ΔW is the update in float32, and Δ what is left of it in the kernels, both rounded.
  """

  along: Any = 0.0  # ΔW·Δ
  update: Any = 0.0  # ‖ΔW‖²
  error: Any = 0.0  # ‖Δ - ΔW‖²

  def shares(self) -> dict[str, float | None]:
    """How much of the update is in the kernels, and how large what rounding did is, as shares of ‖ΔW‖."""
    if not self.update:
      return {"update_kept": None, "update_error": None}
    return {"update_kept": float(self.along / self.update), "update_error": math.sqrt(self.error / self.update)}


def merge(run: LoadedRun, dtype: str | None = None) -> tuple[LoadedRun, Rounding]:
  """The run with what it trained in the kernels, in `dtype` (None: each in its own), and no adapter.

  An array at a time is merged and the run's own let go, so that two models are never held; `run` cannot be used again.
  """
  plan, table = run.plan, {row.path: row for row in run.plan.table}
  places = flatten(plan.layout.shardings(plan.base))
  params = flatten(run.params)
  leaves = take_trial(run.params, plan.table, [], run.job.program.method, 0).leaves
  base, sums = _leaf_arrays(run.frozen), Rounding()
  run.params, run.frozen, run.job.frozen = {}, {}, {}

  def one(key_path, like):
    nonlocal sums
    path = dotted(key_path)
    module, _, name = path.rpartition(".")
    whole = path in plan.full
    kept = base.pop(f"{module}.{lora.FROZEN_PREFIX}{name}" if whole else path)
    to = jnp.dtype(dtype or like.dtype)
    if whole:
      new, part = _rounded(kept, params[path][0], to, places[path])
    elif module in table and name in ("kernel", "embedding"):
      new, part = _merged_kernel(
        kept, leaves[module], jnp.float32(table[module].scale), run.job.program.method, to, places[path]
      )
    else:
      return kept.astype(to)
    sums = Rounding(*(a + b for a, b in zip(sums, part, strict=True)))
    return new.block_until_ready()  # only then its base is let go

  with jax.default_matmul_precision("highest"):
    frozen = jax.tree_util.tree_map_with_path(one, plan.base)
  model = replace(plan.cfg.model, param_dtype=dtype or plan.cfg.model.param_dtype)
  cfg = replace(plan.cfg, model=model, lora=LoraConfig(method="frozen"))
  plan = replace(plan, cfg=cfg, table=[], full=[], start=None)
  job = make_job(plan, frozen, 0)
  return LoadedRun(plan, job, job.state.params, job.frozen), sums


@partial(jax.jit, static_argnames=("method", "to", "place"))
def _merged_kernel(w: Any, leaves: methods.Leaves, scale: jax.Array, method: str, to: Any, place: Any):
  wide = dense(w, jnp.float32).astype(jnp.float32)
  return _rounded(wide, methods.get(method).adapted(wide, leaves, scale), to, place)


@partial(jax.jit, static_argnames=("to", "place"))
def _rounded(old: jax.Array, exact: jax.Array, to: Any, place: Any) -> tuple[jax.Array, Rounding]:
  """`exact` in the dtype `to`, and what that does to its difference from `old`."""
  wide = lambda x: x.astype(jnp.float32)
  new = jax.lax.with_sharding_constraint(exact.astype(to), place)
  update, kept = wide(exact) - wide(old), wide(new) - wide(old.astype(to))
  return new, Rounding((update * kept).sum(), (update**2).sum(), ((kept - update) ** 2).sum())


def _leaf_arrays(frozen: Tree) -> dict:
  """Arrays of the base by dotted path; a quantised kernel is one of them."""
  leaves = jax.tree_util.tree_leaves_with_path(frozen, is_leaf=is_quantised)
  return {dotted(path): x for path, x in leaves}


# What merging changes


@dataclass(frozen=True)
class Answers:
  """What a model says of the probe."""

  z_NV: np.ndarray  # logits of the tokens that count, float32; of examples, their outputs
  targets_N: np.ndarray  # a token, a class, or numbers (N, O)


@dataclass(frozen=True)
class Difference:
  """The merged model beside the unmerged one on the same tokens, or examples."""

  count: int
  logit: float  # largest difference; NaN where either is not finite
  kl_mean: float | None  # nats; of numbers None
  kl_most: float | None
  changed: int | None  # whose likeliest next token is another; of a regression None
  loss: tuple[float, float]  # unmerged, merged


def checked(cfg: Config) -> tuple[LoadedRun, dict[str, Any]]:
  """The run of `cfg` merged, and what the check found: both models answer in the dtype that is written.

  Raises LoraExpError if a logit differs by more than `merge.bound`.
  """
  dtype = cfg.merge.dtype or cfg.model.param_dtype
  bound = BOUNDS[dtype] if cfg.merge.bound is None else cfg.merge.bound
  if methods.of(cfg.lora).trains_everything:  # its own file is float32, whatever the base's dtype is
    cfg = replace(cfg, model=replace(cfg.model, param_dtype="float32"))
  # With compute=auto the unmerged model might merge too, and nothing would be compared.
  run = open_run(replace(cfg, lora=replace(cfg.lora, compute="factored")), dtype=dtype)
  batches = probe(run, cfg)
  with console.progress("merge and compare", 2 * len(batches), "batches") as bar:
    before = answers(run, batches, dtype, bar.advance)
    run, rounding = merge(run, dtype)
    found = compare(before, answers(run, batches, dtype, bar.advance))
  _show(found, rounding, dtype, bound, "examples" if cfg.data.numbers else "tokens")
  if not math.isfinite(found.logit):
    raise LoraExpError(
      f"in {dtype} the model's logits are not finite, merged or before, and nothing is written; "
      f"use merge.dtype={'bfloat16' if dtype == 'float16' else 'float32'}"
    )
  if found.logit > bound:
    raise LoraExpError(
      f"merging changes a logit by {found.logit:.4g}, more than {bound:g}, and nothing is written; "
      f"{'merge.dtype=float32 rounds less, and ' if dtype != 'float32' else ''}merge.bound= sets what is allowed"
    )
  return run, {"dtype": dtype, "bound": bound, **asdict(found), **rounding.shares()}


def probe(run: LoadedRun, cfg: Config) -> list[Batch]:
  """Held-out rows, spread over all of them; a row for each batch shard at a time."""
  rows = make_rows(cfg.data, run.plan.tokenizer, cfg.cache)
  return list(eval_batches(rows, run.plan.layout.batch_ways, PROBE))


def answers(
  run: LoadedRun, batches: Sequence[Batch], dtype: str, done: Callable[[], object] = lambda: None
) -> Answers:
  """What the model of `run`, its arrays in `dtype`, says of the tokens of `batches` that count.

  Of the first tokens of each row alone, where the vocabulary is large.
  """
  program, layout = run.job.program, run.plan.layout
  most = max(1, PROBED // run.plan.vocab_size // len(batches))
  params, trial = jax.tree.map(lambda x: x[0], (run.params, run.job.trials))
  served = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  @jax.jit
  def call(params: Tree, frozen: Tree, part: dict[str, jax.Array]) -> jax.Array:
    whole = jax.tree.map(lambda x: x if is_quantised(x) else served(x), frozen, is_leaf=is_quantised)
    model = assemble(program, params, trial, whole, None)
    z = outputs(model, part) if "x" in part else model.logits(features(model, part)[:, :most])
    return z.astype(jnp.float32)

  found, targets = [], []
  for batch in batches:
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
      z = np.asarray(call(params, run.frozen, layout.put_batch(batch)))
    target, weights = batch["y" if "x" in batch else "targets"], batch["weights"]
    if "x" not in batch:
      target, weights = target[:, :most], weights[:, :most]
    found.append(z[weights > 0])
    targets.append(target[weights > 0])
    done()
  return Answers(np.concatenate(found), np.concatenate(targets))


def compare(before: Answers, after: Answers) -> Difference:
  """How far `after` is from `before`, in float64 where it counts."""
  targets = before.targets_N
  size = max(1, PIECE // before.z_NV.shape[1])
  parts = [slice(n, n + size) for n in range(0, len(targets), size)]
  logit = float(np.max([np.abs(after.z_NV[part] - before.z_NV[part]).max() for part in parts]))
  if not np.issubdtype(targets.dtype, np.integer):
    one, other = (float(np.square(found.z_NV - targets).mean()) for found in (before, after))
    return Difference(len(targets), logit, None, None, None, (one, other))
  kl, losses, changed = [], [], 0
  for part in parts:
    p, q = _log_softmax(before.z_NV[part]), _log_softmax(after.z_NV[part])
    kl.append((np.exp(p) * (p - q)).sum(-1))
    at = np.arange(len(p)), targets[part]
    losses.append(-np.stack([p[at], q[at]]))
    changed += int((p.argmax(-1) != q.argmax(-1)).sum())
  nats, (one, other) = np.concatenate(kl), np.concatenate(losses, axis=1).mean(axis=1).tolist()
  return Difference(len(targets), logit, float(nats.mean()), float(nats.max()), changed, (one, other))


def _log_softmax(z_NV: np.ndarray) -> np.ndarray:
  z_NV = z_NV.astype(np.float64)
  z_NV -= z_NV.max(-1, keepdims=True)
  return z_NV - np.log(np.exp(z_NV).sum(-1, keepdims=True))


def _show(found: Difference, rounding: Rounding, dtype: str, bound: float, unit: str) -> None:
  arrow = lambda values: f"{values[0]:.6g} → {values[1]:.6g}"
  facts = {"largest difference of a logit": f"{found.logit:.3g}, at most {bound:g} allowed"}
  if found.kl_mean is not None:
    facts["KL divergence"] = f"{found.kl_mean:.2g} nats on average, at most {found.kl_most:.2g}"
  if found.changed is not None:
    facts[f"{unit} whose likeliest answer changes"] = f"{found.changed:,} of {found.count:,}"
  facts["held-out loss"] = arrow(found.loss)
  if (shares := rounding.shares())["update_kept"] is not None:
    facts["of the update ‖ΔW‖ in the kernels"] = f"{shares['update_kept']:.2%}"
    facts["and what rounding adds to it"] = f"{shares['update_error']:.2g} ‖ΔW‖"
  console.show_facts(f"Merged beside unmerged, {found.count:,} held-out {unit} in {dtype}", facts)


def run(cfg: Config) -> object:
  """`task=merge`: writes the merged model, as `task=export format=merged` does."""
  from lora_exp.tasks import export

  return export.run(cfg)
