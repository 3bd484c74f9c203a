"""A teacher with a known answer: its parameters, the loss of its students, and that the report finds the answer."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packs import bent, job_of, quickly, rows, small, trial
from runs import QUIET, on_stories, resume, summary, train
from runs import rows as lines

from lora_exp.cli import main as entry
from lora_exp.config import ArchConfig, TeacherConfig
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.train.compiled_step import compile_step
from lora_exp.train.compute.loss import TeacherTargets, head_loss
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.step import gradient, outputs
from lora_exp.train.compute.vocabulary_head import Head
from lora_exp.train.evaluating.evaluation import held_out, put_eval_batches

TEACHER = TeacherConfig(rank=3, targets="attention", strength=0.5)


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


def config(**more):
  return small(**{"data__teacher": TEACHER, **more})


def taught(job) -> dict:
  """The parameters of the teacher by dotted path, as a plain model."""
  return flatten(job.teacher.params)


def test_the_teacher_differs_from_the_base_on_its_targets_only():
  job = job_of(config())
  base, teacher = flatten(job.frozen), taught(job)
  moved = {path for path, w in teacher.items() if not np.array_equal(w, base[path])}
  assert moved == {f"blocks.{n}.mha.{name}.kernel" for n in (0, 1) for name in ("query", "key", "value", "out")}
  for path in moved:
    sizes = np.linalg.svd(np.asarray(teacher[path] - base[path], np.float64), compute_uv=False)
    np.testing.assert_allclose(sizes[:3], 0.5 * np.linalg.norm(base[path]) / np.sqrt(3), rtol=1e-4)
    assert sizes[3] < 1e-5 * sizes[0]


def test_equal_seeds_make_equal_teachers_and_others_others():
  one, same, other = (job_of(config(data__teacher=replace(TEACHER, seed=seed))) for seed in (0, 0, 1))
  name = "blocks.0.mha.key.kernel"
  np.testing.assert_array_equal(taught(one)[name], taught(same)[name])
  assert np.abs(taught(one)[name] - taught(other)[name]).max() > 0.01


HEADS = {
  "plain": {}, "adapted": {"lora__targets": ["all_linear", "head"]}, "full": {"lora__method": "full"},
  "tied, capped": {
    "model__family": "llama", "model__arch": ArchConfig(kv_heads=2, head_dim=8, logit_softcap=5.0),
    "lora__targets": ["all_linear", "embeddings"],
  },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_equal_the_explicit_divergence(head):
  job = job_of(config(model__dropout=0.0, **HEADS[head]))
  batch = job.put(rows())
  params, numbers = trial(bent(job.state.params), 0), trial(job.trials, 0)
  say = jax.jit(lambda params: outputs(assemble(job.program, params, numbers, job.frozen, None), rows()))
  teacher = jax.jit(lambda: outputs(job.teacher.model(job.teacher.params), rows()))()

  def divergence(params):
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(say(params))
    return ((jnp.exp(log_p) * (log_p - log_q)).sum(-1) * batch["weights"]).sum() / batch["weights"].sum()

  expected, wanted = jax.jit(jax.value_and_grad(divergence))(params)
  found = jax.jit(lambda params, batch: gradient(job.program, params, numbers, job.frozen, batch, job.keys[0]))
  grads, sums, tokens = found(params, batch)
  assert float(expected) > 1e-3 and float(sums.loss / tokens) == pytest.approx(float(expected), rel=1e-5)
  agree = (say(params).argmax(-1) == teacher.argmax(-1)) * batch["weights"]
  assert float(sums.correct) == float(agree.sum())
  for path, g in flatten(wanted).items():
    assert np.abs(np.asarray(flatten(grads)[path] - g)).max() <= 1e-5 * np.abs(g).max() + 1e-9, path


def test_the_divergence_is_the_same_in_one_chunk_and_in_many(monkeypatch):
  keys = jax.random.split(jax.random.key(0), 4)
  module = nnx.Linear(12, 37, rngs=nnx.Rngs(0))
  x, said = (jax.random.normal(key, (3, 8, 12)) for key in keys[:2])
  targets = TeacherTargets(said, Head(jax.random.normal(keys[2], (12, 37)), jax.random.normal(keys[3], (37,))))
  weights = jnp.ones((3, 8)).at[1, 5:].set(0)
  loss = lambda x: head_loss(module, x, targets, weights).loss
  whole = jax.value_and_grad(loss)(x)
  monkeypatch.setattr("lora_exp.train.compute.loss.CHUNK_LOGITS", 3 * 37 * 2)
  for found, wanted in zip(jax.value_and_grad(loss)(x), whole, strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(whole[1][1, 5:], 0)


@pytest.mark.slow
def test_a_student_equal_to_the_teacher_has_zero_loss():
  """A and B of ΔW itself, cut to ranks 3 and 2; nothing is dropped although the base has dropout."""
  losses = {}
  for rank in (3, 2):
    job = job_of(config(lora__targets="attention", lora__rank=rank, lora__alpha=float(rank)))
    base, teacher, params = flatten(job.frozen), taught(job), dict(flatten(job.state.params))
    for path in {p.rpartition(".")[0] for p in params}:
      u, s, v = np.linalg.svd(np.asarray(teacher[f"{path}.kernel"] - base[f"{path}.kernel"]), full_matrices=False)
      params[f"{path}.lora_a"] = jnp.asarray(u[:, :rank] * s[:rank])[None]
      params[f"{path}.lora_b"] = jnp.asarray(v[:rank])[None]
    tree = jax.tree_util.tree_map_with_path(lambda p, x, params=params: params[dotted(p)],
                                            job.state.params)
    [evaluation] = held_out(job.evaluate, tree, job.trials, job.frozen, put_eval_batches([rows()], job.put))
    scores = evaluation.metrics
    step = compile_step(job, job.put(rows()))
    _, metrics = step(job.state._replace(params=tree), job.put(rows()))
    assert float(metrics["loss"][0]) == pytest.approx(scores["loss"], rel=1e-4, abs=1e-7)
    losses[rank] = scores["loss"]
  assert losses[3] < 1e-6 < 1e-3 < losses[2]


def test_parts_of_a_batch_add_up():
  jobs = [job_of(config(model__dropout=0.0, optim__accumulate=parts)) for parts in (1, 2)]

  def of(j):
    one = lambda params, batch: gradient(j.program, params, trial(j.trials, 0), j.frozen, batch, j.keys[0])[0]
    return jax.jit(one)(trial(bent(j.state.params), 0), j.put(rows()))

  one, two = map(of, jobs)
  for path, g in flatten(one).items():
    assert np.abs(np.asarray(flatten(two)[path] - g)).max() <= 1e-5 * np.abs(g).max(), path


PLANTED = ["data=planted", "data.source=text", "data.view=null", "model=minigpt_tiny", "model.base=random", *QUIET]


def planted(directory) -> list[str]:
  return [*PLANTED, *on_stories(directory)[1:]]


@pytest.mark.slow
def test_a_taught_run_prints_its_teacher_and_resumes_bit_equal(tmp_path, capsys):
  typed = [*planted(tmp_path), "train.steps=6", "train.batch_size=4", "train.eval_every=3", "train.save_every=3"]
  whole = train(tmp_path / "whole", *typed)
  said = capsys.readouterr().out
  assert "held-out KL from the teacher, base" in said and "perplexity" not in said
  assert summary(whole)["perplexity"] is None and summary(whole)["losses"]["base"] > 1e-3
  halted = train(tmp_path / "halted", *typed, "train.stop_at=3", code=75)
  resume(halted)
  losses = lambda run: [row["loss"] for row in lines(run)]
  assert losses(halted) == losses(whole)


BAD = {
  "the head": (["data.teacher.targets=head"], "output_layer is the head"),
  "nothing": (["data.teacher.targets=atention"], "nearest: attention"),
  "too high a rank": (["data.teacher.rank=65"], "data.teacher.rank=65"),
  "no rank": (["data.teacher.rank=0"], "data.teacher.rank=0: must be at least 1"),
  "no strength": (["data.teacher.strength=0"], "must be above 0"),
  "what is retained": (["data@retain=planted"], "only the training data has a teacher"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_teacher_that_cannot_be_is_refused_in_a_sentence(bad, tmp_path, capsys):
  typed, words = BAD[bad]
  common = [part for part in planted(tmp_path) if not any(t.startswith("data@retain") and part == "data@retain=none"
                                                          for t in typed)]
  train(tmp_path / "run", *common, *typed, code=2)
  assert words in " ".join(capsys.readouterr().err.split())
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_report_finds_the_planted_rank_and_targets(tmp_path):
  """A sweep of ranks names the teacher's rank, and at that rank a sweep of targets names its targets."""
  common = ["-m", "hydra/launcher=packed", "data=planted", "data.teacher.rank=4", "model=minigpt_tiny", "seed=0,1,2",
            "train.eval_every=64"]
  sweeps = {"ranks": "lora.rank=2,4,8", "targets": "lora.targets=qv,attention,mlp,all_linear"}
  reports = {}
  for name, swept in sweeps.items():
    directory = tmp_path / name
    assert entry.run([*common, swept, *QUIET, f"hydra.sweep.dir={directory}"]) == 0
    reports[name] = (directory / "report.md").read_text()
  assert "Rank 4 is enough" in reports["ranks"], reports["ranks"]
  assert "It pays to adapt attention" in reports["targets"], reports["targets"]
  assert json.loads((tmp_path / "targets" / "0" / "summary.json").read_text())["losses"]["base"] > 0
