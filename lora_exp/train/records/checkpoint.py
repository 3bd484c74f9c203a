"""Checkpoints that are written atomically and verified before they are restored.

    checkpoints/40/state/       the arrays in orbax's format, each under its dotted path
    checkpoints/40/meta.json    the caller's metadata, and the shape and dtype of every array
    checkpoints/40/SHA256SUMS   checksums of all other files, written last; `sha256sum -c` verifies them

Orbax writes atomically, but it does not detect a flipped bit and silently casts to another dtype. The checksums and the
comparison with the expected shapes and dtypes catch both. `pack.py` also checks that a resumed run's data is the same.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_exp.config.errors import DiskError, InputError, NoCheckpointError
from lora_exp.runtime import console
from lora_exp.runtime.checksums import SUMS, damage, write_sums
from lora_exp.runtime.files import sync_path
from lora_exp.runtime.run_files import CHECKPOINTS

META, STATE = "meta.json", "state"
TEMPORARY = "tmp."  # prefix of a checkpoint that is being written or deleted


def save(run_dir: Path, step: int, state: Any, meta: dict, keep: int = 2, best_step: int | None = None) -> None:
  """Commits `state` (a pytree of arrays) and `meta` (JSON) as the checkpoint of `step`.

  Then deletes all checkpoints except the newest `keep` and that of `best_step`. Checkpoints of later steps are deleted
  too, because they were written before the run was resumed from an earlier step. Raises DiskError.
  """
  root = Path(run_dir) / CHECKPOINTS
  temporary = root / f"{TEMPORARY}{step}"
  # Orbax takes twice as long with JAX arrays.
  arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
  meta = {"meta": meta, "arrays": {name: _spec(leaf) for name, leaf in arrays.items()}}
  with _disk_errors(root):
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    temporary.mkdir()
    try:
      if arrays:  # orbax rejects an empty tree, the state of a run without trained parameters
        with _orbax().StandardCheckpointer() as checkpointer:
          checkpointer.save(temporary.absolute() / STATE, arrays)
      (temporary / META).write_text(json.dumps(meta, indent=1) + "\n")
      write_sums(temporary, sync=True)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise
    if (root / str(step)).exists():  # damaged, or saved before
      _discard(root, step)
    _move(temporary, root / str(step))
    _delete_old(root, step, keep, best_step)


def steps(run_dir: Path) -> list[int]:
  """The steps of the committed checkpoints in ascending order."""
  root = Path(run_dir) / CHECKPOINTS
  if not root.is_dir():
    return []
  return sorted(int(d.name) for d in root.iterdir() if d.name.isdecimal() and (d / SUMS).is_file())


def restore(run_dir: Path, abstract: Any, step: int | None = None) -> tuple[int, Any, dict]:
  """Restores (step, state, meta) from the newest undamaged checkpoint, or from that of `step`.

  `abstract` has the structure of the state, with arrays or `jax.ShapeDtypeStruct`s as leaves. Each array is restored
  with the sharding of its leaf, or on the first device if the leaf has none. Damaged checkpoints are skipped with a
  warning. Raises NoCheckpointError if there is no undamaged one, and InputError if names, shapes or dtypes differ from
  `abstract`; the error lists all of them.
  """
  run_dir = Path(run_dir)
  committed = steps(run_dir)
  if not committed:
    raise NoCheckpointError(f"{run_dir}: has no checkpoint; start a new run, or check the directory")
  if step is not None and step not in committed:
    raise NoCheckpointError(f"{run_dir}: has no checkpoint of step {step}, only of {', '.join(map(str, committed))}")
  for candidate in [step] if step is not None else reversed(committed):
    folder = run_dir / CHECKPOINTS / str(candidate)
    reason = damage(folder)
    if not reason:
      content = json.loads((folder / META).read_text())
      return candidate, _restore_arrays(folder, content["arrays"], abstract), content["meta"]
    console.show_warning(f"checkpoint {folder} is damaged and is skipped: {reason}")
  raise NoCheckpointError(f"{run_dir}: all checkpoints are damaged; restore one from a backup, or start a new run")


def named_leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a pytree by dotted path (`opt.0.mu.layers.3.lora_a`), in the order of the tree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
  if len(named) != len(leaves):
    raise ValueError("two leaves of the state have the same dotted path")
  return named


def _spec(leaf: Any) -> dict:
  """The shape and dtype of an array as JSON."""
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _restore_arrays(folder: Path, stored: dict[str, dict], abstract: Any) -> Any:
  """The arrays of a checkpoint in the structure of `abstract`. Raises InputError if names, shapes or dtypes differ."""
  expected = named_leaves(abstract)
  problems = _differences(stored, {name: _spec(leaf) for name, leaf in expected.items()})
  if problems:
    raise InputError([f"{folder}: {problem}" for problem in problems])
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  targets = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)
    for name, leaf in expected.items()
  }
  arrays = {}
  if targets:
    with _orbax().StandardCheckpointer() as checkpointer:
      arrays = checkpointer.restore(folder.absolute() / STATE, targets)
  return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in expected])


def _differences(stored: dict[str, dict], expected: dict[str, dict]) -> list[str]:
  """One message for every name, shape or dtype that differs."""
  problems = [f"{name} is missing in the checkpoint" for name in expected if name not in stored]
  problems += [f"{name} is in the checkpoint but not in this run" for name in stored if name not in expected]
  for name in stored:
    for key in ("shape", "dtype"):
      if name in expected and stored[name][key] != expected[name][key]:
        stored_value, expected_value = stored[name][key], expected[name][key]
        problems.append(f"{name} has {key} {stored_value} in the checkpoint and {expected_value} in this run")
  return problems


def _delete_old(root: Path, step: int, keep: int, best_step: int | None) -> None:
  """Deletes the checkpoints that `save` does not retain."""
  committed = steps(root.parent)
  retained = {*[s for s in committed if s <= step][-keep:], step, best_step}
  for old in committed:
    if old not in retained:
      _discard(root, old)
  _remove_leftovers(root)


def _discard(root: Path, step: int) -> None:
  """Removes a checkpoint by one rename. `_remove_leftovers` deletes its files later."""
  _move(root / str(step), root / f"{TEMPORARY}old.{step}")


def _remove_leftovers(root: Path) -> None:
  """Deletes checkpoints that were not committed, or that were discarded."""
  for path in root.glob(f"{TEMPORARY}*"):
    shutil.rmtree(path)


def _move(source: Path, target: Path) -> None:
  """Renames a directory and flushes the rename to disk."""
  source.rename(target)
  sync_path(target.parent)


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
  """Converts disk errors to DiskError: OSError, and the ValueError in which tensorstore wraps one."""
  try:
    yield
  except (OSError, ValueError) as error:
    messages = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
    if isinstance(error, OSError) or any(message in str(error) for message in messages):
      raise DiskError(f"{root}: the checkpoint could not be written ({error}); free disk space and resume") from error
    raise


def _orbax():
  """Imports orbax at first use, because the import takes half a second, and silences its log messages."""
  import orbax.checkpoint

  logging.getLogger("absl").setLevel(logging.CRITICAL)
  return orbax.checkpoint
