"""Eight virtual devices: every mesh trains as one device does, and says which array lies where."""

import json
import math
import re
from functools import cache

import pytest
from runs import script_output

MESHES = {
  "one": {"data": 1},
  "data": {"data": 8},
  "tutorial": {"data": 4, "tensor": 2},
  "fsdp": {"data": 1, "fsdp": 4, "tensor": 2},
  "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
SETTINGS = {
  "optim__lr": 1e-3,
  "lora__dropout": 0.1,
  "lora__rank": 4,
  "lora__targets": ["all_linear", "head"],
  "model__dropout": 0.1,
  "model__layers": 2,
  "model__vocab_size": 264,
  "train__batch_size": 8,
}
BATCH = {"batch": 8, "length": 14}  # so that no activation has the shape of a parameter


TRAIN = """
import json, sys
from packs import Training, job_of, quickly, small
from lora_exp.runtime.mesh import flatten
meshes, settings, shape = json.loads(sys.argv[1])
def result(mesh):
  job = job_of(small(**settings, **{f"mesh__{k}": v for k, v in mesh.items()}))
  with quickly():
    training = Training(job, **shape)
    losses = training.run(20)[:, 0].tolist()
  where = lambda tree: {path: [list(x.sharding.spec), list(x.shape)] for path, x in flatten(tree).items()}
  program = training.step.compiled.as_text()
  return {"losses": losses, "program": program, "state": where(training.state.params), "frozen": where(job.frozen)}
print(json.dumps({name: result(mesh) for name, mesh in meshes.items()}))
"""


@cache
def trainings(devices: int) -> dict[str, dict]:
  """For each mesh of that many devices: losses of 20 steps, the compiled step, and where arrays lie."""
  meshes = {name: sizes for name, sizes in MESHES.items() if math.prod(sizes.values()) == devices}
  return json.loads(script_output(TRAIN, json.dumps([meshes, SETTINGS, BATCH]), devices=devices))


def trained(mesh: str) -> dict:
  return trainings(math.prod(MESHES[mesh].values()))[mesh]


COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def gathered(program: str, operations: str = "all-gather") -> list[list[int]]:
  """The shapes that the all-gathers, or other `operations`, of a compiled program give."""
  found = re.findall(rf"= ([^=]*?) (?:{operations})(?:-start)?\(", re.sub(r"/\*index=\d+\*/", "", program))
  return [[int(n) for n in dims.split(",") if n] for result in found for dims in re.findall(r"\w+\[([\d,]*)\]", result)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [m for m in MESHES if m != "one"])
def test_every_mesh_has_the_losses_of_one_device_with_dropout_on(mesh):
  one, many = trained("one")["losses"], trained(mesh)["losses"]
  assert len(one) == 20 and len(set(one)) == 20
  assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "tutorial"])
def test_nothing_is_gathered_without_split_parameters(mesh):
  program = trained(mesh)["program"]
  assert "all-reduce" in program
  assert gathered(program) == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "all"])
