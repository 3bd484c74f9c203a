"""`task=list`: lists the runs and sweeps under outputs/, or under run=DIR, that match the group `filter`."""

from pathlib import Path

from lora_exp.config import Config, InputError
from lora_exp.config.override_grammar import typed_list
from lora_exp.report.reading.run_index import IndexedRun, find_runs, last_change, matching
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import display_path, typed_path
from lora_exp.runtime.run_files import OUTPUTS


def run(cfg: Config) -> list[IndexedRun]:
  """Prints each run and sweep, the newest last, and returns them. Raises InputError if there is none."""
  root = Path(cfg.run or OUTPUTS)
  entries = find_runs(root) if root.is_dir() else []
  if not entries:
    raise InputError(f"run={display_path(root)}: contains no run and no sweep; give another directory")
  found = sorted(matching(entries, cfg.filter), key=_changed)
  if not found:
    raise InputError(f"filter: none of the {len(entries)} runs and sweeps in {display_path(root)} matches")
  console.show(f"{len(found)} of {len(entries)} runs and sweeps in {display_path(root)}")
  facts = [_facts(entry) for entry in found]
  widths = [max(map(len, column)) for column in zip(*facts, strict=True)]
  for entry, texts in zip(found, facts, strict=True):
    mark = "/" if entry.is_sweep else ""
    console.show(f"{entry.path.relative_to(root)}{mark}", style="bold")
    columns = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
    console.show(f"  {'  '.join(columns)}".rstrip())
  if len(found) > 1:
    newest = typed_list("runs", [display_path(entry.path) for entry in found[-2:]])
    console.show_command("Compare some of them:", f"python -m lora_exp task=compare {newest}")
  else:
    task = "report" if found[0].is_sweep else "evaluate"
    console.show_command("Look at it:", f"python -m lora_exp task={task} {typed_path('run', found[0].path)}")
  return found


def _changed(entry: IndexedRun) -> float:
  return max(last_change(Path(run.path)) for run in entry.runs)


def _facts(entry: IndexedRun) -> list[str]:
  """Model, data, method, rank, steps, held-out loss and status, in words."""
  loss = "-" if entry.loss is None else f"loss {entry.loss:.4f}"
  rank, steps = entry.values("rank"), entry.values("steps")
  return [*map(entry.values, ("model", "data", "method")), "-" if rank in ("-", "") else f"rank {rank}",
          f"{steps} steps", loss, entry.status]
