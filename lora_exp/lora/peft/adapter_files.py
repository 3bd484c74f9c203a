"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

Where PEFT cannot compute what an adapter does, the files have the same format with our own names, `"peft": false` and
the reason. Files are read as a stranger's: nothing is run, nothing is large before it is known to fit, and whatever
the model has no place for is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.methods import Method
from lora_exp.lora.peft import tensors as peft_tensors
from lora_exp.lora.peft.adapter_config import PeftConfig
from lora_exp.lora.peft.config_writer import config_values
from lora_exp.lora.peft.names import Naming, module_name
from lora_exp.lora.peft.tensors import Place
from lora_exp.lora.peft.validation import AdapterFileCheck, trained_size
from lora_exp.runtime.files import write_atomically, write_json
from lora_exp.runtime.json_files import parse_json_object
from lora_exp.runtime.safetensors_reader import TensorEntry, read_arrays, read_header

__all__ = ["CONFIG", "WEIGHTS", "Naming", "load_adapter", "save_adapter"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LARGEST_CONFIG = 2**24  # bytes
SHOWN = 20  # problems that are listed


def save_adapter(
  directory: str | Path,
  adapter: Adapter,
  naming: Naming | None,
  metadata: Mapping,
  *,
  base: str | None = None,
  dropout: float = 0.0,
) -> bool:
  """Writes `adapter`, and returns whether PEFT can load it.

  `naming` says how PEFT calls the modules; None for a model that it does not know. `metadata` goes into
  adapter_config.json under `lora_exp` (PEFT ignores unknown keys), its `scaling: rslora` becomes `use_rslora`; `base`
  is the base's name or path.
  """
  rslora = metadata.get("scaling") == "rslora" and adapter.kind.uses_alpha
  made = peft_tensors.written(adapter, rslora)
  why = peft_tensors.reason(adapter, made, naming)
  if why is not None:
    naming = None
  full_shapes = {path: x.shape for path, x in adapter.full.items()}
  places = peft_tensors.layout(made.method, made.rows, made.leaf_names, full_shapes, naming, made.leads)
  own: dict[str, Any] = {**metadata, "method": adapter.method, "start": made.start}
  own |= {"leads": made.leads} if made.leads else {}
  own |= {"reason": why} if why is not None else {}
  config = config_values(made, adapter.full, naming, rslora, dropout, base)
  config |= {"peft": why is None, "lora_exp": own}
  exact = _exact(adapter, PeftConfig(config, CONFIG), made, naming)
  own |= {"exact": exact} if exact else {}
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = peft_tensors.arrays(adapter, made, places)
  write_atomically(directory / WEIGHTS, partial(save_file, tensors, metadata={"format": "pt"}))
  write_json(directory / CONFIG, config)
  return why is None


def _exact(
  adapter: Adapter, config: PeftConfig, made: peft_tensors.PeftTensors, naming: Naming | None
) -> dict[str, list[float]]:
  """[alpha, scale] of the rows that would be read a little otherwise."""
  # A method without files of its own that is no start comes back as the LoRA that it was written as.
  as_written = adapter.kind.peft is None and not made.start
  ours = {row.path: row for row in (made.rows if as_written else adapter.rows)}
  differ = {}
  for row in made.rows:
    alpha, scale, _ = _scaled(config, module_name(naming, row.path), row.rank)
    if (alpha, scale) != (wanted := (ours[row.path].alpha, ours[row.path].scale)):
      differ[row.path] = list(wanted)
  return differ


def _scaled(config: PeftConfig, name: str, rank: int) -> tuple[float, float, int]:
  """(alpha, scale, rank) of a module, at half its rank where the other half is what it started from."""
  alpha = config.alpha_of(name)
  scale = config.scale(alpha, rank)
  if config.start:
    rank, alpha = rank // 2, alpha / 2
  return float(rank) if config.form.alpha_key is None else alpha, scale, rank


def load_adapter(
  directory: str | Path,
  naming: Naming | None,
  shapes: Mapping[str, tuple[int, int]],
  full_shapes: Mapping[str, tuple[int, ...]] = {},
) -> Adapter:
  """Reads an adapter, ours or PEFT's, for a model whose adaptable modules have `shapes` (in, out).

  `full_shapes` are the model's parameters by their own paths, for biases and modules that were trained whole. Arrays
  come as float32 (float64 stays). AdaLoRA comes back as the LoRA that it was written as; DoRA's `kernel_norm2` is the
  base's and is not in a file. Raises InputError that lists every key, name, shape or value amiss.
  """
  directory = Path(directory)
  config, found = _opened(directory)
  weights = directory / WEIGHTS
  naming = naming if config.foreign else None
  fit = AdapterFileCheck(config, str(weights), naming, shapes, full_shapes)
  fit.compare(found)
  rows = [_as_trained(config, fit, row) for row in fit.rows]
  _raise(fit.problems)
  arrays = read_arrays(weights, found, fit.places)
  bad = [name for name, x in arrays.items() if not np.isfinite(x).all()]
  _raise([f"{weights}: {name} holds values that are not finite" for name in bad])
  leaves, full = _sorted(weights, fit.places, arrays)
  method = _started(config.own.get("method")) if config.start else fit.method.name
  return Adapter(method, tuple(rows), {row.path: _leaves(row, leaves, fit.method, config.start) for row in rows}, full)


def _started(method: Any) -> str:
  """The method of a file that holds a start: the one that the file names, or of an older file PiSSA."""
  known = method if isinstance(method, str) and method in methods.names() else "pissa"
  return known if methods.get(known).init_of else "pissa"


def _as_trained(config: PeftConfig, fit: AdapterFileCheck, row: AdaptedModule) -> AdaptedModule:
  """The row as it was when the file was written: where its numbers need more digits, they stand in our part."""
  alpha, scale, rank = _scaled(config, fit.names[row.path], row.rank)
  given = config.own.get("exact", {}).get(row.path) if isinstance(config.own.get("exact", {}), dict) else 0
  if given is not None:
    number = lambda x: isinstance(x, float | int) and not isinstance(x, bool) and 0 < x < 1e30
    if not isinstance(given, list) or len(given) != 2 or not all(map(number, given)) or not math.isclose(
      given[1], scale, rel_tol=1e-6
    ):
      fit.config_problem(f"lora_exp.exact of {row.path} is not its alpha and scale: the scale is {scale:.7g} by "
                         "lora_alpha and r; take lora_exp.exact out where those were changed")
    else:
      alpha, scale = map(float, given)
  count = math.prod(fit.leads.get(row.path, ())) * trained_size(
    fit.method, replace(row, rank=rank), fit.leaf_names[row.path]
  )
  return replace(row, rank=rank, alpha=alpha, scale=scale, parameters=count)


def _sorted(weights: Path, places: Mapping[str, Place], arrays: Mapping[str, np.ndarray]):
  """The arrays by path and leaf, those of all modules under "", and by path the parameters trained whole."""
  leaves: dict[str, dict[str, np.ndarray]] = {}
  full: dict[str, np.ndarray] = {}
  problems = []
  for name, place in places.items():
    x = place.loaded(arrays[name])
    into, key = (leaves.setdefault(place.path, {}), place.leaf) if place.leaf else (full, place.path)
    if key in into and not np.array_equal(into[key], x):
      problems.append(f"{weights}: {name} is not what the table has, and here the head is the table")
    into.setdefault(key, x)
  _raise(problems)
  return leaves, full


def _leaves(
  row: AdaptedModule, leaves: Mapping[str, Mapping[str, np.ndarray]], method: Method, start: bool
) -> dict[str, np.ndarray]:
  own = dict(leaves[row.path])
  for name, x in leaves.get("", {}).items():  # those that all modules share
    own[name] = x[tuple(slice(row.sizes()[axis]) for axis in method.leaves[name].axes)]
  if start:
    a, b, r = own["lora_a"], own["lora_b"], row.rank
    own |= {"lora_a": a[..., :r], "lora_b": b[..., :r, :], "start_a": a[..., r:], "start_b": -b[..., r:, :]}
  return {name: np.ascontiguousarray(x) for name, x in own.items()}


def _opened(directory: Path) -> tuple[PeftConfig, dict[str, TensorEntry]]:
  path, weights = directory / CONFIG, directory / WEIGHTS
  if not weights.is_file():
    pickle = f"; {PICKLE} is a pickle, which is never opened: save it with PEFT's safe_serialization=True"
    raise InputError(f"{directory} holds no adapter: {WEIGHTS} is missing"
                     f"{pickle if (directory / PICKLE).exists() else ''}")
  if not path.is_file():
    raise InputError(f"{directory} holds no adapter: {CONFIG} is missing")
  problems: list[str] = []
  opened: list[Any] = []
  for file, open_file in ((path, _config), (weights, read_header)):
    try:
      opened.append(open_file(file))
    except InputError as error:
      problems += error.problems
    except OSError as error:
      problems.append(f"{file} cannot be read: {error.strerror}")
  _raise(problems)
  return opened[0], opened[1]


def _config(path: Path) -> PeftConfig:
  if path.stat().st_size > LARGEST_CONFIG:
    raise InputError(f"{path} has more than {LARGEST_CONFIG:,} bytes: it is no adapter's config")
  return PeftConfig(parse_json_object(path.read_bytes(), path), str(path))


def _raise(problems: list[str]) -> None:
  if len(problems) > SHOWN:
    problems = [*problems[:SHOWN], f"… and {len(problems) - SHOWN:,} more"]
  if problems:
    raise InputError(problems)
