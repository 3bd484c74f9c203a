"""Evaluation on retain is limited for a large base in a short run, and stays the same when the run is resumed."""

from dataclasses import replace

import pytest
from packs import small
from runs import TINY, on_stories, resume, rows, train

from lora_exp.train.evaluating import retention
from lora_exp.train.plan import make_plan


@pytest.mark.parametrize(("steps", "every", "wanted", "expected"), [
  (10, 16, 5120, 64), (10, 16, None, 64), (1000, 100, 5120, 1728), (10_000, 0, 5120, 5120), (10, 16, 30, 30),
  (0, 16, 5120, 5120)])
def test_the_limit_is_a_tenth_of_the_work_of_training(monkeypatch, steps, every, wanted, expected):
  cfg = small(data__seq_len=16, train__batch_size=4, train__eval_every=every, train__retain_tokens=wanted)
  plan = make_plan(replace(cfg, retain=cfg.data))
  assert retention.retain_limit(plan, steps) == wanted  # a small base
  monkeypatch.setattr(retention, "LARGE", 1)
  assert retention.retain_limit(plan, steps) == expected


def test_a_resumed_run_keeps_its_limit(tmp_path, monkeypatch, capfd):
  data = on_stories(tmp_path)
  argv = [*[text for text in TINY if not text.startswith("data@retain")], *data, "data@retain=text",
          data[1].replace("data.", "retain."), "train.steps=4", "train.batch_size=2", "data.seq_len=32",
          "retain.seq_len=32", "train.eval_every=2", "train.save_every=2", "train.eval_tokens=64"]
  monkeypatch.setattr(retention, "LARGE", 1)
  run = train(tmp_path / "run", *argv, "train.stop_at=2", code=75)
  assert "Forgetting is measured on 64 tokens instead of 5,120" in capfd.readouterr().out.replace("\n", " ")
  monkeypatch.undo()
  resume(run)
  counted = [row["counted"] for row in rows(run, "retain")]
  assert len(counted) == 3 and len(set(counted)) == 1 and counted[0] <= 64
