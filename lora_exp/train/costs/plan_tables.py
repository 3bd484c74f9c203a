"""The tables shown before training: settings, adapted modules, parameter counts and shardings."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_exp.config import Config
from lora_exp.config.conversion import shown
from lora_exp.runtime import console
from lora_exp.runtime.saved_config import COMMAND_SETTINGS
from lora_exp.train.plan import Plan


def show_config(cfg: Config, run_dir: Path) -> None:
  """Shows the settings of a run that are not null, one line per group. Settings of other tasks are left out.

  Other data groups show only differences to `data`.
  """
  node = {name: value for name, value in asdict(cfg).items() if name not in COMMAND_SETTINGS}
  if not cfg.eval.metrics:
    node["eval"] = None
  if cfg.model.base != "pretrain":
    node["pretrain_data"], node["model"]["pretrain"] = None, None
  for name in ("pretrain_data", "retain"):
    if node[name] is not None:
      node[name] = {key: value for key, value in node[name].items() if value != node["data"][key]}
  console.show_facts(str(run_dir), dict(_lines(node, "")))


def _lines(node: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
  """(group, settings) of each group in the nested dicts `node`."""
  values = {key: value for key, value in node.items() if value is not None and not isinstance(value, dict)}
  texts = [f"{key}={shown(value)}" for key, value in values.items()]
  if texts or path in ("pretrain_data", "retain"):
    yield path or "run", " ".join(texts) or "same as data"
  for key, value in node.items():
    if isinstance(value, dict):
      yield from _lines(value, f"{path}.{key}" if path else key)


def show_parameters(plan: Plan) -> None:
  """Shows the adapted modules, the parameter counts and, with several devices, the shardings."""
  if plan.table:
    columns = ("module", "kernel", "rank", "alpha", "scale", "trainable")
    rows = [(r.label, f"{r.fan_in}×{r.fan_out}", r.rank, r.alpha, r.scale, r.parameters) for r in plan.table]
    console.show_table(f"Adapted modules ({len(rows)})", columns, _folded(rows))
  counts = plan.parameters()
  absent = [name for name in ("lora_a", "lora_b") if not counts[name]]  # the method has no such leaf
  shown_counts = {name: count for name, count in counts.items() if name not in absent}
  facts = {**shown_counts, "percent": f"{counts['percent']:.3g} %"}
  console.show_facts(f"Parameters, lora={plan.cfg.lora.method}", facts)
  if plan.layout.mesh.size > 1:
    split = " × ".join(f"{k} {v}" for k, v in plan.layout.mesh.shape.items() if v > 1)
    console.show_table(f"Sharding over {split}", ("array", "shape", "split over", "note"), plan.layout.table(plan.base))


def _folded(rows: list[tuple]) -> list[tuple]:
  """Joins rows that differ only in the block number, as in `blocks.{0-3}.linear1`, and sums their last column."""
  joined = []
  for name, indices in folded(rows):
    _, *columns = rows[indices[0]]
    joined.append((name, *columns[:-1], columns[-1] * len(indices)))
  return joined


def folded(keys: Sequence[tuple]) -> list[tuple[str, list[int]]]:
  """Groups keys that differ only in the block number of their first element, a module path.

  Returns (name, indices of the keys) for each group, in order of first appearance.
  """
  groups: dict[tuple, list[int]] = {}
  for index, key in enumerate(keys):
    pattern = ".".join("*" if segment.isdigit() else segment for segment in key[0].split("."))
    groups.setdefault((pattern, *key[1:]), []).append(index)
  result = []
  for (pattern, *_), indices in groups.items():
    if len(indices) == 1:
      result.append((keys[indices[0]][0], indices))
      continue
    numbers = [_block_number(keys[index][0]) for index in indices]
    consecutive = [str(n) for n in range(int(numbers[0]), int(numbers[-1]) + 1)] == numbers
    name = f"{numbers[0]}-{numbers[-1]}" if consecutive else ",".join(numbers)
    result.append((pattern.replace("*", f"{{{name}}}", 1), indices))
  return result


def _block_number(path: str) -> str:
  """The first numeric segment of a module path; '' without one."""
  return next((segment for segment in path.split(".") if segment.isdigit()), "")
