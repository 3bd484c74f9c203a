"""TensorBoard, through tensorboardX: event files in RUN/tensorboard. `tensorboard --logdir outputs` shows them."""

import json
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from lora_exp.train.logged_run import LoggedRun, loss_by_tokens, named_values

DIRECTORY = "tensorboard"


def open_run(run: LoggedRun, warn: Callable[[str], None]) -> "TensorboardWriter":
  """Opens the event file. TensorBoard ignores what a killed process logged after the step of the checkpoint."""
  import tensorboardX

  steps = [int(row["step"]) for row in run.earlier_rows]
  purge = {"purge_step": max(steps) + 1} if steps else {}
  writer = tensorboardX.SummaryWriter(str(run.run_dir / DIRECTORY), **purge)
  writer.add_text("config", f"    {json.dumps(run.config, indent=2, default=str)}".replace("\n", "\n    "))
  return TensorboardWriter(writer)


class TensorboardWriter:
  """Writes to one event file. Scalars are float32 there."""

  def __init__(self, writer: Any):
    self.writer = writer

  def log(self, row: Mapping[str, Any]) -> None:
    for values, axis in ((named_values(row), "step"), (loss_by_tokens(row), "tokens")):
      for name, value in values.items():
        if isinstance(value, Real):
          self.writer.add_scalar(name, float(value), row[axis])

  def summary(self, values: Mapping[str, Any]) -> None:
    self.writer.add_text("summary", f"    {json.dumps(values, indent=2, default=str)}".replace("\n", "\n    "))

  def finish(self, exit_code: int) -> None:
    self.writer.close()
