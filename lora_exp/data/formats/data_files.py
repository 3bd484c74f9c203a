"""The files of `data.path`, which is a file, a pattern such as `data/*.jsonl`, a directory, or a list of these."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data.formats.file_formats import ROW_SUFFIXES, TEXT_SUFFIXES
from lora_exp.runtime.files import path_problem

COMPRESSIONS = (".gz", ".zst", ".zstd", ".bz2", ".xz")
NOT_DATA = re.compile(r"(dataset_infos?|dataset_dict|state|config)\.json$|^(readme|license|citation)\b", re.IGNORECASE)
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}  # fmt: skip
SPLIT_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![A-Za-z])")


@dataclass(frozen=True)
class DataFiles:
  """The files to read, and those of a directory that are left out."""

  files: tuple[Path, ...]
  left_out: tuple[tuple[Path, str], ...] = ()  # (file, reason)


def plain_suffix(path: Path) -> str:
  """The suffix of a file in lower case, without that of its compression: `.jsonl` of `a.jsonl.gz`."""
  return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def path_list(value: Any) -> list[str]:
  """The paths in a setting: one, or a list of them."""
  return [str(path) for path in value] if isinstance(value, list | tuple) else [str(value)]


def find_files(setting: str, value: Any, split: str | None = None, text_only: bool = False) -> DataFiles:
  """The files of the setting `setting` with the value `value`; in a directory, those of `split` (by default train).

  `text_only`: take only plain text files from a directory. Raises InputError with every path that cannot be read.
  """
  files: list[Path] = []
  left_out: list[tuple[Path, str]] = []
  problems: list[str] = []
  for text in path_list(value):
    paths = _expanded(text)
    if not paths:
      problems.append(f"{setting}={text}: no such file")
    for path in paths:
      problem = path_problem(setting, str(path))
      if problem is not None:
        problems.append(problem)
      elif not path.is_dir():
        files += [path] if _may_have_split(path, split) else []
      else:
        try:
          found = _files_of_directory(setting, path, split, text_only)
        except InputError as error:
          problems += error.problems
          continue
        files += found.files
        left_out += found.left_out
  if not files and not problems:
    problems.append(f"{setting}={shown(value)}: there is no split {split!r} in a file without splits; give "
                    "data.eval_path=FILE, or a directory with a file for each split")
  twice = [file for file, count in Counter(files).items() if count > 1]
  problems += [f"{setting}: {file} is listed twice; list it once" for file in twice]
  if problems:
    raise InputError(problems)
  return DataFiles(tuple(files), tuple(left_out))


def _may_have_split(path: Path, split: str | None) -> bool:
  """Whether a file may contain `split`: by its name, or because it is JSON, which may contain several splits."""
  words = SPLIT_WORD.findall(path.name.lower())
  return split is None or plain_suffix(path) == ".json" or (bool(words) and SPLITS[words[-1]] == split_name(split))


def _expanded(text: str) -> list[Path]:
  """The sorted paths that a pattern matches, or the path itself."""
  path = Path(text).expanduser()
  if path.exists() or not glob.has_magic(text):
    return [path]
  return [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]


def _files_of_directory(setting: str, directory: Path, split: str | None, text_only: bool) -> DataFiles:
  """The data files below a directory: files of rows if there are any, else text files. If their names contain splits,
  those of one split."""
  everything = list(_visible_files(directory))
  data = [file for file in everything if not NOT_DATA.search(file.name)]
  kinds = (TEXT_SUFFIXES,) if text_only else (ROW_SUFFIXES, TEXT_SUFFIXES)
  chosen: list[Path] = []
  for suffixes in kinds:
    chosen = chosen or [file for file in data if plain_suffix(file) in suffixes]
  if not chosen:
    wanted = ", ".join(TEXT_SUFFIXES if text_only else (*ROW_SUFFIXES, *TEXT_SUFFIXES))
    raise InputError(f"{setting}={directory}: contains no data files ({wanted})")
  by_split = _by_split(directory, chosen)
  name = _split_to_read(setting, directory, list(by_split), split)
  left_out = [(file, _reason_to_leave_out(file)) for file in everything if file not in chosen]
  left_out += [(file, "hidden files are not read") for file in _hidden_files(directory)]
  unread = [other for other in by_split if other != name and split is None]
  left_out += [(file, split_not_read(other)) for other in unread for file in by_split[other]]
  return DataFiles(tuple(by_split[name]), tuple(left_out))


def _reason_to_leave_out(file: Path) -> str:
  is_text = plain_suffix(file) in TEXT_SUFFIXES and not NOT_DATA.search(file.name)
  return "plain text next to files of rows; to read both, give a list of files" if is_text else "not a data file"


def _hidden_files(directory: Path) -> list[Path]:
  """The hidden files in `directory` that would be read otherwise."""
  suffixes = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
  return [file for file in sorted(directory.glob(".*")) if file.is_file() and plain_suffix(file) in suffixes]


def split_not_read(name: str) -> str:
  """The reason why a split is left out."""
  return f"the split {name!r} is not read; data.eval_split={name} evaluates on it"


def split_name(split: str) -> str:
  """The usual name of a split: validation for valid, val and dev."""
  return SPLITS.get(split, split)


def _visible_files(directory: Path) -> Iterator[Path]:
  """The files below `directory` in order, without hidden ones."""
  for parent, folders, names in os.walk(directory):
    folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "__")))
    yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _by_split(directory: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
  """The files by the split in their names: train, validation or test. Files without a split belong to train."""
  found: dict[str, list[Path]] = {}
  for file in files:
    words = SPLIT_WORD.findall(file.relative_to(directory).as_posix().lower())
    found.setdefault(SPLITS[words[-1]] if words else "", []).append(file)
  if "" in found and len(found) > 1:
    found["train"] = sorted([*found.pop(""), *found.get("train", [])])
  return found


def _split_to_read(setting: str, directory: Path, names: Sequence[str], split: str | None) -> str:
  if split is None:
    if "train" in names:
      return "train"
    if len(names) == 1:
      return names[0]
    raise InputError(f"{setting}={directory}: it contains the splits {', '.join(names)}; "
                     f"choose one: data.train_split={names[0]}")
  name = split_name(split)
  if name not in names:
    has = f"the splits of its files are {', '.join(names)}" if names != [""] else "its files have no splits"
    raise InputError(f"{setting}={directory}: there is no split {shown(split)}; {has}{did_you_mean(split, names)}")
  return name
