"""Adapter files in PEFT's format: adapter_config.json and adapter_model.safetensors.

Values that PEFT does not know are stored in a third file, lora_exp.json. If PEFT cannot compute the same as an adapter,
the files use our own module names, the config has `"peft": false`, and lora_exp.json has the reason. Files are
untrusted input: no code in them is executed, sizes are checked before arrays are read, and anything that does not fit
the model is an error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter, BaseChanges
from lora_exp.lora.methods import Method
from lora_exp.lora.peft import tensors as peft_tensors
from lora_exp.lora.peft.adapted_model import AdaptedModel, AdapterFile, fitted
from lora_exp.lora.peft.adapter_config import PeftConfig
from lora_exp.lora.peft.config_writer import base_fields, config_values
from lora_exp.lora.peft.names import Naming, module_name
from lora_exp.lora.peft.stored_names import PeftNames
from lora_exp.lora.peft.tensors import FileTensor
from lora_exp.lora.peft.validation import AdapterFileCheck, trained_size
from lora_exp.runtime import console
from lora_exp.runtime.files import write_atomically, write_json
from lora_exp.runtime.json_files import parse_json_object
from lora_exp.runtime.safetensors_reader import TensorEntry, read_arrays, read_header

__all__ = ["CONFIG", "METADATA", "WEIGHTS", "Naming", "load_adapter", "read_metadata", "save_adapter"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
METADATA = "lora_exp.json"  # values that PEFT does not know; version 0.1.0 stored them in the config, under `lora_exp`
LARGEST_CONFIG = 2**24  # bytes
SHOWN = 20  # largest number of problems to list


def save_adapter(
  directory: str | Path,
  adapter: Adapter,
  naming: Naming | None,
  metadata: Mapping,
  *,
  base: str | None = None,
  dropout: float = 0.0,
) -> bool:
  """Writes `adapter` to `directory` and returns whether PEFT can load it.

  Arrays are written as float32 or wider.

  Args:
    directory: is created if it does not exist.
    adapter: the adapter.
    naming: PEFT's names of the modules; None for a model that PEFT does not support.
    metadata: JSON values, stored in lora_exp.json. `scaling: rslora` also sets `use_rslora`.
    base: name or path of the base model.
    dropout: the dropout rate to store.
  """
  rslora = metadata.get("scaling") == "rslora" and adapter.kind.uses_alpha
  converted = peft_tensors.convert(adapter, rslora)
  reason = peft_tensors.unsupported_reason(adapter, converted, naming)
  if reason is not None:
    naming = None
  full_shapes = {path: x.shape for path, x in adapter.full.items()}
  file_tensors = peft_tensors.layout(
    converted.method, converted.rows, converted.leaf_names, full_shapes, naming, converted.leads
  )
  extra: dict[str, Any] = {**metadata, "method": adapter.method, "start": converted.start}
  if converted.leads and naming is None:
    extra["leads"] = converted.leads
  if reason is not None:
    extra["reason"] = reason
  config = config_values(converted, adapter.full, naming, rslora, dropout, base) | base_fields(adapter.base, naming)
  if reason is not None:
    config["peft"] = False
  exact_values = _exact_values(adapter, PeftConfig(config | {"lora_exp": extra}, CONFIG), converted, naming)
  if exact_values:
    extra["exact"] = exact_values
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = peft_tensors.arrays(adapter, converted, file_tensors)
  tensors |= peft_tensors.base_arrays(adapter.base, converted.rows, naming)
  write_atomically(directory / WEIGHTS, partial(save_file, tensors, metadata={"format": "pt"}))
  write_json(directory / METADATA, extra)
  write_json(directory / CONFIG, config)
  return reason is None


def read_metadata(directory: Path) -> dict[str, Any]:
  """Reads the metadata that `save_adapter` wrote; {} for an adapter of another program."""
  if (directory / METADATA).is_file():
    return _read_json(directory / METADATA)
  metadata = _read_json(directory / CONFIG).get("lora_exp", {})
  return metadata if isinstance(metadata, dict) else {}


def _exact_values(
  adapter: Adapter, config: PeftConfig, converted: peft_tensors.PeftTensors, naming: Naming | None
) -> dict[str, list[float]]:
  """[alpha, scale] of the modules whose values cannot be computed exactly from PEFT's fields."""
  # A method without a file format is loaded as LoRA, unless the file also holds A₀ and B₀.
  loaded_as_lora = adapter.kind.peft is None and not converted.start
  expected = {row.path: row for row in (converted.rows if loaded_as_lora else adapter.rows)}
  exact_values = {}
  for row in converted.rows:
    alpha, scale, _ = _scaled(config, [module_name(naming, row.path)], row.rank)
    exact = expected[row.path].alpha, expected[row.path].scale
    if (alpha, scale) != exact:
      exact_values[row.path] = list(exact)
  return exact_values


