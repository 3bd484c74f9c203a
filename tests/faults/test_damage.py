"""Damaged files of a checkpoint and of the cache are noticed: flipped bits, truncations, deletions, swaps."""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import TINY, curve, on_stories, summary

from lora_exp.cli import main as entry
from lora_exp.config import Config
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.models.weights import store
from lora_exp.runtime import program_cache
from lora_exp.runtime.cache import fingerprint, get_or_make
from lora_exp.runtime.checksums import write_sums
from lora_exp.runtime.saved_config import saved_settings
from lora_exp.train.records import checkpoint
from lora_exp.train.records.resume_checks import meta_problem, settings_problem

COUNTS = [100, pytest.param(1000, marks=pytest.mark.faults_full)]  # flips of a test
OTHERS = [20, pytest.param(100, marks=pytest.mark.faults_full)]  # other damages
Damage = Callable[[Path, random.Random], object]


def files(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def flip(file: Path, moments: random.Random) -> None:
  """Flips a bit of a byte, or adds a byte to an empty file."""
  content = bytearray(file.read_bytes()) or bytearray(1)
  content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
  file.write_bytes(content)


def truncate(file: Path, moments: random.Random) -> None:
  """Cuts a file after a random byte; an empty file is deleted."""
  content = file.read_bytes()
  file.write_bytes(content[: moments.randrange(len(content))]) if content else file.unlink()


def delete(file: Path, moments: random.Random) -> None:
  file.unlink()


def damages(folder: Path, harms: list[Damage], count: int) -> Iterator[Path]:
  """Damages one file after the other, each restored before the next. Yields what is damaged, `count` times."""
  moments, whole = random.Random(0), files(folder)
  for number in range(count):
    file = whole[number % len(whole)]
    content = file.read_bytes()
    moments.choice(harms)(file, moments)
    yield file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


# ---- checkpoints


def state_of(run: int) -> dict:
  rng = np.random.default_rng(run)
  return {f"params.layer{i}.lora_a": rng.normal(size=(8, 4)).astype(np.float32) for i in range(6)}


def settings(rate: float) -> dict:
  cfg = Config()
  cfg.optim.lr = rate
  return saved_settings(cfg)


@pytest.fixture
def two_runs(tmp_path) -> list[Path]:
  """Two runs that differ in their rates, with the checkpoints of steps 10 and 20."""
  for run in (0, 1):
    for step in (10, 20):
      meta = {"step": step, "settings": settings(0.001 * (1 + run))}
      checkpoint.save(tmp_path / str(run), step, state_of(run), meta)
  return [tmp_path / "0", tmp_path / "1"]


def restored_step(run_dir: Path) -> int:
  """The step of the checkpoint that a run with the settings of the first goes on from."""
  cfg = Config()
  cfg.optim.lr = 0.001
  abstract = jax.eval_shape(partial(state_of, 0))
  step, state, _ = checkpoint.restore(run_dir, abstract, problem=partial(settings_problem, cfg=cfg))
  for name, values in state_of(0).items():
    np.testing.assert_array_equal(state[name], values)
  return step


@pytest.mark.parametrize("count", COUNTS)
def test_every_flip_in_a_checkpoint_is_noticed(count, two_runs, capfd, record_property):
  newest, unseen = two_runs[0] / "checkpoints" / "20", 0
  for number, file in enumerate(damages(newest, [flip], count)):
    reason = checkpoint.damage(newest)
    unseen += not (file.name in reason or file.name == checkpoint.SUMS and reason)
    if number % 50 == 0:  # a restoration takes longer than a comparison of the checksums
      assert restored_step(two_runs[0]) == 10 and "is damaged and is skipped: " in capfd.readouterr().err
  record_property("fault_count", {"fault": "a bit flipped in a checkpoint", "count": count, "failed": unseen})
  assert unseen == 0 and restored_step(two_runs[0]) == 20


@pytest.mark.parametrize("content", ["", "[]", "[" * 10**5, '{"meta": {}}', '{"meta": [], "arrays": {}}',
                                     '{"meta": {}, "arrays": {"a": 1}}', '{"meta": {"settings": 3}, "arrays": {}}'])
def test_metadata_of_another_form_is_skipped(content, two_runs, capfd):
  newest = two_runs[0] / "checkpoints" / "20"
  (newest / checkpoint.META).write_text(content)
  write_sums(newest)
  assert restored_step(two_runs[0]) == 10 and "20 is skipped: " in capfd.readouterr().err


@pytest.mark.parametrize("record", [
  None, [], {}, {"steps": 1}, {"steps": 1, "data": "a", "skipped": "x"}, {"steps": 1, "data": "a", "evil": 1},
  {"steps": 1, "data": "a", "scores": {"base": 1}},
])  # fmt: skip
def test_a_record_of_another_form_is_not_that_of_a_run(record):
  good = {"data": {"fingerprint": "a"}, "record": {"steps": 1, "data": "a", "train_seconds": 2, "best": None}}
  assert meta_problem(good, Config()) == ""
  assert meta_problem({**good, "record": record}, Config()) == "its metadata is not that of a run"
  assert meta_problem({**good, "data": record}, Config()) == "its metadata is not that of a run"


@pytest.mark.parametrize("count", OTHERS)
def test_truncated_deleted_or_swapped_files_are_noticed(count, two_runs, record_property):
  run, other = two_runs
  newest, unseen = run / "checkpoints" / "20", 0

  def swap(file: Path, moments: random.Random) -> None:
    """The file of the same name in the other run; a file that is equal there is deleted."""
    theirs = other / file.relative_to(run)
    shutil.copy(theirs, file) if theirs.is_file() and theirs.read_bytes() != file.read_bytes() else file.unlink()

  for _ in damages(newest, [truncate, delete, swap], count):
    if (newest / checkpoint.SUMS).is_file():  # without it, the directory is no checkpoint
      unseen += not checkpoint.damage(newest)
    else:
      unseen += checkpoint.steps(run) != [10]
  record_property("fault_count", {"fault": "a file of a checkpoint truncated, deleted or swapped", "count": count,
                                  "failed": unseen})  # fmt: skip
  assert unseen == 0 and restored_step(run) == 20


def test_a_whole_checkpoint_of_another_run_is_skipped(two_runs, capfd):
  run, other = two_runs
  shutil.rmtree(run / "checkpoints" / "20")
  shutil.copytree(other / "checkpoints" / "20", run / "checkpoints" / "20")
  assert restored_step(run) == 10
  assert "is skipped: it is from a run with another optim.lr" in capfd.readouterr().err


def test_a_checkpoint_under_the_name_of_another_step_is_skipped(two_runs, capfd):
  shutil.copytree(two_runs[0] / "checkpoints" / "10", two_runs[0] / "checkpoints" / "30")
  assert restored_step(two_runs[0]) == 20
  assert "is skipped: it was saved at step 10, and was renamed" in capfd.readouterr().err


@pytest.mark.slow
def test_a_pack_goes_on_from_the_checkpoints_before(tmp_path, capfd):
  short = [*TINY, *on_stories(tmp_path), "train.steps=12", "train.eval_every=4", "train.save_every=4",
           "train.eval_tokens=128", "lora.rank=1,2"]  # fmt: skip
  argv = ["-m", "hydra/launcher=packed", *short]
  assert entry.run([*argv, f"hydra.sweep.dir={tmp_path / 'unbroken'}"]) == 0
  killed = [*argv, f"hydra.sweep.dir={tmp_path / 'killed'}"]
  assert entry.run([*killed, "train.stop_at=8"]) == 75
  flip(tmp_path / "killed" / "1" / "checkpoints" / "8" / "meta.json", random.Random(0))
  assert entry.run(killed) == 0
  assert "8 is damaged and is skipped: changed: meta.json" in capfd.readouterr().err
  for n in range(2):
    assert curve(tmp_path / "killed" / str(n)) == curve(tmp_path / "unbroken" / str(n))
    assert summary(tmp_path / "killed" / str(n))["status"] == "done"


# ---- the cache


def opened_rows(root: Path, text: list[str]) -> Path:
  """The directory of the rows of a text, made or found."""
  cfg = Config()
  cfg.data.source, cfg.data.path = "text", text[1].partition("=")[2]
  return make_rows(cfg.data, get_tokenizer("bytes"), root).path


def opened_base(root: Path, text: list[str]) -> Path:
  """The directory of a base."""
  arrays = {"a": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6)}, "b": {"bias": np.ones(5, np.float32)}}
  return get_or_make(root, "base", fingerprint(base=1), partial(store.save, tree=arrays))


