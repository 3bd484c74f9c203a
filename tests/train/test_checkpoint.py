"""Checkpoints are restored bit for bit or rejected with a message, never with other values."""

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_exp.config.errors import DiskError, InputError, NoCheckpointError
from lora_exp.train.records import checkpoint
from lora_exp.train.records.background_saves import BackgroundSaves

REPOSITORY = Path(checkpoint.__file__).parents[2]


def trained_state(seed: int = 0) -> dict:
  """Adapters in two dtypes and the AdamW state after a step."""
  keys = jax.random.split(jax.random.key(seed), 2)
  lora = {"layers": {"0": {"lora_a": jax.random.normal(keys[0], (6, 4)), "lora_b": jnp.zeros((4, 6))},
                     "1": {"lora_a": jax.random.normal(keys[1], (6, 4), jnp.bfloat16), "lora_b": jnp.ones((4, 6))}}}
  optimizer = optax.adamw(1e-3)
  gradients = jax.tree.map(lambda x: x * 0.5 + 0.25, lora)
  updates, optimizer_state = optimizer.update(gradients, optimizer.init(lora), lora)
  return {"lora": optax.apply_updates(lora, updates), "opt": optimizer_state, "tokens": jnp.int32(2**31 - 1)}


def assert_same_bits(actual, expected) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert isinstance(a, jax.Array)
    assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (b.shape, b.dtype, np.asarray(b).tobytes())


def files_of(run_dir: Path, step: int) -> list[Path]:
  return sorted(path for path in (run_dir / "checkpoints" / str(step)).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def abstract():
  return jax.eval_shape(trained_state)


@pytest.fixture
def two(tmp_path):
  """A run with the checkpoints of steps 10 and 20."""
  for step in (10, 20):
    checkpoint.save(tmp_path, step, trained_state(step), {"step": step})
  return tmp_path


def test_bits_dtypes_namedtuples_and_meta_come_back(tmp_path, abstract):
  state = trained_state()
  state["lora"]["layers"]["0"]["lora_b"] = jnp.array([[jnp.nan, jnp.inf, -0.0, 1e-45, 3e38, 1]] * 4)
  meta = {"tokens": 12, "best": {"step": 3, "loss": 0.1}, "name": "ü"}
  checkpoint.save(tmp_path, 7, state, meta)
  step, restored, restored_meta = checkpoint.restore(tmp_path, abstract)
  assert (step, restored_meta) == (7, meta)
  assert_same_bits(restored, state)
  assert isinstance(restored["opt"][0], optax.ScaleByAdamState)


def test_an_empty_state_is_a_checkpoint_too(tmp_path):
  state = {"lora": {}, "opt": optax.sgd(0.1).init({})}
  checkpoint.save(tmp_path, 1, state, {})
  assert checkpoint.restore(tmp_path, state) == (1, state, {})


def test_the_newest_is_taken_and_an_exact_step_can_be_asked_for(two, abstract):
  assert checkpoint.steps(two) == [10, 20]
  assert checkpoint.restore(two, abstract)[0] == 20
  step, state, _ = checkpoint.restore(two, abstract, step=10)
  assert step == 10
  assert_same_bits(state, trained_state(10))


def test_the_newest_two_and_the_best_are_kept(tmp_path):
  for step in (2, 4, 6, 8, 10):
    checkpoint.save(tmp_path, step, {"x": jnp.ones(2)}, {}, keep=2, best_step=4 if step > 2 else 2)
  assert checkpoint.steps(tmp_path) == [4, 8, 10]
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "4", "8"]


def test_a_save_removes_later_steps_of_an_abandoned_course(two):
  checkpoint.save(two, 15, trained_state(15), {})
  assert checkpoint.steps(two) == [10, 15]


def test_a_step_saved_again_holds_the_new_state(two, abstract):
  checkpoint.save(two, 20, trained_state(21), {"again": True})
  step, state, meta = checkpoint.restore(two, abstract)
  assert (step, meta, checkpoint.steps(two)) == (20, {"again": True}, [10, 20])
  assert_same_bits(state, trained_state(21))


def test_one_flipped_bit_falls_back_to_the_older_checkpoint(two, abstract, capfd):
  whole = files_of(two, 20)
  assert len(whole) > 5
  for i, path in enumerate(whole):
    content = path.read_bytes()
    at = (7919 * (i + 1)) % max(1, len(content))
    path.write_bytes(content[:at] + bytes([(content[at] if content else 0) ^ 1 << i % 8]) + content[at + 1:])
    step, state, _ = checkpoint.restore(two, abstract)
    assert step == 10, f"a changed bit in {path.name} went unseen"
    warning = capfd.readouterr().err
    assert "warning" in warning and "20" in warning and (path.name in warning or path.name == checkpoint.SUMS)
    path.write_bytes(content)
  assert_same_bits(state, trained_state(10))
  assert checkpoint.restore(two, abstract)[0] == 20


def test_every_bit_of_the_sums_file_matters(tmp_path):
  state = {"x": jnp.ones(1)}
  checkpoint.save(tmp_path, 1, state, {})
  folder = tmp_path / "checkpoints" / "1"
  sums = (folder / checkpoint.SUMS).read_bytes()
  assert checkpoint.damage(folder) == ""
  for at in range(0, len(sums), 3):
    (folder / checkpoint.SUMS).write_bytes(sums[:at] + bytes([sums[at] ^ 1 << at % 8]) + sums[at + 1:])
    assert checkpoint.damage(folder), f"bit {at % 8} of byte {at}"


