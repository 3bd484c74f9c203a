"""From a plain mapping to `Config`: every unknown key and every value of a wrong type, collected before it raises."""

import copy
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.config.errors import InputError, did_you_mean, nearest
from lora_exp.config.schema import TOKENIZERS, Config, DataConfig

ELSEWHERE = {  # other libraries' words
  "r": "lora.rank", "lora_r": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
  "target_modules": "lora.targets", "learning_rate": "optim.lr", "optimizer": "optim", "wd": "optim.weight_decay",
  "grad_clip": "optim.clip", "max_steps": "train.steps", "num_train_epochs": "train.epochs",
  "max_length": "data.seq_len", "dataset": "data",
  "d_model": "model.width", "n_layers": "model.layers", "n_heads": "model.heads",
}
OmegaConf.register_new_resolver("least", lambda *numbers: min(numbers), replace=True)  # ${least:${model.max_len},256}
OmegaConf.register_new_resolver("times", lambda a, b: float(f"{a * b:.6g}"), replace=True)  # 0.1 × 0.005 is 0.0005
OmegaConf.register_new_resolver("size", lambda rank, n: f"r{rank}" if n is None else f"p{n:g}", replace=True)
WORDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", Any: "a value"}


def settings(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted path, type) of every setting, groups themselves included."""
  for name, hint in get_type_hints(cls).items():
    yield prefix + name, hint
    if group := group_class(hint):
      yield from settings(group, f"{prefix}{name}.")


def group_class(hint: Any) -> Any:
  """The dataclass in a type such as `DataConfig | None`, or None."""
  return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)


def is_setting(path: str) -> bool:
  """Whether the dataclasses know `path`; below a dict-valued setting every key is known."""
  known = dict(settings())
  if path in known:
    return True
  parents = (path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1))
  return any(get_origin(t) is dict for parent in parents for t in (known.get(parent), *get_args(known.get(parent))))


def suggestion(path: str) -> str:
  """'; did you mean X?' for an unknown setting: where its word is used, or the nearest spelling; or ''."""
  known = [name for name, _ in settings() if not name.startswith(("pretrain_data.", "retain.", "data.teacher."))]
  group, _, word = path.rpartition(".")
  places = sorted((name for name in known if name.rsplit(".", 1)[-1] == word), key=lambda name: name.count("."))
  if word in ELSEWHERE or places:
    return f"; did you mean {ELSEWHERE.get(word) or ' or '.join(places[:3])}?"
  siblings = [name.rsplit(".", 1)[-1] for name, _ in settings() if name.rpartition(".")[0] == group]
  if near := nearest(word, siblings):
    return f"; did you mean {f'{group}.' if group else ''}{near[0]}?"
  return did_you_mean(word, known) if "." not in path else did_you_mean(path, known)


def plain(cfg: DictConfig) -> dict[str, Any]:
  """A composed config as a plain dict without Hydra's node, every interpolation resolved.

  Raises InputError for an interpolation that leads nowhere.
  """
  try:
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return {str(key): _resolved(cfg, str(key)) for key in container if key != "hydra"}
  except OmegaConfBaseException as error:
    raise InputError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error


def _resolved(cfg: DictConfig, key: str) -> Any:
  value = cfg[key]
  return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _plain_model(cfg: DictConfig) -> dict[str, Any]:
  """`plain`, with model.family=hf replaced by what config.json says; a value that was given stays."""
  if OmegaConf.select(cfg, "model.family") != "hf":
    return plain(cfg)
  if cfg.model.weights is None:
    raise InputError("model.weights=null: model=hf reads the model from its config.json; add model.weights=DIR")
  from lora_exp.models.hf_config import from_hf
  from lora_exp.models.weights.locate import config_json

  found = from_hf(*config_json(str(cfg.model.weights)))
  cfg = copy.deepcopy(cfg)
  _fill(cfg.model, {key: value for key, value in found.items() if key != "family"})
  values = plain(cfg)  # interpolations see the sizes; the run is still called hf
  values["model"]["family"] = found["family"]
  return values


def _fill(node: DictConfig, values: dict[str, Any]) -> None:
  for key, value in values.items():
    if isinstance(value, dict) and isinstance(node.get(key), DictConfig):
      _fill(node[key], value)
    elif node.get(key) is None:
      node[key] = value


def to_config(cfg: DictConfig | dict[str, Any]) -> Config:
  """The typed config. Raises InputError with every unknown key (and its nearest spelling) and every wrong type."""
  values = _plain_model(cfg) if isinstance(cfg, DictConfig) else cfg
  builder = Builder([])
  config = builder.dataclass(Config, values, "")
  if builder.problems:
    raise InputError(builder.problems)
  return normalised(config)


def normalised(config: Config) -> Config:
  """`config` with absolute paths, and `base=weights` where weights are given."""
  if config.model.weights is not None:
    config.model.base = "weights"
  holders: list[tuple[Any, str]] = [(config, "run"), (config, "cache"), (config, "prompt_file"), (config, "out"),
                                    (config.train, "resume")]
  from lora_exp.models.weights.locate import is_path

  if config.model.weights is not None and is_path(config.model.weights):
    holders.append((config.model, "weights"))
  if config.model.tokenizer not in TOKENIZERS and Path(absolute(config.model.tokenizer)).exists():
    holders.append((config.model, "tokenizer"))
  for source in filter(None, (config.data, config.pretrain_data, config.retain)):
    holders += [(source, "path"), (source, "eval_path")]
  for holder, name in holders:
    if value := getattr(holder, name):
      setattr(holder, name, absolute(value))
  return config


def absolute(path: str) -> str:
  """`path` from the root, `~` expanded; symbolic links stay as they are."""
  try:
    return str(Path(path).expanduser().absolute())
  except RuntimeError:  # ~nobody: no such user
    return str(Path(path).absolute())


@dataclass
class Builder:
  """Converts values to the types of the dataclasses and notes what does not fit in `problems`."""

  problems: list[str]

  def refuse(self, path: str, value: Any, allowed: str) -> None:
    self.problems.append(f"{path}={shown(value)}: must be {allowed}")

  def dataclass(self, cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
      self.refuse(path, values, f"a group of settings ({', '.join(f.name for f in fields(cls)[:3])}, ...)")
      return cls()
    prefix = f"{path}." if path else ""
    hints = get_type_hints(cls)
    for key in values:
      if key not in hints:
        self.problems.append(f"{prefix}{key}: no such setting{suggestion(f'{prefix}{key}')}")
    return cls(**{k: self.convert(hint, values[k], prefix + k) for k, hint in hints.items() if k in values})

  def convert(self, hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint`, exactly: 1.5 is no int and true is no number."""
    if hint is Any:
      return value
    if get_origin(hint) in (Union, types.UnionType):
      hint = next(t for t in get_args(hint) if t is not type(None))
      if value is None or (value == {} and is_dataclass(hint)):  # an empty group: data@retain=none
        return None
    if is_dataclass(hint):
      if value == {} and hint is DataConfig:
        self.problems.append(f"{path}=none: no data is only for data@retain and data@pretrain_data; "
                             "choose another, as data=stdlib_docs")
        return hint()
      return self.dataclass(hint, value, path)
    if get_origin(hint) in (list, dict):
      return self.many(hint, value, path)
    return self.scalar(hint, value, path)

  def many(self, hint: Any, value: Any, path: str) -> Any:
    item = get_args(hint)[-1]
    if get_origin(hint) is list and isinstance(value, list):
      return [self.scalar(item, v, f"{path}[{i}]") for i, v in enumerate(value)]
    if get_origin(hint) is dict and isinstance(value, dict):
      return {str(k): self.convert(item, v, f"{path}.{k}") for k, v in value.items()}
    key = "name" if item is Any else "pattern"
    self.refuse(path, value, f"[{WORDS[item]}, ...]" if get_origin(hint) is list else f"{{{key}: {WORDS[item]}}}")
    return get_origin(hint)()

  def scalar(self, hint: type, value: Any, path: str) -> Any:
    if isinstance(value, str) and hint in (int, float):
      value = number(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and not math.isfinite(value):
      self.refuse(path, value, "a finite number")
    elif hint is float and is_number:
      return float(value)
    elif hint is int and is_number and value == int(value):
      return int(value)
    elif hint is str and isinstance(value, int) and not isinstance(value, bool):
      return str(value)  # name=2024
    elif type(value) is hint:
      return value
    else:
      quotes = f""", as '{path}="{shown(value)}"'""" if hint is str and isinstance(value, float | bool) else ""
      self.refuse(path, value, WORDS[hint] + quotes)
    return hint()


def number(text: str) -> Any:
  """`text` as a float where it spells one (YAML reads 1e-3 as a word), else `text`."""
  try:
    return float(text)
  except ValueError:
    return text


def shown(value: Any) -> str:
  """`value` as it is typed on the command line, at most 60 characters."""
  words = {None: "null", True: "true", False: "false"}
  text = words[value] if value is None or isinstance(value, bool) else str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
