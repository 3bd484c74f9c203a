"""Checkpoints that are written atomically and verified before they are restored.

    checkpoints/40/state/       the arrays in orbax's format, each under its dotted path
    checkpoints/40/meta.json    the step, the caller's metadata, and the shape and dtype of every array
    checkpoints/40/SHA256SUMS   checksums of all other files, written last; `sha256sum -c` verifies them

Orbax writes atomically, but it does not detect a flipped bit and silently casts to another dtype. The checksums and the
comparison with the expected shapes and dtypes catch both. `pack.py` also checks that a resumed run's data is the same,
and that a checkpoint was not copied from another run.
"""

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

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
  arrays = named_leaves(state)
  several = _several_processes(arrays)
  if not several:  # orbax takes twice as long with JAX arrays
    arrays = {name: np.asarray(leaf) for name, leaf in arrays.items()}
  meta = {"step": step, "meta": meta, "arrays": {name: _spec(leaf) for name, leaf in arrays.items()}}
  with _disk_errors(root):
    if not several:
      with _committed(root, temporary, step, keep, best_step):
        _write_arrays(temporary, arrays)
        _write_facts(temporary, meta)
      return
    with _committed(root, temporary, step, keep, best_step) if jax.process_index() == 0 else nullcontext():
      multihost_utils.sync_global_devices(f"begin checkpoint {step}")  # its directory is there
      _write_arrays(temporary.resolve(), arrays)  # returns when all have written
      if jax.process_index() == 0:
        _write_facts(temporary, meta)
    multihost_utils.sync_global_devices(f"end checkpoint {step}")  # it is committed


def _several_processes(arrays: dict[str, Any]) -> bool:
  """Whether the arrays are on the devices of several processes, which then save together."""
  return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in arrays.values())


@contextmanager
def _committed(root: Path, temporary: Path, step: int, keep: int, best_step: int | None) -> Iterator[None]:
  """Context with an empty directory `temporary`, which becomes the checkpoint of `step`; the old ones are deleted."""
  _make_root(root)
  _remove_leftovers(root)
  temporary.mkdir()
  try:
    yield
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  if (root / str(step)).exists():  # damaged, or saved before
    _discard(root, step)
  _move(temporary, root / str(step))
  _delete_old(root, step, keep, best_step)


def _write_arrays(directory: Path, arrays: dict[str, Any]) -> None:
  """Writes the arrays of a checkpoint. Orbax rejects an empty tree, the state of a run without trained parameters."""
  if arrays:
    with _orbax().StandardCheckpointer() as checkpointer:
      checkpointer.save(directory.absolute() / STATE, arrays)


def _write_facts(directory: Path, meta: dict) -> None:
  """Writes the metadata of a checkpoint, and the checksums of everything in it."""
  (directory / META).write_text(json.dumps(meta, indent=1) + "\n")
  write_sums(directory, sync=True)


def steps(run_dir: Path) -> list[int]:
  """The steps of the committed checkpoints in ascending order."""
  root = Path(run_dir) / CHECKPOINTS
  if not root.is_dir():
    return []
  return sorted(int(d.name) for d in root.iterdir() if d.name.isdecimal() and (d / SUMS).is_file())


def never_saved(run_dir: Path) -> bool:
  """Whether no checkpoint was ever committed, not even one that is damaged now."""
  root = Path(run_dir) / CHECKPOINTS
  return not root.is_dir() or all(path.name.startswith(TEMPORARY) for path in root.iterdir())


def _no_problem(meta: dict) -> str:
  """Accepts the metadata of every checkpoint."""
  return ""


def restore(
  run_dir: Path, abstract: Any, step: int | None = None, problem: Callable[[dict], str] = _no_problem
) -> tuple[int, Any, dict]:
  """Restores (step, state, meta) from the newest undamaged checkpoint, or from that of `step`.

  `abstract` has the structure of the state, with arrays or `jax.ShapeDtypeStruct`s as leaves. Each array is restored
  with the sharding of its leaf, or on the first device if the leaf has none. Damaged checkpoints are skipped with a
  warning, and so are those for whose metadata `problem` returns a reason. Raises NoCheckpointError if there is no
  undamaged one, and InputError if names, shapes or dtypes differ from `abstract`; the error lists all of them.
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
    if reason:
      console.show_warning(f"checkpoint {folder} is damaged and is skipped: {reason}")
      continue
    try:
      content = read_content(folder)
    except InputError as error:
      console.show_warning(f"checkpoint {folder} is skipped: {error}")
      continue
    reason = _step_problem(content, candidate) or problem(content["meta"])
    if not reason:
      return candidate, _restore_arrays(folder, content["arrays"], abstract), content["meta"]
    console.show_warning(f"checkpoint {folder} is skipped: {reason}")
  which = "all checkpoints are" if step is None else f"the checkpoint of step {step} is"
  raise NoCheckpointError(f"{run_dir}: {which} damaged; restore one from a backup, or start a new run")


def read_content(folder: Path) -> dict:
  """The content of a checkpoint's meta.json: `meta`, the specification of `arrays`, and since 0.2 the `step`.

  Raises InputError if the file is not as `save` writes it, though its checksum may be right.
  """
  try:
    content = json.loads((folder / META).read_text(encoding="utf-8"))
    well_formed = isinstance(content["meta"], dict) and all(
      spec.keys() == {"shape", "dtype"} for spec in content["arrays"].values()
    )
  except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
    well_formed = False
  if not well_formed:
    raise InputError(f"{META} does not have the form that training writes")
  return dict(content)


def _step_problem(content: dict, step: int) -> str:
  """Why the content of meta.json is not that of `step`, or ''. Version 0.1.0 did not store the step."""
  saved = content.get("step", step)
  return "" if saved == step else f"it was saved at step {saved}, and was renamed"


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
      arrays = checkpointer.restore(folder.resolve() / STATE, targets)
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


def _make_root(root: Path) -> None:
  """Creates the directory of the checkpoints. It and the run directory are then on disk under their names."""
  if not root.is_dir():
    root.mkdir(parents=True)
    for parent in list(root.parents)[:2]:
      sync_path(parent)


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
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    reasons = [os.strerror(code) for code in codes if os.strerror(code) in str(error)]
    if isinstance(error, OSError) or reasons:
      reason = reasons[0] if reasons else str(error)
      raise DiskError(f"{root}: the checkpoint could not be written ({reason}); free disk space and resume") from error
    raise


@cache
def _orbax():
  """Imports orbax at first use, because the import takes half a second, and silences its log messages."""
  import orbax.checkpoint

  logging.getLogger("absl").setLevel(logging.CRITICAL)
  _hide_closed_loops()
  return orbax.checkpoint


def _hide_closed_loops() -> None:
  """Hides the traceback that tensorstore prints for each array it was still writing when a write failed.

  Its threads call back into an event loop that orbax has closed. The failure itself is raised by the save.
  """
  show = sys.unraisablehook

  def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
      show(unraisable)

  sys.unraisablehook = show_others
