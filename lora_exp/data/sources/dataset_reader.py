"""Reads rows of a Hugging Face dataset: one on the hub, or a directory that `datasets` saved."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_exp.data.documents import Skipped
from lora_exp.data.formats import hf_datasets
from lora_exp.data.formats.data_files import split_not_read
from lora_exp.data.formats.row import Row
from lora_exp.data.sources.file_source import files_digest
from lora_exp.data.sources.row_reader import RowReader


@dataclass(frozen=True)
class DatasetReader(RowReader):
  """Reads `path`, `hub:OWNER/NAME` or a directory.

  `train_split` is read (None: train, or the only one), and `eval_split` is held out. `subset` and `streaming` are those
  of `datasets.load_dataset`.
  """

  path: str
  train_split: str | None = None
  eval_split: str | None = None
  subset: str | None = None
  streaming: bool = False

  @property
  def label(self) -> str:
    return self.path

  @cached_property
  def splits(self) -> Mapping[str, Any]:
    """The splits by name."""
    if hf_datasets.is_hub(self.path):
      return hf_datasets.load_hub(hf_datasets.HubName.parse(self.path), self.subset, self.streaming)
    return hf_datasets.load_saved(Path(self.path).expanduser())

  @cached_property
  def split(self) -> str:
    """The name of the split that is read; '' for a dataset without splits."""
    return hf_datasets.choose_split(self.splits, self.train_split, self.label, "train_split")

  @property
  def format_words(self) -> str:
    return f"Hugging Face dataset, split {self.split or '-'}"

  def identity(self) -> Mapping[str, object]:
    if hf_datasets.is_hub(self.path):
      return {"dataset": hf_datasets.identity(self.splits[self.split], self.path), "split": self.split}
    folder = Path(self.path).expanduser() / self.split
    return {"content": files_digest(sorted(folder.glob("*.arrow")))}

  def rows(self) -> Iterator[Row]:
    label = f"{self.label}, {self.split}" if self.split else self.label
    return hf_datasets.dataset_rows(self.splits[self.split], label)

  def left_out(self) -> Iterator[Skipped]:
    if self.train_split is not None:  # the others are left out on purpose
      return
    for name in self.splits:
      if name not in (self.split, self.eval_split):
        yield Skipped(split_not_read(name), f"{self.label}, {name}", unit="splits")
