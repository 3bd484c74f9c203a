"""`task=clean`: deletes old entries of the cache and old checkpoints of finished runs.

Without clean.delete=true, it only shows what would be deleted. A finished run keeps its adapter and all results, but
can no longer be made longer with train.resume. Entries of the cache are made again when they are needed; a pretrained
base takes the time of its training.
"""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import Config
from lora_exp.report.reading.run_index import DAY, find_runs, last_change, matches
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime import console
from lora_exp.runtime.byte_sizes import parse_size, size_of, size_text
from lora_exp.runtime.cache_entries import CacheEntry, cache_entries, entries_over_limit, remove_entry
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.locks import run_lock
from lora_exp.runtime.run_files import CHECKPOINTS, OUTPUTS

SHOWN = 20  # checkpoints that are listed, the largest ones


@dataclass(frozen=True)
class OldCheckpoints:
  """The checkpoints of a finished run."""

  run_dir: Path
  size: int  # bytes
  days: float  # since the run ended


def run(cfg: Config) -> int:
  """Deletes, or shows what would be deleted; returns the bytes."""
  entries = cache_entries(Path(cfg.cache).expanduser())
  old = _old_entries(cfg, entries)
  checkpoints = _old_checkpoints(cfg) if cfg.clean.checkpoints else []
  total = sum(entry.size for entry in old) + sum(found.size for found in checkpoints)
  _show_cache(cfg, entries, old)
  _show_checkpoints(checkpoints)
  if not cfg.clean.delete:
    again = "; add clean.delete=true to delete it" if total else ""
    console.show(f"Nothing was deleted. {size_text(total)} would be{again}")
    return total
  kept = [entry for entry in old if not remove_entry(entry)]
  for found in checkpoints:
    with run_lock(found.run_dir):
      shutil.rmtree(found.run_dir / CHECKPOINTS)
  deleted = total - sum(entry.size for entry in kept)
  console.show(f"Deleted {size_text(deleted)}{f'; {len(kept)} entries are in use' if kept else ''}")
  return deleted


def _old_entries(cfg: Config, entries: Sequence[CacheEntry]) -> list[CacheEntry]:
  """Entries that were not used for clean.days, and the oldest ones above cache_limit."""
  smallest = parse_size(cfg.clean.min_size)
  old = [entry for entry in entries if entry.days >= cfg.clean.days and entry.size >= smallest]
  if cfg.cache_limit is None:
    return old
  rest = [entry for entry in entries if entry not in old]
  return [*old, *entries_over_limit(rest, parse_size(cfg.cache_limit))]


def _old_checkpoints(cfg: Config) -> list[OldCheckpoints]:
  """The checkpoints of finished runs in outputs/, or in run=DIR, that match `filter`; the largest first."""
  root, smallest = Path(cfg.run or OUTPUTS), parse_size(cfg.clean.min_size)
  entries = find_runs(root) if root.is_dir() else []
  found = [_checkpoints(run) for entry in entries for run in entry.runs
           if run.status == "done" and matches(entry, run, cfg.filter)]
  old = [entry for entry in found if entry.size >= max(1, smallest) and entry.days >= cfg.clean.days]
  return sorted(old, key=_size, reverse=True)


def _checkpoints(run: RunRecord) -> OldCheckpoints:
  run_dir = Path(run.path)
  return OldCheckpoints(run_dir, size_of(run_dir / CHECKPOINTS), (time.time() - last_change(run_dir)) / DAY)


def _size(found: OldCheckpoints) -> int:
  return found.size


def _show_cache(cfg: Config, entries: Sequence[CacheEntry], old: Sequence[CacheEntry]) -> None:
  """A row for each kind of entry."""
  sizes, old_sizes = Counter[str](), Counter[str]()
  for entry in entries:
    sizes[entry.kind] += entry.size
  for entry in old:
    old_sizes[entry.kind] += entry.size
  counts = Counter(entry.kind for entry in old)
  rows = [[kind, size_text(size), counts[kind], size_text(old_sizes[kind])] for kind, size in sizes.items()]
  rows.append(["all", size_text(sum(sizes.values())), len(old), size_text(sum(old_sizes.values()))])
  why = f"unused for {cfg.clean.days:g} days" + (f" or above {cfg.cache_limit}" if cfg.cache_limit else "")
  console.show_table(f"Cache {display_path(Path(cfg.cache).expanduser())}; old: {why}",
                     ["entries", "size", "old entries", "old size"], rows, right=["size", "old size"])


def _show_checkpoints(found: Sequence[OldCheckpoints]) -> None:
  if not found:
    console.show("Checkpoints: no finished run has old ones")
    return
  rows = [[display_path(old.run_dir), f"{old.days:.0f}", size_text(old.size)] for old in found[:SHOWN]]
  if len(found) > SHOWN:
    rows.append([f"and {len(found) - SHOWN} more", "", size_text(sum(old.size for old in found[SHOWN:]))])
  console.show_table("Checkpoints of finished runs", ["run", "days", "size"], rows, right=["days", "size"])
