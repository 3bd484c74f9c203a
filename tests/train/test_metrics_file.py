"""metrics.jsonl contains the logged rows, also after a resume and after an incomplete line."""

import numpy as np
import pytest

from lora_exp.config.errors import InputError
from lora_exp.runtime.json_lines import read_metrics
from lora_exp.train.evaluating.metrics_file import MetricsFile


def row(step: int, split: str = "train", loss: float = 2.0) -> dict:
  return {"step": step, "tokens": 8 * step, "split": split, "loss": loss}


def test_rows_come_back_as_they_were_logged(tmp_path):
  metrics = MetricsFile(tmp_path, None)
  metrics.log(row(1))
  assert read_metrics(tmp_path) == [row(1)], "on the disk before the file is closed"
  metrics.log({"step": np.int32(2), "loss": np.float32(0.5), "name": "ü\n"})
  metrics.close()
  assert read_metrics(tmp_path)[1] == {"step": 2, "loss": 0.5, "name": "ü\n"}
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_json_cannot_say_is_null(tmp_path):
  metrics = MetricsFile(tmp_path, None)
  for value in (float("nan"), float("inf"), np.float32("-inf")):
    metrics.log({"step": 1, "loss": value})
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    assert line == '{"step": 1, "loss": null}'


def test_resuming_drops_later_rows_and_a_torn_line_and_goes_on(tmp_path):
  path = tmp_path / "metrics.jsonl"
  early = '{"step": 1,   "loss": 2.50}\n{"step": 2, "loss": 2.4, "split": "eval"}\n'
  path.write_text(early + '{"step": 3, "loss": 2.3}\n{"step": 4, "lo')
  metrics = MetricsFile(tmp_path, 2)
  assert path.read_text() == early, "kept lines stay byte for byte"
  metrics.log(row(3))
  assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_not_read_and_a_broken_one_is_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "loss": 1')
  assert read_metrics(tmp_path) == [{"step": 1}]
  path.write_text('{"step": 1}\n{"step": 2, "los\n{"step": 3}\n')
  with pytest.raises(InputError, match="line 2 is not a JSON object"):
    read_metrics(tmp_path)
