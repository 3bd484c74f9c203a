"""The dotted names of all settings, read from the dataclasses, and suggestions for names that do not exist."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from lora_exp.config.errors import did_you_mean, nearest
from lora_exp.config.schema import Config

OTHER_LIBRARIES = {  # names in other libraries: ours
  "r": "lora.rank", "lora_r": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
  "target_modules": "lora.targets", "learning_rate": "optim.lr", "optimizer": "optim", "wd": "optim.weight_decay",
  "grad_clip": "optim.clip", "max_steps": "train.steps", "num_train_epochs": "train.epochs",
  "max_length": "data.seq_len", "dataset": "data",
  "d_model": "model.width", "n_layers": "model.layers", "n_heads": "model.heads",
}
NOT_SUGGESTED = (  # names of other groups
  "pretrain_data.", "retain.", "data.teacher.", "filter.", "export.", "clean.", "plan.",
)


def all_settings(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted path, type) of every setting; groups are settings too."""
  for name, hint in get_type_hints(cls).items():
    yield prefix + name, hint
    if group := group_class(hint):
      yield from all_settings(group, f"{prefix}{name}.")


def group_class(hint: Any) -> Any:
  """The dataclass in a type such as `DataConfig | None`, or None."""
  return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)


def is_setting(path: str) -> bool:
  """Whether `path` is a setting; any key below a dict-valued setting is one."""
  return path in dict(all_settings()) or is_entry(path)


def is_entry(path: str) -> bool:
  """Whether `path` is a key below a dict-valued setting, such as lora.options.NAME, which no file needs to define."""
  known = dict(all_settings())
  parents = [path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)]
  return any(_is_dict(known.get(parent)) for parent in parents)


def opened(text: str) -> str:
  """Prefixes an override with ++ if its key is below a dict-valued setting, where no file needs to define it."""
  plain = text.lstrip("+")
  return f"++{plain}" if is_entry(plain.partition("=")[0]) else text


def _is_dict(hint: Any) -> bool:
  return any(get_origin(t) is dict for t in (hint, *get_args(hint)))


def suggestion(path: str) -> str:
  """'; did you mean X?' for an unknown setting, or ''.

  X is our name for another library's setting, or a setting with the same last part, or the nearest spelling.
  """
  known = [name for name, _ in all_settings() if not name.startswith(NOT_SUGGESTED)]
  group, _, word = path.rpartition(".")
  same_word = sorted((name for name in known if name.rsplit(".", 1)[-1] == word), key=_depth)
  if word in OTHER_LIBRARIES or same_word:
    return f"; did you mean {OTHER_LIBRARIES.get(word) or ' or '.join(same_word[:3])}?"
  siblings = [name.rsplit(".", 1)[-1] for name, _ in all_settings() if name.rpartition(".")[0] == group]
  if near := nearest(word, siblings):
    return f"; did you mean {f'{group}.' if group else ''}{near[0]}?"
  return did_you_mean(path, known)


def _depth(path: str) -> int:
  return path.count(".")
