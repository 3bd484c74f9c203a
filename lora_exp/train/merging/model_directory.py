"""Writing of a model as a Hugging Face directory: model.safetensors, config.json and the tokenizer files."""

import shutil
from pathlib import Path
from typing import Any

from lora_exp.config import InputError, ModelConfig
from lora_exp.data.tokenization import Tokenizer
from lora_exp.data.tokenization.save import save_tokenizer
from lora_exp.models.hf_export import same_model, to_hf
from lora_exp.models.registry import get_family
from lora_exp.models.weights.hf_writer import save_hf
from lora_exp.models.weights.locate import find_weights
from lora_exp.runtime import console
from lora_exp.runtime.files import write_json
from lora_exp.runtime.json_files import read_json_object
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.program import Tree
from lora_exp.train.plan import Plan

MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


def write_model(directory: Path, plan: Plan, params: Tree) -> bool:
  """Writes the model of `plan` with the arrays `params`. Returns whether transformers can load it.

  If it cannot, the tensors have the names of lora_exp, which `model.weights=DIR` reads.
  """
  model, source = plan.cfg.model, _source_directory(plan.cfg.model)
  if plan.new_biases:
    raise InputError(f"the adapter adds a bias to {plan.new_biases[0]}, which the class of this model in transformers "
                     "does not have; export it with format=peft")
  config = hf_config(plan)
  names = get_family(model.family).stored_names(model) if config else None
  arrays = flatten(params)
  with console.progress("write", len(arrays), "tensors") as bar:
    save_hf(directory, arrays, model.param_dtype, names, bar.advance)
  if config is None:
    return False
  dtype_key = "dtype" if "dtype" in config else "torch_dtype"
  write_json(directory / MODEL_CONFIG, config | {dtype_key: model.param_dtype})
  save_tokenizer(directory, model.tokenizer, model.weights)
  if source is not None and (source / GENERATION_CONFIG).is_file():
    shutil.copyfile(source / GENERATION_CONFIG, directory / GENERATION_CONFIG)
  else:
    # A chat model also stops at the end of a turn.
    ends = {"eos_token_id": list(plan.tokenizer.stops)}
    write_json(directory / GENERATION_CONFIG, _token_ids(plan.tokenizer) | ends)
  return True


def hf_config(plan: Plan) -> dict[str, Any] | None:
  """The content of config.json: that of the base if it describes the same model, else a new one.

  None if transformers has no such model.
  """
  model, source = plan.cfg.model, _source_directory(plan.cfg.model)
  if source is not None and (source / MODEL_CONFIG).is_file():
    config = read_json_object(source / MODEL_CONFIG)
    config.pop("quantization_config", None)  # the tensors are written in floating point
    if same_model(config, model, plan.vocab_size):
      return config
  new = to_hf(model, plan.vocab_size)
  return new and new | _token_ids(plan.tokenizer)


def _source_directory(model: ModelConfig) -> Path | None:
  """The directory of the base's weights; None if the base is not loaded from weights."""
  if model.base != "weights" or model.weights is None:
    return None
  path = find_weights(model.weights)
  return path if path.is_dir() else path.parent


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
  """The token ids for config.json and generation_config.json."""
  bos = tokenizer.special_tokens.get(tokenizer.template_variables.get("bos_token", ""), tokenizer.bos)
  return {"bos_token_id": bos, "eos_token_id": tokenizer.eot, "pad_token_id": None}
