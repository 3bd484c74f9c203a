"""Checkpoints that are complete or absent, and verified before they are read.

    checkpoints/40/state/       the arrays, as orbax writes them, each under its dotted path
    checkpoints/40/meta.json    metadata of the caller, and the shape and dtype of every array
    checkpoints/40/SHA256SUMS   written last: `sha256sum -c` checks it

Orbax survives a kill, but restores a flipped bit as a wrong number and silently casts to another dtype. The checksums
and the comparison with the expected shapes and dtypes catch both.
"""

import errno
import hashlib
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
from lora_exp.runtime.files import sync_path
from lora_exp.runtime.run_files import CHECKPOINTS

SUMS, META, STATE = "SHA256SUMS", "meta.json", "state"
TEMPORARY = "tmp."  # prefix of a directory that is not yet, or no longer, a checkpoint


def save(run_dir: Path, step: int, state: Any, meta: dict, keep: int = 2, best_step: int | None = None) -> None:
  """Commit `state` (a pytree of arrays) and `meta` (JSON) as the checkpoint of `step`.

  After the commit, checkpoints other than the newest `keep` and `best_step` are deleted, and so are those of later
  steps: they were written before the run was resumed from an earlier step. Raises DiskError.
  """
  root = Path(run_dir) / CHECKPOINTS
  temporary = root / f"{TEMPORARY}{step}"
  # orbax takes twice as long with jax arrays
  arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
  meta = {"meta": meta, "arrays": {name: _spec(leaf) for name, leaf in arrays.items()}}
  with _disk_errors(root):
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    temporary.mkdir()
    try:
      if arrays:  # orbax refuses an empty tree, which a run that trains nothing has
        with _orbax().StandardCheckpointer() as checkpointer:
          checkpointer.save(temporary.absolute() / STATE, arrays)
      (temporary / META).write_text(json.dumps(meta, indent=1) + "\n")
      (temporary / SUMS).write_text(_sums(_digests(temporary, sync=True)))
      sync_path(temporary / SUMS)
      sync_path(temporary)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise
    if (root / str(step)).exists():  # damaged, or saved again
      _discard(root, step)
    _move(temporary, root / str(step))
    _delete_old(root, step, keep, best_step)


def steps(run_dir: Path) -> list[int]:
  """The steps of the committed checkpoints, ascending."""
  root = Path(run_dir) / CHECKPOINTS
  if not root.is_dir():
    return []
  return sorted(int(d.name) for d in root.iterdir() if d.name.isdecimal() and (d / SUMS).is_file())


def restore(run_dir: Path, abstract: Any, step: int | None = None) -> tuple[int, Any, dict]:
  """(step, state, meta) of the newest checkpoint whose files are unchanged, or of exactly `step`.

  `abstract` is the state as arrays or `jax.ShapeDtypeStruct`s; a leaf comes back under its sharding there, without one
  on the first device. Damaged checkpoints are skipped with a warning. Raises NoCheckpointError if none is left,
  and InputError with every name, shape and dtype that differs from `abstract`.
  """
  run_dir = Path(run_dir)
  committed = steps(run_dir)
  if not committed:
    raise NoCheckpointError(f"{run_dir}: no checkpoint was committed there; start the run anew, or check the directory")
  if step is not None and step not in committed:
    raise NoCheckpointError(f"{run_dir}: no checkpoint of step {step}; there are {', '.join(map(str, committed))}")
  for candidate in [step] if step is not None else reversed(committed):
    folder = run_dir / CHECKPOINTS / str(candidate)
    damage = _damage(folder)
    if not damage:
      content = json.loads((folder / META).read_text())
      return candidate, _restore_arrays(folder, content["arrays"], abstract), content["meta"]
    console.show_warning(f"checkpoint {folder} is damaged and not used: {damage}")
  raise NoCheckpointError(f"{run_dir}: every checkpoint asked for is damaged; copy one from elsewhere or start anew")


def named_leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a pytree by dotted path (`opt.0.mu.layers.3.lora_a`), in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
  if len(named) != len(leaves):
    raise ValueError("two leaves of the state have the same dotted path")
  return named


def _spec(leaf: Any) -> dict:
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _restore_arrays(folder: Path, stored: dict[str, dict], abstract: Any) -> Any:
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
  problems = [f"{name} is missing there, and this run has it" for name in expected if name not in stored]
  problems += [f"{name} is there, and this run has no such array" for name in stored if name not in expected]
  for name in stored:
    for what in ("shape", "dtype"):
      if name in expected and stored[name][what] != expected[name][what]:
        problems.append(f"{name} has {what} {stored[name][what]} there and {expected[name][what]} in this run")
  return problems


def _damage(folder: Path) -> str:
  """How the files differ from the checksums; '' if they do not."""
  try:
    found = _digests(folder)
    recorded = (folder / SUMS).read_bytes().decode(errors="replace")
  except OSError as error:
    return str(error)
  if recorded == _sums(found):
    return ""
  sums = {name: digest for digest, _, name in (line.partition("  ") for line in recorded.splitlines())}
  changed = [name for name in sums if name in found and sums[name] != found[name]]
  missing = [name for name in sums if name not in found]
  added = [name for name in found if name not in sums]
  parts = [f"{word} {', '.join(names)}"
           for word, names in (("changed:", changed), ("missing:", missing), ("not in the sums:", added)) if names]
  return "; ".join(parts) or f"changed: {SUMS}"


def _sums(digests: dict[str, str]) -> str:
  return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _digests(folder: Path, sync: bool = False) -> dict[str, str]:
  """SHA-256 of every file below `folder` except the checksums; with `sync`, each file is flushed to the disk."""
  digests = {}
  for path in sorted(folder.rglob("*")):
    if sync:
      sync_path(path)
    if path.is_file() and path != folder / SUMS:
      with open(path, "rb") as file:
        digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
  return digests


def _delete_old(root: Path, step: int, keep: int, best_step: int | None) -> None:
  committed = steps(root.parent)
  kept = {*[s for s in committed if s <= step][-keep:], step, best_step}
  for old in committed:
    if old not in kept:
      _discard(root, old)
  _remove_leftovers(root)


def _discard(root: Path, step: int) -> None:
  """Removes a checkpoint in one rename; `_remove_leftovers` deletes its files."""
  _move(root / str(step), root / f"{TEMPORARY}old.{step}")


def _remove_leftovers(root: Path) -> None:
  for path in root.glob(f"{TEMPORARY}*"):
    shutil.rmtree(path)


def _move(source: Path, target: Path) -> None:
  source.rename(target)
  sync_path(target.parent)


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
  """Turns disk errors into DiskError: those of the operating system, and those that tensorstore wraps in ValueError."""
  try:
    yield
  except (OSError, ValueError) as error:
    words = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
    if isinstance(error, OSError) or any(word in str(error) for word in words):
      raise DiskError(f"{root}: the checkpoint could not be written ({error}); make room there and resume") from error
    raise


def _orbax():
  """orbax, imported at first use because that takes half a second, with its logging through absl turned off."""
  import orbax.checkpoint

  logging.getLogger("absl").setLevel(logging.CRITICAL)
  return orbax.checkpoint
