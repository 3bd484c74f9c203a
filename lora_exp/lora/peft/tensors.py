"""How PEFT calls an adapter's arrays, and the config that makes PEFT compute what we do (checked with PEFT 0.21.2).

PEFT stores lora_A (rank, in) and lora_B (out, rank), for GPT-2's Conv1D too; of a table lora_embedding_A and _B; VeRA's
random pair once. What PEFT has no name for is written as plain LoRA: PiSSA and OLoRA as [A, A₀] and [B; −B₀] at twice
the rank, AdaLoRA with its e folded into A and without the columns whose e is 0.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter

PREFIX = "base_model.model."  # before every module's name
SHARED = {"vera_a": "base_model.vera_A", "vera_b": "base_model.vera_B"}
FILED = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "magnitude"), "vera": ("lambda_d", "lambda_b")}
ENDS = {
  "lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector",
  "lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b",
}  # fmt: skip
AXES = {name: leaf.axes for method in FILED for name, leaf in methods.get(method).leaves.items()}
TABLE_ENDS = ENDS | {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


@dataclass(frozen=True)
class Naming:
  """How PEFT, and transformers below it, call the modules of a family."""

  prefix: str = ""  # before our module paths: "model." (the Llama family), "transformer." (GPT-2)
  bare: tuple[str, ...] = ("lm_head",)  # modules without the prefix; torch's Linear in every family
  conv1d: bool = False  # kernels are stored (in, out), as GPT-2's Conv1D does
  tied: tuple[str, str] | None = None  # our path of the table and PEFT's name of the head, where they are one
  model_type: str = ""  # for messages
  tables: tuple[str, ...] = ("embed_tokens", "wte", "wpe")  # modules that are look-ups


class Place(NamedTuple):
  """What one tensor of a file holds: `leaf` of the module at `path`, or (without a leaf) the parameter `path`."""

  path: str
  leaf: str
  shape: tuple[int, ...]  # in the file
  turned: bool  # its last two axes are swapped there


def module_name(naming: Naming | None, path: str) -> str:
  """PEFT's name of our module."""
  return path if naming is None or path in naming.bare else naming.prefix + path


def parameter_name(naming: Naming | None, path: str) -> tuple[str, bool]:
  """PEFT's name of our parameter, and whether it is stored transposed. Without a naming it is our own."""
  if naming is None:
    return path, False
  owner, _, leaf = path.rpartition(".")
  turned = leaf == "kernel" and (owner in naming.bare or not naming.conv1d)
  return f"{module_name(naming, owner)}.{'bias' if leaf == 'bias' else 'weight'}", turned


def layout(
  method: str,
  rows: Sequence[AdaptedModule],
  full: Mapping[str, tuple[int, ...]],
  naming: Naming | None,
  leads: Mapping[str, Sequence[int]],
) -> dict[str, Place]:
  """Every tensor of an adapter's file, by its name there.

  `full` are the parameters trained in full with their shapes, `leads` the leading axes of stacked kernels.
  """
  places = {}
  for row in rows:
    ends = TABLE_ENDS if naming is not None and row.path in naming.tables else ENDS
    for leaf in FILED[method]:
      shape = (*leads.get(row.path, ()), *_shape(leaf, row.fan_in, row.fan_out, row.rank))
      name = f"{PREFIX}{module_name(naming, row.path)}.{ends[leaf]}"
      places[name] = Place(row.path, leaf, shape, _turned(leaf))
    if naming is not None and naming.tied is not None and row.path == naming.tied[0] and method == "lora":
      head = PREFIX + naming.tied[1]  # its A and B are the table's B and A
      places[f"{head}.lora_A.weight"] = Place(row.path, "lora_b", (row.rank, row.fan_out), False)
      places[f"{head}.lora_B.weight"] = Place(row.path, "lora_a", (row.fan_in, row.rank), False)
  if method == "vera" and rows:
    sizes = [max(getattr(row, name) for row in rows) for name in ("fan_in", "fan_out", "rank")]
    places |= {name: Place("", leaf, _shape(leaf, *sizes), True) for leaf, name in SHARED.items()}
  return places | _full(rows, full, naming)


def _full(rows: Sequence[AdaptedModule], full: Mapping[str, tuple[int, ...]], naming: Naming | None) -> dict[str, Place]:
  adapted, places = {row.path for row in rows}, {}
  for path, shape in full.items():
    name, turned = parameter_name(naming, path)
    owner, _, leaf = path.rpartition(".")
    if naming is not None and owner in adapted:  # what PEFT adapts it wraps
      name = f"{module_name(naming, owner)}.base_layer.{leaf}"
    places[PREFIX + name] = Place(path, "", shape[::-1] if turned else shape, turned)
    if naming is not None and naming.tied is not None and path == f"{naming.tied[0]}.embedding":
      places[f"{PREFIX}{naming.tied[1]}.weight"] = Place(path, "", shape, False)
  return places


