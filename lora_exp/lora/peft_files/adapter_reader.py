"""Loads adapters from files in PEFT's format. Anything that does not fit the model is an error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter, BaseChanges
from lora_exp.lora.methods import Method
from lora_exp.lora.peft_files.adapted_model import AdaptedModel, AdapterFile, fitted
from lora_exp.lora.peft_files.adapter_config import PeftConfig
from lora_exp.lora.peft_files.adapter_files import WEIGHTS, raise_problems, read_files
from lora_exp.lora.peft_files.names import Naming
from lora_exp.lora.peft_files.stored_names import PeftNames
from lora_exp.lora.peft_files.tensor_comparison import compare
from lora_exp.lora.peft_files.tensors import FileTensor
from lora_exp.lora.peft_files.validation import AdapterFileCheck
from lora_exp.runtime import console
from lora_exp.runtime.foreign_files import damage_reported
from lora_exp.runtime.safetensors_reader import TensorEntry, read_arrays


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
  with damage_reported(directory, "an adapter"):
    return _load(Path(directory), naming, shapes, full_shapes)


def _load(
  directory: Path, naming: Naming | None, shapes: Mapping[str, tuple[int, int]],
  full_shapes: Mapping[str, tuple[int, ...]],
) -> Adapter:  # fmt: skip
  config, entries = read_files(directory)
  if config.draws_start:
    console.show_warning(f"{directory}: PEFT approximates the part of the base that it subtracts with random numbers "
                         f"(init_lora_weights={config.values['init_lora_weights']}); here it is computed exactly")
  model = AdaptedModel(naming if config.peft_names else None, shapes, full_shapes)
  check = _checked(directory, config, entries, model)
  rows = [_trained_row(config, check, row) for row in check.rows]
  raise_problems(check.problems)
  _warn_unused(check)
  arrays, experts = _arrays(check)
  by_module, full = _by_module(check.where, check.file_tensors, arrays)
  leaves = {row.path: _leaves(row, by_module, check.method, config.start) for row in rows}
  if check.experts is not None:
    leaves |= {row.path: check.experts.leaves(row, experts) for row in check.expert_rows}
  if check.method.peft is None:  # loaded as another method
    rows, leaves = _converted(rows, leaves, check.method)
  adapted = tuple(_with_kernels(row, leaves[row.path], check.method) for row in (*rows, *check.expert_rows))
  return Adapter(_method_name(config, check), adapted, leaves, full, _base_changes(check, arrays))


def _converted(
  rows: Sequence[AdaptedModule], leaves: Mapping[str, Mapping[str, np.ndarray]], method: Method
) -> tuple[list[AdaptedModule], dict[str, dict[str, np.ndarray]]]:
  """The rows and leaves of `method` (AdaLoRA) as those of `method.peft_name`, without modules of rank 0."""
  converted = {row.path: method.peft_leaves(leaves[row.path], True) for row in rows if row.rank}
  target = methods.get(method.peft_name)
  ranks = {path: target.rank_of(arrays) for path, arrays in converted.items()}
  new_rows = [replace(row, rank=ranks[row.path], alpha=row.scale * ranks[row.path]) for row in rows if row.rank]
  counts = {row.path: target.trained_size(tuple(target.leaves), row) for row in new_rows}
  return [replace(row, parameters=counts[row.path]) for row in new_rows], converted


def _with_kernels(row: AdaptedModule, leaves: Mapping[str, np.ndarray], method: Method) -> AdaptedModule:
  """`row` with the numbers of the adapted kernels of a stack: those whose leaves are not zero."""
  lead = method.lead_of(leaves)
  if len(lead) != 1 or not method.zeros_stay_zero:
    return row
  used = np.any([np.any(x.reshape(lead[0], -1) != 0, axis=1) for x in leaves.values()], axis=0)
  if used.all() or not used.any():
    return row
  numbers = tuple(int(i) for i in np.flatnonzero(used))
  return replace(row, kernels=numbers, parameters=row.parameters // lead[0] * len(numbers))


def _checked(
  directory: Path, config: PeftConfig, entries: Mapping[str, TensorEntry], model: AdaptedModel
) -> AdapterFileCheck:
  """The comparison of the config and the header with `model`, or with a variant of it that the file needs."""
  names = PeftNames(config.form, model.naming, model.paths()).read(entries)
  stored = {name: entries[tensor.name] for name, tensor in names.tensors.items()}
  file = AdapterFile(directory / WEIGHTS, names, stored, entries)
  problems = [f"{file.path}: {problem}" for problem in names.problems]
  raise_problems(problems)
  model = fitted(model, config, file, problems)
  raise_problems(problems)
  check = AdapterFileCheck(config, file, model)
  compare(check)
  return check


def _warn_unused(check: AdapterFileCheck) -> None:
  """Warns about keys of rank_pattern and alpha_pattern that match no adapted module."""
  for field, keys in check.unused_patterns().items():
    console.show_warning(f"{check.config.where}: {field} names no adapted module with {', '.join(keys[:4])}"
                         f"{' and others' if len(keys) > 4 else ''}; this has no effect, as in PEFT")


def _arrays(check: AdapterFileCheck) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """The tensors by PEFT's name, and those of experts by their name in the file. Raises InputError for NaN values."""
  file = check.file
  arrays = file.arrays([*check.file_tensors, *check.parameters, *check.token_tables, *check.output_biases])
  experts = read_arrays(file.path, file.raw, check.experts.used) if check.experts is not None else {}
  by_stored_name = {file.names.tensors[name].name: x for name, x in arrays.items()} | experts
  not_finite = [name for name, x in by_stored_name.items() if not np.isfinite(x).all()]
  raise_problems([f"{file.path}: {name} has values that are not finite" for name in not_finite])
  return arrays, experts