def test_fsdp_gathers_parameters_and_no_activation(mesh):
  result = trained(mesh)
  shapes = gathered(result["program"])
  assert shapes, "the parameters are split over fsdp and must be gathered"
  tensor = MESHES[mesh]["tensor"]
  parameters = {tuple(shape) for _, shape in result["frozen"].values()}
  whole = parameters | {(a // tensor, b) for a, b in (p for p in parameters if len(p) == 2)}
  whole |= {(a, b // tensor) for a, b in (p for p in parameters if len(p) == 2)}
  whole |= {tuple(reversed(shape)) for shape in whole}
  assert all(tuple(shape) in whole for shape in shapes), shapes


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "all"])
def test_fsdp_gathers_each_split_parameter_once(mesh):
  split = [path for path, (spec, _) in trained(mesh)["frozen"].items() if "fsdp" in spec]
  assert len(gathered(trained(mesh)["program"])) == len(split) == 14  # of both directions of the step


@pytest.mark.slow
def test_a_split_vocabulary_exchanges_no_logits():
  shapes = {tuple(shape) for shape in gathered(trained("tutorial")["program"], COLLECTIVES)}
  tokens = 2 * BATCH["length"]  # of each device
  assert (tokens,) in shapes  # the largest logit and the sum of exponentials of each token
  assert {shape for shape in shapes if {132, 264} & {*shape}} == {(4, 132)}  # the gradient of the head's lora_b


def test_arrays_lie_as_the_rules_say():
  frozen = {path: spec for path, (spec, _) in trained("fsdp")["frozen"].items()}
  assert frozen["blocks.0.mha.query.kernel"] == frozen["blocks.1.linear1.kernel"] == ["fsdp", "tensor"]
  assert frozen["blocks.0.mha.out.kernel"] == frozen["token_emb.embedding"] == ["tensor", "fsdp"]
  assert frozen["output_layer.kernel"] == ["fsdp", "tensor"]
  state = {path: spec for path, (spec, _) in trained("fsdp")["state"].items()}
  assert state["blocks.0.mha.query.lora_b"] == state["output_layer.lora_b"] == [None, None, "tensor"]
  assert state["blocks.0.mha.out.lora_a"] == [None, "tensor", None]
  assert set(state["blocks.0.mha.query.lora_a"]) <= {None}


ODD = """
import json
from packs import Training, job_of, quickly, small
from lora_exp.train.plan import make_plan
cfg = small(mesh__data=4, mesh__tensor=2, lora__targets="head", model__layers=1)
plan, job = make_plan(cfg), job_of(cfg)
with quickly():
  Training(job, batch=4).run(1)
table = {path: [shape, split, note] for path, shape, split, note in plan.layout.table(plan.base)}
print(json.dumps([table, list(job.frozen["output_layer"]["kernel"].sharding.spec)]))
"""


@pytest.mark.slow
def test_an_indivisible_vocabulary_is_replicated():
  table, spec = json.loads(script_output(ODD))
  note = "vocab 257 does not divide over tensor 2: replicated"
  assert table["output_layer.kernel"] == ["32×257", "whole × whole", note]
  assert table["token_emb.embedding"] == ["257×32", "whole × whole", note]
  assert table["blocks.*.mha.query.kernel"] == ["32×32", "whole × tensor 2", ""]
  assert set(spec) <= {None}


REFUSED = """
import json
from packs import small
from lora_exp.train.plan import make_plan
from lora_exp.config import InputError
def problems(**settings):
  try:
    make_plan(small(**settings))
  except InputError as error:
    return error.problems
print(json.dumps([
  problems(mesh__data=3),
  problems(mesh__data=2, mesh__tensor=2),
  problems(mesh__data=8, train__batch_size=12),
  problems(mesh__data=8, train__batch_size=16, optim__accumulate=4),
  problems(mesh__data=3, lora__targets="mha.querry"),
  problems(mesh__data=-1, train__batch_size=8),
]))
"""


def test_a_mesh_that_does_not_fit_is_refused_with_what_to_change():
  three, four, batch, parts, both, fine = json.loads(script_output(REFUSED))
  assert len(three) == 1 and "mesh.data=3" in three[0] and "there are 8" in three[0]
  assert len(four) == 1 and "needs 4 devices, but there are 8" in four[0]
  assert len(batch) == 1 and "train.batch_size=12" in batch[0] and "multiple of 8" in batch[0]
  assert len(parts) == 1 and "optim.accumulate=4" in parts[0]
  assert len(both) == 2 and any("mha.query" in p for p in both)  # every problem at once
  assert fine is None


RANDOM = """
import hashlib, json
import numpy as np
from packs import job_of, small
from lora_exp.runtime.mesh import flatten
digest = lambda **mesh: {
  path: hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
  for job in [job_of(small(model__layers=1, train__batch_size=8, **mesh))]
  for path, x in {**flatten(job.frozen), **flatten(job.state.params)}.items()
}
print(json.dumps(digest(mesh__data=8) == digest(mesh__data=1, mesh__fsdp=4, mesh__tensor=2)))
"""


@pytest.mark.slow
def test_random_weights_have_the_same_bits_on_every_mesh():
  assert json.loads(script_output(RANDOM)) is True


TRIALS = """
import json
import jax
from packs import Training, job_of, quickly, small
cfgs = lambda **mesh: [small(model__layers=1, lora__rank=r, lora__dropout=0.1, **mesh) for r in (2, 4)]
split, together = job_of(*cfgs(mesh__trial=2, mesh__data=4)), job_of(*cfgs(mesh__data=4, mesh__tensor=2))
with quickly():
  trainings = [Training(job, batch=4) for job in (split, together)]
  losses = [training.run(3).tolist() for training in trainings]
state = trainings[0].state
leaves = jax.tree.leaves((state.params, state.opt))
print(json.dumps([*losses, [(x.shape[0], [p.data.shape[0] for p in x.addressable_shards]) for x in leaves if x.ndim]]))
"""


@pytest.mark.slow
def test_trials_may_be_split_over_the_mesh():
  split, together, sizes = json.loads(script_output(TRIALS))
  assert [x for row in split for x in row] == pytest.approx([x for row in together for x in row], rel=1e-5)
  # Every device holds one of the two trials.
  assert sizes and all(trials == 2 and held == [1] * 8 for trials, held in sizes)