def _turned(leaf: str) -> bool:
  return len(AXES[leaf]) == 2


def _shape(leaf: str, fan_in: int, fan_out: int, rank: int) -> tuple[int, ...]:
  sizes = {"I": fan_in, "O": fan_out, "R": rank}
  shape = tuple(sizes[axis] for axis in AXES[leaf])
  return shape[::-1] if _turned(leaf) else shape


# What is written


class PeftTensors(NamedTuple):
  """An adapter as a file holds it."""

  method: str  # of FILED
  rows: list[AdaptedModule]  # at the ranks of the file
  leaves: dict[str, dict[str, np.ndarray]]
  leads: dict[str, list[int]]
  start: bool  # every module's second half is what it started from


def written(adapter: Adapter, rslora: bool) -> PeftTensors:
  """`adapter` in the leaves that PEFT knows, each row with the alpha that gives its scale."""
  method = adapter.method if adapter.method in FILED else "lora"
  rows: list[AdaptedModule] = []
  leaves: dict[str, dict[str, np.ndarray]] = {}
  leads: dict[str, list[int]] = {}
  for row in adapter.rows:
    own = dict(adapter.leaves[row.path])
    if "lora_a" in own:
      own = _as_lora(own, f"{row.path}.bias" in adapter.full)
      rank = own["lora_a"].shape[-1]
      lead = own["lora_a"].shape[:-2]
    else:
      rank, lead = row.rank, ()
    if not rank:
      continue
    alpha = row.alpha if rank == row.rank and _gives(row.alpha, rank, rslora, row.scale) else None
    if alpha is None:
      alpha = row.scale * (math.sqrt(rank) if rslora else rank)
    rows.append(replace(row, rank=rank, alpha=alpha))
    leaves[row.path] = own
    if lead:
      leads[row.path] = list(lead)
  starts = ["start_a" in adapter.leaves[row.path] for row in adapter.rows]
  return PeftTensors(method, rows, leaves, leads, any(starts) and all(starts) and adapter.method != "adalora")


def _as_lora(own: dict[str, np.ndarray], needed: bool) -> dict[str, np.ndarray]:
  """The leaves with AdaLoRA's e and the start in A and B; one direction stays where the module is `needed`."""
  a, b = own["lora_a"], own["lora_b"]
  if "lora_e" in own:
    kept = (own["lora_e"] != 0).reshape(-1, a.shape[-1]).any(axis=0)
    kept[0] |= needed and not kept.any()
    a, b = (a * own["lora_e"][..., None, :])[..., kept], b[..., kept, :]
  if "start_a" in own:
    a, b = np.concatenate([a, own["start_a"]], -1), np.concatenate([b, -own["start_b"]], -2)
  return own | {"lora_a": a, "lora_b": b}


def _gives(alpha: float, rank: int, rslora: bool, scale: float) -> bool:
  return math.isclose(alpha / (math.sqrt(rank) if rslora else rank), scale, rel_tol=1e-6)


def arrays(adapter: Adapter, made: PeftTensors, places: Mapping[str, Place]) -> dict[str, np.ndarray]:
  """The tensors of `places`, in float32 at least."""
  shared = _shared(made) if made.method == "vera" and made.rows else {}
  tensors = {}
  for name, place in places.items():
    if not place.leaf:
      x = np.asarray(adapter.full[place.path])
    else:
      x = np.asarray(made.leaves[place.path][place.leaf] if place.path else shared[place.leaf])
    x = x.astype(np.promote_types(x.dtype, np.float32))
    tensors[name] = np.ascontiguousarray(np.swapaxes(x, -1, -2) if place.turned else x)
    if tensors[name].shape != place.shape:
      raise ValueError(f"{name} is {tensors[name].shape}, and the table says {place.shape}")
  return tensors


def _shared(made: PeftTensors) -> dict[str, np.ndarray]:
  """VeRA's pair, of which each module has the first inputs, outputs and directions."""
  sizes = [max(getattr(row, name) for row in made.rows) for name in ("fan_in", "fan_out", "rank")]
  dtype = made.leaves[made.rows[0].path]["vera_a"].dtype
  a, b = np.zeros((sizes[0], sizes[2]), dtype), np.zeros((sizes[2], sizes[1]), dtype)
  for row in made.rows:
    a[: row.fan_in, : row.rank] = made.leaves[row.path]["vera_a"]
    b[: row.rank, : row.fan_out] = made.leaves[row.path]["vera_b"]
  return {"vera_a": a, "vera_b": b}


