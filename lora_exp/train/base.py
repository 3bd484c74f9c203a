"""The frozen base model: random, loaded from weights, or pretrained once and cached by the hash of its settings."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lora_exp.config import Config, InputError, LoraConfig, OptimConfig, StoppedError
from lora_exp.config.conversion import shown
from lora_exp.data.ngram import bigram_loss
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows, make_rows
from lora_exp.lora import BaseChanges
from lora_exp.lora.peft_files.adapter_files import read_config_json
from lora_exp.models.factory import build_model
from lora_exp.models.registry import get_family
from lora_exp.models.weights import store
from lora_exp.models.weights.locate import find_weights
from lora_exp.runtime import cache, console
from lora_exp.runtime.host_arrays import put_equal
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.runtime.process_group import first_process_first
from lora_exp.train.compiled_step import compile_step
from lora_exp.train.compute.program import Tree
from lora_exp.train.evaluating.evaluation import held_out, put_eval_batches
from lora_exp.train.job import make_job
from lora_exp.train.loop import NO_HOOKS, Cadence, train_loop
from lora_exp.train.plan import Plan

FORMAT = 1  # part of the cache key; increase it when the same settings train a different base
IRRELEVANT = ("base", "weights", "dropout", "remat", "adapter_lr")  # model settings without effect on its weights
FACTS = "base.json"  # in the cache directory: losses, tokens and seconds of pretraining
OF_ADAPTER = ("exclude", "layers", "rank_pattern", "alpha_pattern", "bias", "train_modules")  # set by lora.init_from
HELD_OUT = 65_536  # tokens on which a pretrained base is evaluated


def make_base(plan: Plan) -> tuple[Tree, dict]:
  """(base, facts): all parameters on the mesh, and the base's kind and source, with its losses if it is pretrained.

  If the plan's adapter needs a head, biases or vocabulary rows that the base lacks, they are added.
  """
  given = plan.before_changes()
  _show_changes(plan, given.vocab_size)
  base, facts = _given_base(given)
  return (base if given is plan else _completed_base(plan, base)), facts


def check_base(plan: Plan) -> None:
  """Raises InputError if the base is loaded from a checkpoint that lacks a parameter; reads no values."""
  given = plan.before_changes()
  cfg = given.cfg
  if cfg.model.base == "weights":
    shapes = {path: tuple(x.shape) for path, x in given.shapes.items()}
    names = get_family(cfg.model.family).stored_names(cfg.model)
    store.open_checked(find_weights(str(cfg.model.weights)), shapes, names, cfg.cache)


def _given_base(plan: Plan) -> tuple[Tree, dict]:
  """`make_base` for a base without changes."""
  cfg = plan.cfg
  if cfg.model.base == "random":
    return random_base(plan), {"kind": "random", "seed": cfg.model.seed}
  if cfg.model.base == "weights":
    source = find_weights(str(cfg.model.weights))
    facts = {"kind": "weights", "source": cfg.model.weights, "digest": store.file_digest(source)}
    return loaded_base(plan, source), facts
  directory = pretrained(plan)
  return loaded_base(plan, directory), {"kind": "pretrain", **json.loads((directory / FACTS).read_text())}


def _show_changes(plan: Plan, vocab_size: int) -> None:
  """Shows how the adapter in `lora.init_from` changes the base, whose vocabulary has `vocab_size` tokens.

  Before training, it warns about what the file contains and training does not change, and about settings of `lora` that
  have no effect.
  """
  if plan.start is None:
    return
  changes, name = plan.start.base, f"lora.init_from={plan.cfg.lora.init_from}"
  if plan.cfg.run is None and plan.cfg.task in ("train", "evaluate"):
    _show_origin(plan, name)
  if changes.vocab_size:
    console.show(f"{name}: its vocabulary has {changes.vocab_size:,} tokens and that of the base {vocab_size:,}; the "
                 "new rows are added to the base")
  if plan.cfg.task != "train":
    return
  if changes.paths():
    console.show_warning(f"{name}: {_untrained(changes)} are used as the file has them, and are not trained further")
  ignored = [field for field in OF_ADAPTER if getattr(plan.cfg.lora, field) != getattr(LoraConfig(), field)]
  if ignored:
    given = ", ".join(f"lora.{field}={shown(getattr(plan.cfg.lora, field))}" for field in ignored)
    console.show_warning(f"{name}: the adapter sets its modules, ranks and alphas; {given} has no effect")


def _show_origin(plan: Plan, name: str) -> None:
  """Shows the base that the adapter was trained on, if its file names another than model.weights."""
  trained_on = read_config_json(Path(str(plan.cfg.lora.init_from))).get("base_model_name_or_path")
  here = plan.cfg.model.weights if plan.cfg.model.base == "weights" else f"model.base={plan.cfg.model.base}"
  if isinstance(trained_on, str) and trained_on and Path(trained_on) != Path(str(here)):
    console.show(f"{name}: it was trained on {trained_on}, and is applied to {here}")


def _untrained(changes: BaseChanges) -> str:
  """What the adapter's file contains besides trained arrays, with counts."""
  groups = []
  if changes.parameters:
    values = sum(np.size(x) for x in changes.parameters.values())
    groups.append(f"{_counted(len(changes.parameters), 'parameter')} of the base ({next(iter(changes.parameters))}"
                  f"{', …' if len(changes.parameters) > 1 else ''}; {values:,} values)")
  for path, (ids, rows) in changes.token_rows.items():
    groups.append(f"{_counted(len(ids), 'token row')} of {path} ({np.size(rows):,} values)")
  if changes.biases:
    values = sum(np.size(x) for x in changes.biases.values())
    groups.append(f"{_counted(len(changes.biases), 'output bias', 'output biases')} ({values:,} values)")
  return " and ".join(groups)


