"""An adapter in the layout of mlx-lm: adapters.safetensors and adapter_config.json.

mlx-lm has one rank and one scale for all modules, and adapts the same modules in each of the last `num_layers` blocks.
Smaller ranks are padded with zeros, other scales are part of B, and modules without an update have B = 0.
Source: mlx_lm/tuner/utils.py and lora.py, which compute y = x·W + scale · (x·A)·B.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_exp.config import InputError
from lora_exp.runtime.files import write_atomically, write_json
from lora_exp.train.serving.served_adapter import ServedAdapter

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


def write_adapter(directory: Path, served: ServedAdapter, base: str | None) -> None:
  """Writes the adapter. Raises InputError for one that is not plain LoRA, or adapts modules outside of the blocks."""
  factors = served.factors()
  rank = max(tensor.a_IR.shape[1] for tensor in factors.values())
  scale = next(iter(factors.values())).scale
  arrays: dict[str, np.ndarray] = {}
  keys: dict[str, None] = {}
  for path, tensor in factors.items():
    module = tensor.hf_name.removesuffix(".weight")
    before, number, inside = _block_parts(module, path)
    keys[inside] = None
    missing = rank - tensor.a_IR.shape[1]
    arrays[f"{before}{number}.{inside}.lora_a"] = np.pad(tensor.a_IR, ((0, 0), (0, missing))).astype(np.float32)
    b_RO = np.pad(tensor.b_RO, ((0, missing), (0, 0))) * (tensor.scale / scale)
    arrays[f"{before}{number}.{inside}.lora_b"] = b_RO.astype(np.float32)
  layers = served.plan.cfg.model.layers
  config: dict[str, Any] = {
    "model": base, "fine_tune_type": "lora", "num_layers": layers,
    "lora_parameters": {"rank": rank, "scale": float(scale), "dropout": 0.0, "keys": list(keys)},
  }  # fmt: skip
  write_atomically(directory / WEIGHTS, lambda file: save_file(arrays, file, {"format": "mlx"}))
  write_json(directory / CONFIG, config)


def _block_parts(module: str, path: str) -> tuple[str, str, str]:
  """(`model.layers.`, number, module in the block) of a module. Raises InputError for one outside of the blocks."""
  before, layers, rest = module.partition("layers.")
  number, _, inside = rest.partition(".")
  if not layers or not number.isdigit():
    raise InputError(f"{path} is not in a block, and mlx-lm adapts modules in blocks only; use format=merged")
  return before + layers, number, inside
