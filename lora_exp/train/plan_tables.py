"""The tables that a run prints before it trains: settings, adapted modules, parameters, sharding."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_exp.config import Config
from lora_exp.config.conversion import shown
from lora_exp.runtime import console
from lora_exp.train.plan import Plan


def show_config(cfg: Config, run_dir: Path) -> None:
  """Shows every setting that is not null, a line for each group; for further data only what differs from `data`."""
  node = {name: value for name, value in asdict(cfg).items() if name not in ("format", "out", "merge")}
  if cfg.model.base != "pretrain":
    node["pretrain_data"], node["model"]["pretrain"] = None, None
  for name in ("pretrain_data", "retain"):
    if node[name] is not None:
      node[name] = {key: value for key, value in node[name].items() if value != node["data"][key]}
  console.show_facts(str(run_dir), dict(_lines(node, "")))


def _lines(node: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
  words = [f"{key}={shown(value)}" for key, value in node.items() if value is not None and not isinstance(value, dict)]
  if words or path in ("pretrain_data", "retain"):
    yield path or "run", " ".join(words) or "as data"
  for key, value in node.items():
    if isinstance(value, dict):
      yield from _lines(value, f"{path}.{key}" if path else key)


def show_parameters(plan: Plan) -> None:
  """Shows the adapted modules, the parameter counts and, on several devices, the shardings."""
  if plan.table:
    columns = ("module", "kernel", "rank", "alpha", "scale", "trainable")
    rows = [(r.path, f"{r.fan_in}×{r.fan_out}", r.rank, r.alpha, r.scale, r.parameters) for r in plan.table]
    console.show_table(f"Adapted modules ({len(rows)})", columns, _folded(rows))
  counts = plan.parameters()
  facts = {**counts, "percent": f"{counts['percent']:.3g} %"}
  console.show_facts(f"Parameters, lora={plan.cfg.lora.method}", facts)
  if plan.layout.mesh.size > 1:
    split = " × ".join(f"{k} {v}" for k, v in plan.layout.mesh.shape.items() if v > 1)
    console.show_table(f"Sharding over {split}", ("array", "shape", "split over", "note"), plan.layout.table(plan.base))


def _folded(rows: list[tuple]) -> list[tuple]:
  """`rows`, joined where they differ only in their block number: `blocks.{0-3}.linear1`, last column summed."""
  found = []
  for name, places in folded(rows):
    _, *rest = rows[places[0]]
    found.append((name, *rest[:-1], rest[-1] * len(places)))
  return found


def folded(keys: Sequence[tuple]) -> list[tuple[str, list[int]]]:
  """(name, indices) of the keys that differ only in the block number of their first element, a module path."""
  groups: dict[tuple, list[int]] = {}
  for place, key in enumerate(keys):
    kind = ".".join("*" if s.isdigit() else s for s in key[0].split("."))
    groups.setdefault((kind, *key[1:]), []).append(place)
  found = []
  for (kind, *_), places in groups.items():
    numbers = [next((s for s in keys[p][0].split(".") if s.isdigit()), "") for p in places]
    if len(places) == 1:
      found.append((keys[places[0]][0], places))
      continue
    whole = [str(n) for n in range(int(numbers[0]), int(numbers[-1]) + 1)] == numbers
    name = f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(numbers)
    found.append((kind.replace("*", f"{{{name}}}", 1), places))
  return found
