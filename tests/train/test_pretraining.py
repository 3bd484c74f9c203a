"""Pretraining of the base: which parameters Muon trains, and the recipe as a part of the cache key."""

from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from lora_exp.cli.python_api import compose
from lora_exp.config import Config
from lora_exp.data.pipeline import train_batches
from lora_exp.data.rows import make_rows
from lora_exp.runtime import cache
from lora_exp.runtime.mesh import flatten
from lora_exp.train.base import pretrain_config, pretrained, random_base
from lora_exp.train.compiled_step import compile_step
from lora_exp.train.job import make_job
from lora_exp.train.plan import make_plan

MLP = ["model=mlp", "data=xor", "data@retain=none", "data@pretrain_data=xor", "model.base=pretrain", "logger=none",
       "model.pretrain.steps=2", "model.pretrain.warmup=0"]  # fmt: skip


def config(*overrides: str, cache: object) -> Config:
  return replace(compose(overrides), cache=str(cache))


def test_muon_trains_hidden_matrices_and_adamw_the_rest(tmp_path):
  """The first update of Muon has equal singular values, and that of AdamW equal sizes."""
  (tmp_path / "text.txt").write_text("Sphinx of black quartz, judge my vow. " * 100)
  text = ["data@pretrain_data=text", f"pretrain_data.path={tmp_path}/text.txt", "pretrain_data.seq_len=64"]
  rate = 1e-3
  recipe = ["optimizer=muon", f"lr={rate}", "warmup=0", "weight_decay=0", "clip=1e9"]
  cfg = config("model=minigpt_tiny", "model.layers=1", "model.base=pretrain", "logger=none", "data@retain=none", *text,
               *(f"model.pretrain.{setting}" for setting in recipe), cache=tmp_path)  # fmt: skip
  pretraining = pretrain_config(cfg)
  plan = replace(make_plan(cfg), cfg=pretraining, table=[], full=[])
  batches = train_batches(make_rows(pretraining.data, plan.tokenizer, cfg.cache), pretraining.data, 8)
  job = make_job(plan, random_base(plan), 100)
  batch = plan.layout.put_batch(next(batches))
  batches.close()
  before = jax.device_get(flatten(job.state.params))
  state, _ = compile_step(job, batch)(job.state, batch)
  changes = {path: (x - before[path])[0] / rate for path, x in jax.device_get(flatten(state.params)).items()}
  hidden = {path for path in changes if path.startswith("blocks") and path.endswith("kernel")}
  assert len(hidden) == 6
  for path, change in changes.items():
    if path in hidden:
      singular = np.linalg.svd(change, compute_uv=False) / (0.2 * 64**0.5)  # the scale of arXiv 2502.16982
      assert 0.6 < np.median(singular) < 1.2 and singular.max() < 1.3, path
    else:
      moved = np.abs(change[np.abs(change) > 0.5])  # tokens that do not occur have no gradient
      if not path.endswith("key.bias"):  # attention does not depend on it
        assert np.median(moved) == pytest.approx(1 + 0.9 / 1.9, rel=1e-3), path  # with Nesterov's momentum


def test_the_recipe_is_part_of_the_key_of_a_base(tmp_path):
  """A base that an earlier version made with AdamW, whose settings did not name an optimizer, is found again."""
  directories = {}
  for optimizer in ("adamw", "muon"):
    cfg = config(*MLP, f"model.pretrain.optimizer={optimizer}", cache=tmp_path)
    directories[optimizer] = pretrained(make_plan(cfg))
  model = {name: x for name, x in asdict(compose(MLP).model).items()
           if name not in ("base", "weights", "dropout", "remat", "adapter_lr")}  # fmt: skip
  del model["pretrain"]["optimizer"]
  rows = make_rows(compose(MLP).pretrain_data, make_plan(compose(MLP)).tokenizer, str(tmp_path))
  order = {"seed": 0, "shuffle": compose(MLP).pretrain_data.shuffle}
  assert directories["adamw"].name == cache.fingerprint(format=1, model=model, rows=rows.fingerprint, order=order)[:32]
  assert directories["muon"] != directories["adamw"]
