"""A pack takes trials of several data orders, and each is what its run would be alone."""

from pathlib import Path

import numpy as np
import pytest
from runs import QUIET, TINY, process, rows, train

from lora_exp.cli import main as entry
from lora_exp.sweep.ledger import Ledger

SHORT = [*TINY, "train.steps=6", "train.batch_size=4", "train.eval_every=3", "train.save_every=3",
         "train.eval_tokens=256"]  # fmt: skip
# With padded rows, batches have different numbers of tokens.
PADDED = [*SHORT, "model.dropout=0.1", "data.packing=pad", "optim.accumulate=2"]
NUMBERS = [*QUIET, "model=mlp", "data=regression", "model.mlp.inputs=16", "model.mlp.outputs=10",
           "data@pretrain_data=none", "model.base=random", "train.steps=6", "train.batch_size=8"]  # fmt: skip


def learned(run_dir: Path) -> list[tuple]:
  """Step, tokens, losses and gradient norm of each line of metrics.jsonl."""
  return [(row["step"], row["tokens"], row["loss"], row.get("grad_norm")) for row in rows(run_dir)]


@pytest.mark.slow
def test_resumed_seeds_in_a_pack_equal_their_runs_alone(tmp_path):
  text, sweep = tmp_path / "texts.txt", tmp_path / "sweep"
  text.write_text("<|endoftext|>".join(f"{n} " * (n % 9 + 2) for n in range(60)))
  argv = [*PADDED, "data=text", f"data.path={text}"]
  again = ["-m", "hydra/launcher=packed", f"hydra.sweep.dir={sweep}", *argv, "seed=0,1"]
  assert entry.run([*again, "train.stop_at=3"]) == 75
  assert Ledger(sweep).packs() == [[0, 1]]
  assert entry.run(again) == 0
  assert learned(sweep / "1") == learned(train(tmp_path / "alone", *argv, "seed=1"))
  assert learned(sweep / "0")[-1][1] != learned(sweep / "1")[-1][1], "both orders have as many tokens"


@pytest.mark.slow
def test_seeds_of_numeric_examples_share_a_pack(tmp_path):
  sweep = tmp_path / "sweep"
  assert entry.run(["-m", "hydra/launcher=packed", f"hydra.sweep.dir={sweep}", *NUMBERS, "seed=0,1"]) == 0
  assert Ledger(sweep).packs() == [[0, 1]]
  alone = train(tmp_path / "alone", *NUMBERS, "seed=1")
  assert learned(sweep / "1") == learned(alone) != learned(sweep / "0")


@pytest.mark.slow
def test_orders_of_a_planted_teacher_are_spread_over_a_mesh(tmp_path):
  argv = [*SHORT, "data=planted", "data.limit=40", "data.teacher.rank=2"]
  typed = ["-m", "hydra/launcher=packed", *argv, "seed=0,1,2"]
  for name, mesh in (("one", ["mesh.data=1"]), ("spread", ["mesh.trial=2", "mesh.data=2", "mesh.tensor=2"])):
    done = process(*typed, *mesh, f"hydra.sweep.dir={tmp_path / name}", cwd=tmp_path, devices=1 if name == "one" else 8)
    assert done.returncode == 0, done.stderr
  alone = train(tmp_path / "alone", *argv, "seed=2")
  assert learned(tmp_path / "one" / "2") == learned(alone)
  for n in range(3):
    losses = [[row["loss"] for row in rows(tmp_path / name / str(n))] for name in ("one", "spread")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
