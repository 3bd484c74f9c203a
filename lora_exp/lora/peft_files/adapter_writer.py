"""Writes adapter files in PEFT's format.

If PEFT cannot compute the same as an adapter, the files use our own module names, the config has `"peft": false`, and
lora_exp.json has the reason.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from lora_exp.lora.adapter import Adapter
from lora_exp.lora.peft_files import tensors as peft_tensors
from lora_exp.lora.peft_files.adapter_config import PeftConfig
from lora_exp.lora.peft_files.adapter_files import CONFIG, METADATA, WEIGHTS
from lora_exp.lora.peft_files.config_writer import base_fields, config_values
from lora_exp.lora.peft_files.names import Naming, module_name
from lora_exp.runtime.files import write_atomically, write_json


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


def _exact_values(
  adapter: Adapter, config: PeftConfig, converted: peft_tensors.PeftTensors, naming: Naming | None
) -> dict[str, list[float]]:
  """[alpha, scale] of the modules whose values cannot be computed exactly from PEFT's fields."""
  # A method without a file format is loaded as LoRA, unless the file also holds A₀ and B₀.
  loaded_as_lora = adapter.kind.peft is None and not converted.start
  expected = {row.path: row for row in (converted.rows if loaded_as_lora else adapter.rows)}
  exact_values = {}
  for row in converted.rows:
    alpha, scale, _ = config.scaled([module_name(naming, row.path)], row.rank)
    exact = expected[row.path].alpha, expected[row.path].scale
    if (alpha, scale) != exact:
      exact_values[row.path] = list(exact)
  return exact_values
