"""GGUF files of a run for llama.cpp: the adapter (`format=gguf`), the merged model, or the base, with its tokenizer."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_exp.config import InputError
from lora_exp.data.tokenization.gguf_settings import gguf_tokenizer
from lora_exp.data.tokenization.save import save_tokenizer
from lora_exp.models.hf_export import same_model, to_hf
from lora_exp.models.registry import get_family
from lora_exp.models.weights.gguf_config import read_gguf_config
from lora_exp.models.weights.gguf_names import GgufNames, gguf_names
from lora_exp.models.weights.gguf_writer import write_gguf_adapter, write_gguf_model
from lora_exp.models.weights.hf_writer import stored_tensors
from lora_exp.models.weights.locate import base_name, find_weights, gguf_file, is_path
from lora_exp.runtime import console
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.program import Tree
from lora_exp.train.plan import Plan
from lora_exp.train.serving.served_adapter import ServedAdapter

ADAPTER_FILE, MODEL_FILE = "adapter.gguf", "model.gguf"


def plan_names(plan: Plan) -> tuple[GgufNames, dict[str, Any]]:
  """(names, config.json) of the plan's model. Raises InputError if llama.cpp has no such model."""
  config = to_hf(plan.cfg.model, plan.vocab_size)
  names = gguf_names(config)
  assert config is not None, "`gguf_names` refuses it"
  return names, config


def write_adapter(directory: Path, served: ServedAdapter) -> None:
  """Writes adapter.gguf. Raises InputError for an adapter that is not plain LoRA, or a model without such files."""
  names, _ = plan_names(served.plan)
  tensors = list(served.factors().values())
  settings = _origin(served.plan)
  with console.progress("write", 2 * len(tensors), "tensors") as bar:
    write_gguf_adapter(directory / ADAPTER_FILE, names, tensors, settings, bar.advance)


def write_model(directory: Path, plan: Plan, params: Tree, kind: str) -> None:
  """Writes model.gguf with matrices of `kind` (f32, f16, q8_0). Raises InputError if the format lacks this model."""
  names, config = plan_names(plan)
  if plan.new_biases:
    raise InputError(f"the adapter adds a bias to {plan.new_biases[0]}, which llama.cpp does not have")
  model = plan.cfg.model
  save_tokenizer(directory, model.tokenizer, model.weights)
  settings = gguf_tokenizer(directory, model.tokenizer, model.weights, plan.vocab_size) | {
    "general.name": plan.cfg.name}
  arrays = flatten(params)
  stored = get_family(model.family).stored_names(model)
  tensors = list(stored_tensors(arrays, stored))
  file = directory / MODEL_FILE
  with console.progress("write", len(tensors), "tensors") as bar:
    write_gguf_model(file, names, config, settings, tensors, kind.upper(), bar.advance)
  # The keys of an architecture do not hold all settings of a config.json; the rest must have its fixed value.
  if not same_model(_unrounded(read_gguf_config(file), config), model, plan.vocab_size):
    raise InputError("llama.cpp's format has no place for some settings of this model (model.arch), so nothing is "
                     "written; use format=merged")


def _unrounded(stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields read from a GGUF file, with those of `config` where they differ only by rounding to float32.

  Scaled rotary frequencies of Llama 3.1 are stored as numbers, and are taken from `config` too.
  """
  fields = dict(stored)
  for name, value in stored.items():
    if isinstance(value, float) and isinstance(config.get(name), float) and math.isclose(value, config[name],
                                                                                         rel_tol=1e-6):
      fields[name] = config[name]
  if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
    fields["rope_scaling"] = config["rope_scaling"]
  return fields


def base_gguf(plan: Plan) -> Path | None:
  """The GGUF file that the base was read from, or None."""
  model = plan.cfg.model
  if model.base != "weights" or model.weights is None:
    return None
  path = find_weights(model.weights)
  file = gguf_file(path) if path.is_dir() else path
  return file if file is not None and file.suffix == ".gguf" else None


def _origin(plan: Plan) -> Mapping[str, Any]:
  """The keys that name the base."""
  model = plan.cfg.model
  if model.base != "weights" or model.weights is None:
    return {"general.name": plan.cfg.name}
  name = base_name(model.weights)
  keys: dict[str, Any] = {"general.name": plan.cfg.name, "general.base_model.count": 1}
  if is_path(model.weights):
    return keys | {"general.base_model.0.name": Path(name).name}
  organization, _, short = name.partition("/")
  return keys | {"general.base_model.0.name": short, "general.base_model.0.organization": organization,
                 "general.base_model.0.repo_url": f"https://huggingface.co/{name.partition('@')[0]}"}
