"""The sweep that a run is a trial of: what Hydra has written beside and above it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_exp.cli.overrides import parse

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it was built
SHORT = {"lora.rank": "r", "lora.targets": "", "train.seed": "s", "data.seed": "data", "model.seed": "base"}


@dataclass(frozen=True)
class Place:
  """A trial and its sweep."""

  sweep: Path
  number: str  # its directory's name
  own: dict[str, str]  # what was given to it and not to every trial: {setting or group: value}

  def name(self, method: str) -> str:
    """Its number and what is its own, as 3-lora-r8-attention-s1."""
    rest = {key: value for key, value in self.own.items() if key != "lora"}
    words = [SHORT.get(key, key.rpartition(".")[2] if "." in key else "") + value for key, value in rest.items()]
    return "-".join([self.number, self.own.get("lora", method), *words])


def sweep_of(run_dir: Path) -> Place | None:
  """Where `run_dir` stands in its sweep; None for a run of its own."""
  above, beside = run_dir.parent / "multirun.yaml", run_dir / ".hydra" / "overrides.yaml"
  if not (above.is_file() and beside.is_file()):
    return None
  hydra = _read(above)["hydra"]
  listed = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
  alike, given = _values([*listed, *hydra["overrides"]["task"]]), _values(_read(beside))
  return Place(run_dir.parent, run_dir.name, {key: value for key, value in given.items() if alike.get(key) != value})


def _read(file: Path) -> Any:
  return yaml.load(file.read_text(encoding="utf-8"), LOADER)


def _values(texts: list[str]) -> dict[str, str]:
  """Setting or group -> its value, of the overrides that have one."""
  one = [o for o in parse(texts, None)[0] if not (o.is_delete() or o.is_sweep_override())]
  return {o.get_key_element(): o.get_value_element_as_str().strip("'\"") for o in one}
