"""SmolLM2 in a pack: each trial has the gradients and the losses of its solo run, and PEFT loads it at its own rank."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packs import rows as batch_of
from runs import QUIET, on_stories, rows, train
from transformers_models import exported, run_logits, their_logits

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.train.base import make_base
from lora_exp.train.compute.step import gradient, over_trials
from lora_exp.train.job import make_job
from lora_exp.train.plan import make_plan

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("smollm2_package")]

SETTINGS = ["model=smollm2_135m", *QUIET, "data.seq_len=32", "train.batch_size=2", "train.steps=6", "optim.warmup=2",
            "train.eval_every=0", "train.save_every=0", "train.export=last", "train.eval_tokens=64",
            "train.log_every=1"]  # fmt: skip
RANKS, TARGETS = (2, 5), ("qv", "all_linear")
TRIALS = [(rank, targets) for rank in RANKS for targets in TARGETS]
SOLO = (1, 2)  # the trials that are run alone too: each rank and each choice of targets once


def settings_of(trial: int) -> list[str]:
  rank, targets = TRIALS[trial]
  return [f"lora.rank={rank}", f"lora.targets={targets}"]


def base_and_plans(data: list[str]):
  plans = [make_plan(check_command_line([*SETTINGS, *data, *settings_of(n)]).jobs[0]) for n in range(len(TRIALS))]
  return make_base(plans[0])[0], plans


def moved(params):
  """`params` with every row of B that a trial has moved off zero, so that A has a gradient too."""
  leaves = flatten(params)

  def move(path, x):
    if not (name := dotted(path)).endswith("lora_b"):
      return x
    has_NR = np.asarray(leaves[name.removesuffix("b") + "a"]).any(1)
    return jnp.where(has_NR[..., None], jnp.float32(1e-3), x)

  return jax.tree_util.tree_map_with_path(move, params)


def first_gradients(base, plans) -> list[dict[str, np.ndarray]]:
  """For each trial, every leaf of the gradient near the adapter that it starts from."""
  job = make_job(plans[0], base, 20, plans)
  batch = job.program.layout.put_batch(batch_of(7, batch=2, length=32, vocab=49_152))
  one = lambda trial, own, frozen, batch, key: gradient(job.program, own, trial, frozen, batch, key)[0]
  every = lambda params, trials, *rest: over_trials(lambda a, p: one(a, p, *rest), job.program.mapping, trials, params)
  found = flatten(jax.jit(every)(moved(job.state.params), job.trials, job.frozen, batch, job.keys[0]))
  return [{path: np.asarray(x[n]) for path, x in found.items()} for n in range(len(plans))]


def test_first_gradients_equal_those_of_solo_runs(tmp_path):
  """Thirty layers make 1e-4 of the last bit: the loop over trials and the solo step must call one compiled function."""
  base, plans = base_and_plans(on_stories(tmp_path))
  packed, alone = first_gradients(base, plans), {n: first_gradients(base, [plans[n]])[0] for n in SOLO}
  for n, leaves in alone.items():
    assert len(leaves) == 2 * len(plans[n].table)
    for path, g in leaves.items():
      own = packed[n][path][tuple(slice(s) for s in g.shape)]
      assert np.abs(g).max() > 0, path
      assert np.abs(own - g).max() <= 1e-5 * np.abs(g).max(), f"trial {n}: {path}"


def test_losses_are_those_of_solo_runs_and_peft_loads_every_rank(tmp_path):
  data = on_stories(tmp_path)
  lists = [f"lora.rank={','.join(map(str, RANKS))}", f"lora.targets={','.join(TARGETS)}"]
  sweep = tmp_path / "sweep"
  assert entry.run(["-m", "hydra/launcher=packed", f"hydra.sweep.dir={sweep}", *SETTINGS, *data, *lists]) == 0
  packs = [json.loads(line) for line in (sweep / "sweep.jsonl").read_text().splitlines() if '"pack"' in line]
  assert [sorted(row["trials"]) for row in packs] == [[0, 1, 2, 3]], "the trials were not trained as one program"
  losses = lambda run: [row["loss"] for row in rows(run, "train")]
  for n in SOLO:
    alone = train(tmp_path / f"alone{n}", *SETTINGS, *data, *settings_of(n))
    assert len(losses(alone)) == 6
    np.testing.assert_allclose(losses(sweep / str(n)), losses(alone), rtol=1e-4)
  base = exported(sweep / "0", "task=export", "format=base", out="base")
  tokens = np.random.default_rng(0).integers(0, 49_152, (1, 24), dtype=np.int32)
  for n, (rank, _) in enumerate(TRIALS):
    adapted = their_adapted(base, sweep / str(n))
    assert {x.shape[0] for name, x in adapted.named_parameters() if "lora_A" in name} == {rank}
    want = run_logits(sweep / str(n), tokens)  # of 16 at the most
    np.testing.assert_allclose(their_logits(adapted, tokens), want, atol=1e-3, rtol=0)


def their_adapted(base: Path, run: Path):
  """PEFT's model of the adapter in `run`, which must fill every tensor that PEFT expects."""
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
  adapted = peft.PeftModel.from_pretrained(model, exported(run, "task=export", out="peft")).eval()
  assert all(x.abs().max() > 0 for name, x in adapted.named_parameters() if "lora_B" in name)
  return adapted