@pytest.mark.parametrize("harm", ["truncate", "delete", "add"])
def test_a_truncated_missing_or_foreign_file_is_found(two, abstract, harm):
  for path in files_of(two, 20):
    content = path.read_bytes()
    if harm == "add":
      path.with_name("foreign").write_bytes(b"")
    elif harm == "truncate" and content:
      path.write_bytes(content[:-1])
    elif harm == "delete":
      path.unlink()
    else:
      continue
    assert checkpoint.restore(two, abstract)[0] == 10, f"{harm} {path.name}"
    path.write_bytes(content)
    path.with_name("foreign").unlink(missing_ok=True)


def test_a_folder_without_sums_is_no_checkpoint(two, abstract):
  (two / "checkpoints" / "30").mkdir()
  (two / "checkpoints" / "tmp.40").mkdir()
  assert checkpoint.steps(two) == [10, 20]
  assert checkpoint.restore(two, abstract)[0] == 20
  checkpoint.save(two, 30, trained_state(), {})
  assert checkpoint.restore(two, abstract)[0] == 30


def test_no_usable_checkpoint_is_an_error_of_its_own(tmp_path, abstract):
  with pytest.raises(NoCheckpointError, match="has no checkpoint; start a new run"):
    checkpoint.restore(tmp_path, abstract)
  checkpoint.save(tmp_path, 5, trained_state(), {})
  with pytest.raises(NoCheckpointError, match="step 6, only of 5"):
    checkpoint.restore(tmp_path, abstract, step=6)
  files_of(tmp_path, 5)[-1].write_bytes(b"")
  with pytest.raises(NoCheckpointError, match="damaged"):
    checkpoint.restore(tmp_path, abstract)


def test_a_foreign_state_is_refused_with_every_difference(two, abstract):
  foreign = trained_state()
  layers = foreign["lora"]["layers"]
  layers["0"]["lora_a"] = jnp.zeros((6, 8))
  layers["1"]["lora_b"] = layers["1"]["lora_b"].astype(jnp.bfloat16)
  layers["2"] = {"lora_a": jnp.zeros(1)}
  del foreign["tokens"]
  with pytest.raises(InputError) as caught:
    checkpoint.restore(two, jax.eval_shape(lambda: foreign))
  problems = "\n".join(caught.value.problems)
  assert len(caught.value.problems) == 4
  assert "lora.layers.0.lora_a has shape [6, 4] in the checkpoint and [6, 8] in this run" in problems
  assert "lora.layers.1.lora_b has dtype float32 in the checkpoint and bfloat16 in this run" in problems
  assert "lora.layers.2.lora_a is missing in the checkpoint" in problems
  assert "tokens is in the checkpoint but not in this run" in problems


def test_a_failed_save_leaves_the_committed_ones_and_no_traces(two):
  with pytest.raises(TypeError):
    checkpoint.save(two, 30, trained_state(), {"not json": object()})
  assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["10", "20"]


DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from lora_exp.train.records import checkpoint
from lora_exp.config.errors import DiskError
run = Path(sys.argv[1])
checkpoint.save(run, 1, {"x": np.ones(9)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the nearest thing to a full disk without being root
try:
  checkpoint.save(run, 2, {"x": np.random.default_rng(0).normal(size=100_000)}, {})
except DiskError as error:
  print(error)
print([path.name for path in (run / "checkpoints").iterdir()])
"""


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path):
  done = run_python(DISK, tmp_path)
  assert "could not be written" in done.stdout and "File too large" in done.stdout
  assert done.stdout.splitlines()[-1] == "['1']"


SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from lora_exp.train.records import checkpoint
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
split = NamedSharding(mesh, P("data", "tensor"))
target = {"x": jax.ShapeDtypeStruct((8, 6), np.float32, sharding=split)}
step, state, _ = checkpoint.restore(Path(sys.argv[1]), target)
assert state["x"].sharding == split and len(state["x"].addressable_shards) == 8
np.testing.assert_array_equal(state["x"], np.arange(48, dtype=np.float32).reshape(8, 6))
checkpoint.save(Path(sys.argv[1]), step + 1, {"x": state["x"] + 1}, {})
"""


def test_a_checkpoint_of_one_device_restores_onto_eight_and_back(tmp_path):
  x = jnp.arange(48, dtype=jnp.float32).reshape(8, 6)
  checkpoint.save(tmp_path, 1, {"x": x}, {})
  run_python(SHARDED, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
  step, state, _ = checkpoint.restore(tmp_path, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
  assert step == 2
  assert len(state["x"].devices()) == 1
  np.testing.assert_array_equal(state["x"], x + 1)


def run_python(code: str, run_dir: Path, **environment: str) -> subprocess.CompletedProcess:
  done = subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=REPOSITORY, env={**os.environ, **environment},
                        capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return done


def test_the_file_of_sums_is_one_that_sha256sum_reads(two):
  folder = two / "checkpoints" / "20"
  for line in (folder / checkpoint.SUMS).read_text().splitlines():
    digest, name = line.split("  ")
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_saves_in_the_background_are_complete_at_the_end(tmp_path, abstract):
  with BackgroundSaves() as saves:
    for step in (1, 2):
      for run in "ab":
        saves.submit(partial(checkpoint.save, tmp_path / run, step, trained_state(step), {"run": run}))
  for run in "ab":
    assert checkpoint.steps(tmp_path / run) == [1, 2]
    assert_same_bits(checkpoint.restore(tmp_path / run, abstract)[1], trained_state(2))


def test_an_error_of_a_save_in_the_background_is_raised(tmp_path):
  (tmp_path / "checkpoints").write_text("a file in the way")
  with pytest.raises(DiskError, match="could not be written"), BackgroundSaves() as saves:
    saves.submit(partial(checkpoint.save, tmp_path, 1, {"x": np.ones(2)}, {}))
    saves.submit(partial(checkpoint.save, tmp_path / "other", 1, {"x": np.ones(2)}, {}))
  assert checkpoint.steps(tmp_path / "other") == [1]