def _base_changes(check: AdapterFileCheck, arrays: Mapping[str, np.ndarray]) -> BaseChanges:
  """The changes of the base in the file."""
  _, parameters = _by_module(check.where, check.parameters, arrays)
  return BaseChanges(
    parameters=parameters,
    token_rows={table.path: (np.asarray(table.ids), arrays[name]) for name, table in check.token_tables.items()},
    biases={row.path: np.float32(row.scale) * arrays[name] for name, row in check.output_biases.items()},
    vocab_size=check.model.vocab_size,
    untied=check.model.untied,
  )


def _method_name(config: PeftConfig, check: AdapterFileCheck) -> str:
  """The method of the adapter; one with A₀ and B₀ if the file holds them, or if PEFT computes them from the base."""
  if config.start:
    return _init_method(config.extra.get("method"))
  method = config.init_method or check.method
  return method.name if method.peft is not None or method.init_of else method.peft_name


def _init_method(method: Any) -> str:
  """The method of a file that holds A₀ and B₀: the one that the file names, or PiSSA for older files."""
  name = method if isinstance(method, str) and method in methods.names() else "pissa"
  return name if methods.get(name).init_of else "pissa"


def _trained_row(config: PeftConfig, check: AdapterFileCheck, row: AdaptedModule) -> AdaptedModule:
  """The row of the adapter before it was written, with the exact alpha and scale if the file has them."""
  alpha, scale, rank = config.scaled(check.names_of(row.path), row.rank)
  exact_values = config.extra.get("exact", {})
  exact: Any = exact_values.get(row.path) if isinstance(exact_values, dict) else 0
  if exact is not None:
    if _is_exact(exact, scale):
      alpha, scale = map(float, exact)
    else:
      check.config_problem(f"lora_exp.exact of {row.path} is not its alpha and scale: the scale is {scale:.7g} by "
                           "lora_alpha and r; remove lora_exp.exact if you changed those")
  per_kernel = check.method.trained_size(check.leaf_names[row.path], replace(row, rank=rank))
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
  where: str, file_tensors: Mapping[str, FileTensor], arrays: Mapping[str, np.ndarray]
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
      problems.append(f"{where}: {name} differs from the tensor of the embedding, to which the head is tied")
    target.setdefault(key, x)
  raise_problems(problems)
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
