"""Hugging Face datasets: directories that `datasets` saved, and datasets on the hub."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data.formats.arrow_rows import without_nulls
from lora_exp.data.formats.file_content import INSTALL
from lora_exp.data.formats.row import Row

HUB = "hub:"


def is_dataset(path: Any) -> bool:
  """Whether `path` is a dataset on the hub, or a directory that `datasets` saved."""
  return is_hub(path) or (isinstance(path, str) and _is_saved(Path(path).expanduser()))


def is_hub(path: Any) -> bool:
  """Whether `path` names a dataset on the hub."""
  return isinstance(path, str) and path.startswith(HUB)


def _is_saved(path: Path) -> bool:
  """Whether `path` is a directory in which `datasets` saved a dataset with or without splits."""
  return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and any(path.glob("*.arrow")))


@dataclass(frozen=True)
class HubName:
  """A dataset on the hub, as in `hub:owner/name@revision`."""

  name: str
  revision: str | None = None

  @classmethod
  def parse(cls, text: str) -> "HubName":
    name, _, revision = text.removeprefix(HUB).partition("@")
    return cls(name, revision or None)


def import_datasets() -> Any:
  """Imports datasets. Raises an InputError that names the extra if it is not installed."""
  try:
    import datasets
  except ImportError as error:
    raise InputError(f"a Hugging Face dataset needs the package datasets: {INSTALL}") from error
  return datasets


def load_saved(path: Path) -> Mapping[str, Any]:
  """The splits of a saved dataset by name. A dataset without splits has the name ''."""
  datasets = import_datasets()
  try:
    loaded = datasets.load_from_disk(str(path))
  except (OSError, ValueError, KeyError) as error:
    raise InputError(f"{path}: datasets cannot read it: {error}") from error
  return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}


def load_hub(hub: HubName, subset: str | None, streaming: bool) -> Mapping[str, Any]:
  """The splits of a dataset on the hub by name. With `streaming`, rows are downloaded as they are read."""
  datasets = import_datasets()
  try:
    loaded = datasets.load_dataset(hub.name, subset, revision=hub.revision, streaming=streaming)
  except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"data.path={HUB}{hub.name}: datasets cannot load it: {reason}") from error
  return dict(loaded)


def choose_split(splits: Mapping[str, Any], wanted: str | None, label: str, setting: str) -> str:
  """The name of the split to read: `wanted`, else train, else the only one. Raises InputError if there is none."""
  if wanted in splits:
    return str(wanted)
  names = ", ".join(splits)
  if wanted is not None:
    has = f"its splits are {names}" if "" not in splits else "it has no splits"
    raise InputError(f"data.{setting}={wanted}: {label} has no such split; {has}{did_you_mean(wanted, splits)}")
  if "train" in splits:
    return "train"
  if len(splits) == 1:
    return next(iter(splits))
  raise InputError(f"{label} has the splits {names}; choose one: data.{setting}={next(iter(splits))}")


def dataset_rows(dataset: Any, label: str) -> Iterator[Row]:
  """The rows of one split."""
  for number, fields in enumerate(dataset, 1):
    yield Row(f"{label}, row {number}", without_nulls(fields))


def identity(dataset: Any, label: str) -> str:
  """A string that changes whenever the rows of a split change: the fingerprint that `datasets` gives it.

  A streamed split has no fingerprint. Its identity is the commit of the dataset on the hub.
  """
  fingerprint = getattr(dataset, "_fingerprint", None)
  if isinstance(fingerprint, str):
    return fingerprint
  from huggingface_hub import dataset_info

  hub = HubName.parse(label)
  try:
    return str(dataset_info(hub.name, revision=hub.revision).sha)
  except (OSError, ValueError) as error:
    raise InputError(f"data.path={label}: the hub cannot be reached: {error}") from error
