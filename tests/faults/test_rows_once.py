"""Every training row is used exactly once an epoch, although the run is killed and goes on on other meshes."""

import hashlib
import json
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from forked import start_command
from kills import SAVING, Armed
from runs import TINY, on_stories, summary

ROWS = 30  # of training
RUN = [*TINY, "data.packing=pad", "data.seq_len=32", "train.batch_size=4", "train.steps=null",
       "train.eval_every=0", "train.save_every=3", "train.eval_tokens=128"]  # fmt: skip


@dataclass(frozen=True)
class Recorded:
  """Writes the rows of each step to `file` as a process trains, and kills it at a place if it is `armed`."""

  file: Path
  armed: Armed | None

  def __call__(self) -> None:
    from lora_exp.train import loop

    next_batch, steps = loop._next_batch, []

    def recorded(job, batches):
      arrays, counts = next_batch(job, batches)
      steps.append(steps[-1] + 1 if steps else int(job.state.step) + 1)
      names = [hashlib.sha256(np.ascontiguousarray(row)).hexdigest() for row in np.asarray(arrays["tokens"])]
      with self.file.open("a") as file:
        file.write(json.dumps([steps[-1], names]) + "\n")
      return arrays, counts

    loop._next_batch = recorded
    if self.armed is not None:
      self.armed()


def rows_of_steps(file: Path) -> list[str]:
  """The rows of all steps in order. A step that was trained again after a kill counts as it was trained at last."""
  steps = dict(json.loads(line) for line in file.read_text().splitlines())
  assert sorted(steps) == list(range(1, len(steps) + 1))
  return [row for step in sorted(steps) for row in steps[step]]


@pytest.mark.parametrize("kills", [
  pytest.param(2, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.faults_full)
])  # fmt: skip
def test_every_row_is_used_once_an_epoch(kills, tmp_path, record_property: Callable[[str, object], None]):
  run_dir, file, moments, killed, meshes = tmp_path / "run", tmp_path / "rows.jsonl", random.Random(0), 0, []
  begin = [*RUN, *on_stories(tmp_path), f"data.limit={ROWS}", f"train.epochs={3 + kills // 2}",
           f"hydra.run.dir={run_dir}"]  # fmt: skip
  for number in range(kills + 1):
    devices = (1, 2, 4)[number % 3]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    begun = (run_dir / "config.yaml").is_file()
    argv = [f"train.resume={run_dir}", f"mesh.data={devices}"] if begun else [*begin, f"mesh.data={devices}"]
    armed = None if number == kills else Armed(moments.choice(SAVING[:6]), moments.choice((1, 2)))
    process = start_command(argv, tmp_path / "log", Recorded(file, armed), flags)
    process.join()
    killed += process.exitcode == -signal.SIGKILL
    meshes.append(devices)
    assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
  rows = rows_of_steps(file)
  distinct = set(rows)
  for epoch in range(len(rows) // len(distinct)):
    assert set(rows[epoch * len(distinct) : (epoch + 1) * len(distinct)]) == distinct, f"epoch {epoch}"
  record_property("fault_count", {"fault": "SIGKILL and another mesh: rows of an epoch", "count": killed, "failed": 0})
  assert summary(run_dir)["status"] == "done" and killed >= kills // 2 and len(set(meshes)) == 3 and len(distinct) > 20