@pytest.mark.parametrize("opened", [opened_rows, opened_base])
@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.faults_full)])
def test_every_damage_of_a_cache_entry_is_noticed(opened, count, tmp_path, capfd, record_property):
  text, moments, unseen = on_stories(tmp_path), random.Random(0), 0
  directory = opened(tmp_path / "cache", text)
  for number in range(count):
    whole = files(directory)
    file = whole[number % len(whole)]
    moments.choice([flip, flip, flip, truncate, delete])(file, moments)
    capfd.readouterr()
    assert opened(tmp_path / "cache", text) == directory
    unseen += "is damaged (" not in capfd.readouterr().err
  record_property("fault_count", {"fault": f"damage of {opened.__name__.partition('_')[2]} in the cache",
                                  "count": count, "failed": unseen})  # fmt: skip
  assert unseen == 0


@pytest.mark.parametrize("count", COUNTS)
def test_every_flip_or_swap_of_a_program_is_noticed(count, tmp_path, record_property):
  found = program_cache._checked_file_cache(str(tmp_path))
  assert found is not None
  programs, moments = found[0], random.Random(0)
  contents = {f"jit_{n}-key": moments.randbytes(2000) for n in range(2)}
  unseen = 0
  for _ in range(count):
    for key, program in contents.items():
      programs.put(key, program)
    [first, second] = [tmp_path / f"{key}-cache" for key in contents]
    shutil.copy(second, first) if moments.random() < 0.1 else flip(first, moments)
    unseen += programs.get("jit_0-key") is not None
    unseen += programs.get("jit_1-key") != contents["jit_1-key"]
    assert not first.exists(), "it is removed, and compiled again"
  record_property("fault_count", {"fault": "damage of a compiled program", "count": count, "failed": unseen})
  assert unseen == 0