def _scaled(config: PeftConfig, names: Sequence[str], rank: int) -> tuple[float, float, int]:
  """(alpha, scale, rank) of a module from PEFT's fields; half of alpha and rank if the file holds A₀ and B₀."""
  alpha = config.alpha_of(names)
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
  """Loads an adapter that was written by `save_adapter` or by PEFT.

  Arrays are float32, or float64 if the file has float64. AdaLoRA is loaded as LoRA. The constant `kernel_norm2` of DoRA
  is not in the file; see `completed`.

  Args:
    directory: holds adapter_config.json and adapter_model.safetensors.
    naming: PEFT's names of the model's modules, or None.
    shapes: (in, out) of every adaptable module of the model, by path.
    full_shapes: shapes of all parameters of the model, by path; for biases and modules that were trained in full.

  Raises:
    InputError: lists every key, name, shape or value that is invalid or does not fit the model.
  """
  directory = Path(directory)
  config, entries = _read_files(directory)
  naming = naming if config.peft_names else None
  if config.draws_start:
    console.show_warning(f"{directory}: PEFT approximates the part of the base that it subtracts with random numbers "
                         f"(init_lora_weights={config.values['init_lora_weights']}); here it is computed exactly")
  model = AdaptedModel(naming, shapes, full_shapes)
  names = PeftNames(config.form, naming, model.paths()).read(entries)
  stored = {name: entries[tensor.name] for name, tensor in names.tensors.items()}
  file = AdapterFile(directory / WEIGHTS, names, stored, entries)
  problems = [f"{file.path}: {problem}" for problem in names.problems]
  _raise_problems(problems)
  model = fitted(model, config, file, problems)
  _raise_problems(problems)
  check = AdapterFileCheck(config, file, model)
  check.compare()
  rows = [_trained_row(config, check, row) for row in check.rows]
  _raise_problems(check.problems)
  for field, keys in check.unused_patterns().items():
    console.show_warning(f"{config.where}: {field} names no adapted module with {', '.join(keys[:4])}"
                         f"{' and others' if len(keys) > 4 else ''}; it has no effect there, in PEFT either")
  arrays = file.arrays([*check.file_tensors, *check.parameters, *check.token_tables, *check.output_biases])
  experts = check.experts.used if check.experts is not None else ()
  stacked = read_arrays(file.path, entries, experts)
  all_arrays = {**{names.tensors[name].name: x for name, x in arrays.items()}, **stacked}
  not_finite = [name for name, x in all_arrays.items() if not np.isfinite(x).all()]
  _raise_problems([f"{file.path}: {name} has values that are not finite" for name in not_finite])
  by_module, full = _by_module(file.path, check.file_tensors, arrays)
  _, parameters = _by_module(file.path, check.parameters, arrays)
  changes = BaseChanges(
    parameters=parameters,
    token_rows={path: (np.asarray(ids), arrays[name]) for name, (path, ids, _) in check.token_tables.items()},
    biases={row.path: np.float32(row.scale) * arrays[name] for name, row in check.output_biases.items()},
    vocab_size=model.vocab_size,
    untied=model.untied,
  )
  leaves = {row.path: _leaves(row, by_module, check.method, config.start) for row in rows}
  if check.experts is not None:
    leaves |= {row.path: check.experts.leaves(row, stacked) for row in check.expert_rows}
    rows += check.expert_rows
  return Adapter(_method_name(config, check), tuple(rows), leaves, full, changes)


def _method_name(config: PeftConfig, check: AdapterFileCheck) -> str:
  """The method of the adapter; one with A₀ and B₀ if the file holds them, or if PEFT computes them from the base."""
  if config.start:
    return _init_method(config.extra.get("method"))
  return (config.init_method or check.method).name


def _init_method(method: Any) -> str:
  """The method of a file that holds A₀ and B₀: the one that the file names, or PiSSA for older files."""
  name = method if isinstance(method, str) and method in methods.names() else "pissa"
  return name if methods.get(name).init_of else "pissa"


