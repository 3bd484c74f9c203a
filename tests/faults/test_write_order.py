"""A checkpoint gets its name only when its files are on disk, so that a power loss cannot keep only the name."""

import os
from pathlib import Path

from lora_exp.cli import main as entry

RUN = ["model=minigpt_tiny", "train=quick", "train.steps=4", "train.save_every=2", "data@retain=none", "sample=none",
       "logger=none"]  # fmt: skip


def test_metrics_and_arrays_are_synced_before_a_checkpoint(tmp_path, monkeypatch):
  synced: list[str] = []
  commits: list[tuple[str, set[str]]] = []  # (step, paths synced since the commit before)
  fsync, rename = os.fsync, os.rename

  def recorded_fsync(descriptor: int) -> None:
    synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    fsync(descriptor)

  def recorded_rename(source, target, **kwargs) -> None:
    rename(source, target, **kwargs)
    if Path(target).parent.name == "checkpoints" and Path(target).name.isdecimal():
      commits.append((Path(target).name, {path.replace(str(source), "") for path in synced}))
      synced.clear()

  monkeypatch.setattr(os, "fsync", recorded_fsync)
  monkeypatch.setattr(os, "rename", recorded_rename)
  assert entry.run([*RUN, f"hydra.run.dir={tmp_path}/run"]) == 0
  assert [step for step, _ in commits] == ["2", "4"]
  for _, paths in commits:
    assert f"{tmp_path}/run/metrics.jsonl" in paths
    assert {"/SHA256SUMS", "/meta.json", ""} <= {path.rpartition(f"{tmp_path}/run/checkpoints")[2] for path in paths}