def _counted(count: int, noun: str, plural: str = "") -> str:
  """The count and the noun: "1 token row", "3 token rows"."""
  return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def _completed_base(plan: Plan, given: Tree) -> Tree:
  """`given` with the parameters that the plan adds: a head (the transposed embedding table), new rows, biases."""
  assert plan.start is not None
  arrays, new_values = flatten(given), {**plan.start.full, **plan.start.base.parameters}
  naming = plan.naming()
  if naming is not None:
    table, head = f"{naming.tables[0]}.embedding", f"{naming.bare[0]}.kernel"
    if head in plan.shapes and head not in arrays:
      arrays[head] = arrays[table].T
      new_values.setdefault(head, np.asarray(new_values[table]).T if table in new_values else None)
  for path in plan.new_biases:
    arrays[f"{path}.bias"] = jnp.zeros(plan.shapes[f"{path}.bias"].shape, plan.shapes[f"{path}.bias"].dtype)

  def completed(key_path: Sequence[Any], shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """One parameter of the plan. Its new rows have the values in the adapter's file."""
    path = dotted(key_path)
    x = arrays[path]
    if x.shape != shape.shape:
      x = jnp.asarray(new_values[path], x.dtype).at[tuple(slice(size) for size in x.shape)].set(x)
    return put_equal(x, sharding)

  return jax.tree_util.tree_map_with_path(completed, plan.base, plan.layout.shardings(plan.base))


def random_base(plan: Plan) -> Tree:
  """Random weights from `model.seed`, created with their shardings; bit-equal on every mesh."""

  def make() -> Tree:
    return nnx.to_pure_dict(nnx.state(build_model(plan.cfg.model, plan.vocab_size), nnx.Param))

  with console.phase("make the random base"):
    return jax.block_until_ready(jax.jit(make, out_shardings=plan.layout.shardings(plan.base))())


def loaded_base(plan: Plan, source: Path) -> Tree:
  """Weights from `source`, each read directly into its shards."""
  cfg = plan.cfg
  shardings, names = plan.layout.shardings(plan.base), get_family(cfg.model.family).stored_names(cfg.model)
  return store.load(source, plan.base, shardings, names, cfg.cache)


def pretrained(plan: Plan) -> Path:
  """The cache directory of the pretrained base. Trains the base if it is not cached."""
  cfg = plan.cfg
  pretraining = pretrain_config(cfg)
  with first_process_first():
    rows = make_rows(pretraining.data, plan.tokenizer, cfg.cache)
  model = {k: v for k, v in asdict(cfg.model).items() if k not in IRRELEVANT}
  if cfg.model.pretrain.optimizer == "adamw":  # the only optimizer of earlier versions, whose keys did not contain it
    del model["pretrain"]["optimizer"]
  order = {"seed": pretraining.data.seed, "shuffle": pretraining.data.shuffle}
  key = cache.fingerprint(format=FORMAT, model=model, rows=rows.fingerprint, order=order)
  # With several processes, the first one makes it on its own device, and the others wait for the file.
  layout = plan.layout.local if plan.layout.several_processes else plan.layout
  pretrain_plan = replace(plan, cfg=pretraining, layout=layout, table=[], full=[], start=None)
  with first_process_first():
    return cache.get_or_make(cfg.cache, "base", key, partial(_pretrain, pretrain_plan, rows))


def pretrain_config(cfg: Config) -> Config:
  """The config of pretraining: all parameters train on `pretrain_data` with the settings in `model.pretrain`."""
  p, data = cfg.model.pretrain, cfg.pretrain_data
  if data is None:
    raise InputError("model.base=pretrain needs pretrain_data: choose data@pretrain_data=stdlib_code, or another base")
  return replace(
    cfg,
    model=replace(cfg.model, dropout=p.dropout),
    data=data,
    lora=LoraConfig(method="full"),
    optim=OptimConfig(
      name=p.optimizer, lr=p.lr, warmup=p.warmup, weight_decay=p.weight_decay, clip=p.clip, betas=[0.9, 0.95],
      schedule="cosine",
    ),  # fmt: skip
    train=replace(cfg.train, steps=p.steps, epochs=None, batch_size=p.batch_size, seed=cfg.model.seed, stop_at=None),
  )


def _pretrain(plan: Plan, rows: Rows, directory: Path) -> None:
  """Trains the base and writes its weights and base.json into `directory`."""
  cfg, start = plan.cfg, time.monotonic()
  job = make_job(plan, random_base(plan), cfg.model.pretrain.steps)
  console.show("Pretraining the base. Later runs load it from the cache.")
  batches = train_batches(rows, cfg.data, cfg.train.batch_size)
  try:
    step = compile_step(job, plan.layout.put_batch(next(batches)))
    batches.close()
    batches = train_batches(rows, cfg.data, cfg.train.batch_size)
    state = train_loop(step, batches, Cadence(0, 0, 0), NO_HOOKS, "pretrain the base")
  except StoppedError:
    raise StoppedError("stopped during pretraining of the base, which is not saved; start the command again") from None
  finally:
    batches.close()
  batches_on_devices = put_eval_batches(eval_batches(rows, cfg.train.batch_size, HELD_OUT), plan.layout.put_batch)
  [evaluation] = held_out(job.evaluate, state.params, job.trials, job.frozen, batches_on_devices)
  scores = evaluation.row()
  store.save(directory, jax.tree.map(_first_trial, state.params, plan.base))
  facts = {
    "steps": job.steps,
    "tokens": job.steps * cfg.train.batch_size * cfg.data.seq_len,
    "seconds": round(time.monotonic() - start, 1),
    "loss": scores["loss"],
    "bigram_loss": bigram_loss(rows) if rows.vocab_size else None,
    "nats_per_byte": scores["loss"] * rows.eval_tokens / rows.eval_bytes if rows.eval_bytes else None,
    "held_out_tokens": scores["counted"],
    "data": rows.fingerprint,
  }
  (directory / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def _first_trial(x: jax.Array, template: jax.ShapeDtypeStruct) -> np.ndarray:
  """Element 0 of the axis of trials, in the dtype of `template`."""
  return np.asarray(x[0]).astype(template.dtype)