def reason(adapter: Adapter, made: PeftTensors, naming: Naming | None) -> str | None:
  """Why PEFT cannot compute what this adapter does, or None if it can."""
  if naming is None:
    return "PEFT does not know this kind of model"
  if not made.rows:
    return "no module is adapted, which PEFT refuses"
  if made.leads:
    return f"{next(iter(made.leads))} is a stack of kernels, which PEFT does not adapt"
  tables = [row.path for row in made.rows if row.path in naming.tables]
  if made.method == "vera" and tables:
    return f"{tables[0]} is a table of embeddings, which PEFT's VeRA does not adapt"
  if made.method == "vera" and len({row.rank for row in made.rows}) > 1:
    return "PEFT's VeRA has one rank for all modules"
  if made.method == "dora" and naming.tied is not None and naming.tied[0] in tables:
    return f"{naming.tied[0]} is the head as well, whose features PEFT's DoRA cannot scale"
  if made.method == "dora" and any("start_a" in adapter.leaves[row.path] for row in made.rows):
    return "PEFT's DoRA takes the norm of the kernel with everything that is added to it"
  return None


def config(
  made: PeftTensors, full: Iterable[str], naming: Naming | None, rslora: bool, dropout: float, base: str | None
) -> dict[str, Any]:
  """adapter_config.json, but for our own part of it."""
  names = {row.path: module_name(naming, row.path) for row in made.rows}
  tied = None if naming is None else naming.tied
  ties = tied is not None and (tied[0] in names or f"{tied[0]}.embedding" in full)
  heads = [tied[1]] if ties and tied is not None else []
  ranks, alphas = {names[r.path]: r.rank for r in made.rows}, {names[r.path]: _number(r.alpha) for r in made.rows}
  if ties and tied is not None and tied[0] in names:
    ranks[tied[1]], alphas[tied[1]] = ranks[names[tied[0]]], alphas[names[tied[0]]]
  rank, alpha = _usual(ranks.values(), 1), _usual(alphas.values(), 1)
  whole, biases = trained_modules(full)
  vera = made.method == "vera"
  found: dict[str, Any] = {
    "peft_type": "VERA" if vera else "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "inference_mode": True,
    "r": rank,
    "target_modules": _targets(list(ranks), naming),
    "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank},
    "fan_in_fan_out": naming is not None and naming.conv1d,
    "bias": _bias(biases, names, "vera_only" if vera else "lora_only"),
    "modules_to_save": [*(module_name(naming, path) for path in whole), *(heads if ties and tied and
                        tied[0] in whole else [])] or None,
  }
  if vera:
    return found | {"vera_dropout": dropout, "save_projection": True, "projection_prng_key": 0, "d_initial": 0.1,
                    "init_weights": True}
  return found | {
    "lora_alpha": alpha,
    "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != alpha},
    "lora_dropout": dropout,
    "use_rslora": rslora,
    "use_dora": made.method == "dora",
    "init_lora_weights": True,
    "ensure_weight_tying": ties,
  }


def trained_modules(full: Iterable[str]) -> tuple[list[str], list[str]]:
  """The modules that are trained whole, and the biases beside them, of parameters by their own paths."""
  owners = {path: path.rpartition(".")[0] for path in full}
  whole = list(dict.fromkeys(owner for path, owner in owners.items() if not path.endswith(".bias")))
  return whole, [path for path, owner in owners.items() if owner not in whole]


def _bias(biases: Sequence[str], adapted: Iterable[str], only: str) -> str:
  if not biases:
    return "none"
  return only if {path.rpartition(".")[0] for path in biases} <= set(adapted) else "all"


def _targets(names: list[str], naming: Naming | None) -> list[str] | str:
  """PEFT takes the names of a list as ends of names: with a prefix they are whole, else a pattern says so."""
  if naming is None or naming.prefix:
    return names
  return "|".join(map(re.escape, names))


def _exactly(name: str) -> str:
  """A key of rank_pattern or alpha_pattern, which PEFT takes as a regular expression for the end of a name."""
  return "^" + re.escape(name)


def _usual(values: Iterable, default):
  return max(Counter(values).items(), key=lambda item: item[1], default=(default, 0))[0]


def _number(value: float) -> int | float:
  return int(value) if value == int(value) else value
