"""Checks that the moved files of a sweep have the same content as those that its runs started from.

A resumed run compares the files when it restores its checkpoint. The other runs of a sweep have ended or start with the
new files, so the files are compared before the first run starts.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_exp.config import Config, InputError
from lora_exp.data.rows import make_rows
from lora_exp.models.weights.locate import find_weights
from lora_exp.models.weights.store import file_digest
from lora_exp.runtime.run_files import CHECKPOINTS
from lora_exp.train.plan import make_plan
from lora_exp.train.records.checkpoint import read_content, steps
from lora_exp.train.records.resume_checks import adapter_digest, changed_sources, is_of_a_run
from lora_exp.train.run_summary import read_summary

GROUPS = ("data", "retain", "pretrain_data", "model", "lora")  # settings that name files, or say how they are read


def require_equal_content(moved: Iterable[tuple[int, Config, Path]]) -> None:
  """Raises InputError if a file of the begun runs (number, config with the new paths, directory) has another content.

  A source that a run did not record is not compared, for example if the run ended before its first checkpoint.
  """
  problems = []
  known: dict[str, dict[str, Any]] = {}  # what is read, by the settings that name it
  for number, cfg, directory in moved:
    key = repr([asdict(cfg)[name] for name in GROUPS[:-1]] + [cfg.lora.init_from])
    if key not in known:
      known[key] = _sources(cfg)
    stored, base = _recorded(directory)
    if stored["fingerprint"] is None:
      continue
    current = stored | {name: value for name, value in known[key].items() if name in stored}
    found = changed_sources(stored, current, base, base | known[key]["base"])
    problems += [f"run {number} of {directory.parent}: {change}; give the files that it was started with, or another "
                 "directory" for change in found]
  if problems:
    raise InputError(problems)


def _recorded(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """What the run in `directory` was started from: its data and its base."""
  for step in reversed(steps(directory)):
    with suppress(InputError):  # it is skipped when the run is resumed, with a warning
      meta = read_content(directory / CHECKPOINTS / str(step))["meta"]
      if is_of_a_run(meta):
        return dict(meta["data"]), dict(meta["record"].get("base", {}))
  fingerprints = read_summary(directory).get("fingerprints")
  return {"fingerprint": fingerprints.get("data") if isinstance(fingerprints, dict) else None}, {}


def _sources(cfg: Config) -> dict[str, Any]:
  """The same of the files that `cfg` names now. Makes their rows, which are in the cache if the content is equal."""
  tokenizer = make_plan(cfg).tokenizer
  base: dict[str, Any] = {}
  if cfg.model.base == "weights":
    base["digest"] = file_digest(find_weights(str(cfg.model.weights)))
  elif cfg.model.base == "pretrain" and cfg.pretrain_data is not None:
    base["data"] = make_rows(cfg.pretrain_data, tokenizer, cfg.cache).fingerprint
  return {
    "fingerprint": make_rows(cfg.data, tokenizer, cfg.cache).fingerprint,
    "retain": None if cfg.retain is None else make_rows(cfg.retain, tokenizer, cfg.cache).fingerprint,
    "init_from": adapter_digest(cfg.lora.init_from),
    "base": base,
  }