def _trained_row(config: PeftConfig, check: AdapterFileCheck, row: AdaptedModule) -> AdaptedModule:
  """The row of the adapter before it was written, with the exact alpha and scale if the file has them."""
  alpha, scale, rank = _scaled(config, check.names_of(row.path), row.rank)
  exact_values = config.extra.get("exact", {})
  exact: Any = exact_values.get(row.path) if isinstance(exact_values, dict) else 0
  if exact is not None:
    if _is_exact(exact, scale):
      alpha, scale = map(float, exact)
    else:
      check.config_problem(f"lora_exp.exact of {row.path} is not its alpha and scale: the scale is {scale:.7g} by "
                           "lora_alpha and r; remove lora_exp.exact if you changed those")
  per_kernel = trained_size(check.method, replace(row, rank=rank), check.leaf_names[row.path])
  count = math.prod(check.leads.get(row.path, ())) * per_kernel
  return replace(row, rank=rank, alpha=alpha, scale=scale, parameters=count)


def _is_exact(value: Any, scale: float) -> bool:
  """Whether `value` is [alpha, scale] with positive numbers and about this scale."""
  if not isinstance(value, list) or len(value) != 2:
    return False
  if not all(isinstance(x, float | int) and not isinstance(x, bool) and 0 < x < 1e30 for x in value):
    return False
  return math.isclose(value[1], scale, rel_tol=1e-6)


def _by_module(
  weights: Path, file_tensors: Mapping[str, FileTensor], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
  """Returns the leaves by path and name (shared leaves under the path ""), and the fully trained parameters by path."""
  leaves: dict[str, dict[str, np.ndarray]] = {}
  full: dict[str, np.ndarray] = {}
  problems = []
  for name, file_tensor in file_tensors.items():
    x = file_tensor.from_file(arrays[name])
    if file_tensor.leaf:
      target, key = leaves.setdefault(file_tensor.path, {}), file_tensor.leaf
    else:
      target, key = full, file_tensor.path
    if key in target and not np.array_equal(target[key], x):
      problems.append(f"{weights}: {name} differs from the tensor of the embedding, to which the head is tied")
    target.setdefault(key, x)
  _raise_problems(problems)
  return leaves, full


def _leaves(
  row: AdaptedModule, leaves: Mapping[str, Mapping[str, np.ndarray]], method: Method, start: bool
) -> dict[str, np.ndarray]:
  """The leaves of one module; `start`: the second half of the ranks holds A₀ and −B₀."""
  module_leaves = dict(leaves[row.path])
  for name, x in leaves.get("", {}).items():  # shared leaves
    module_leaves[name] = x[tuple(slice(row.sizes()[axis]) for axis in method.leaves[name].axes)]
  if start:
    a, b, r = module_leaves["lora_a"], module_leaves["lora_b"], row.rank
    module_leaves |= {"lora_a": a[..., :r], "lora_b": b[..., :r, :], "start_a": a[..., r:], "start_b": -b[..., r:, :]}
  return {name: np.ascontiguousarray(x) for name, x in module_leaves.items()}


def _read_files(directory: Path) -> tuple[PeftConfig, dict[str, TensorEntry]]:
  """The config, and the header of the weights. Raises InputError if a file is missing or cannot be read."""
  path, weights = directory / CONFIG, directory / WEIGHTS
  if not weights.is_file():
    pickle = (f"; {PICKLE} is a pickle, which is not safe to load: if you trust it, write the tensors of "
              "torch.load(FILE, weights_only=True) with safetensors.torch.save_file")
    raise InputError(f"{directory} contains no adapter: {WEIGHTS} is missing"
                     f"{pickle if (directory / PICKLE).exists() else ''}")
  if not path.is_file():
    raise InputError(f"{directory} contains no adapter: {CONFIG} is missing")
  problems: list[str] = []
  contents: list[Any] = []
  for file, read_file in ((path, _read_config), (weights, read_header)):
    try:
      contents.append(read_file(file))
    except InputError as error:
      problems += error.problems
    except OSError as error:
      problems.append(f"{file} cannot be read: {error.strerror}")
  _raise_problems(problems)
  return contents[0], contents[1]


def _read_config(path: Path) -> PeftConfig:
  """adapter_config.json with our metadata. Raises InputError if a file is too large or invalid."""
  values = _read_json(path)
  metadata = path.parent / METADATA
  if "lora_exp" not in values and metadata.is_file():
    values["lora_exp"] = _read_json(metadata)
  return PeftConfig(values, str(path))


def _read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises InputError if it is too large or invalid."""
  if path.stat().st_size > LARGEST_CONFIG:
    raise InputError(f"{path} has more than {LARGEST_CONFIG:,} bytes: it is not a file of an adapter")
  return parse_json_object(path.read_bytes(), path)


def _raise_problems(problems: list[str]) -> None:
  """Raises InputError with the first problems, if there are any."""
  if len(problems) > SHOWN:
    problems = [*problems[:SHOWN], f"… and {len(problems) - SHOWN:,} more"]
  if problems:
    raise InputError(problems)
