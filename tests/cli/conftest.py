"""A substitute for training, so that tests of the command line need not train."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_exp.config import Config
from lora_exp.tasks import evaluate_task, train

Train = Callable[[Config, Path], object]


@pytest.fixture
def trained(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Train], None]:
  """trained(function): task=train and task=evaluate call `function`; by default training writes one metric."""

  def install(run: Train) -> None:
    monkeypatch.setattr(train, "train_run", lambda plan, run_dir: run(plan.cfg, run_dir))
    monkeypatch.setattr(evaluate_task, "run", run)

  def write_metrics(cfg: Config, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("{}\n")

  install(write_metrics)
  return install
