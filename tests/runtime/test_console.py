"""Output: markup is not interpreted, samples cannot move the cursor, and a pipe gets few lines."""

import numpy as np
import pytest

from lora_exp.config.errors import InputError
from lora_exp.runtime import console, progress_bars


def test_every_problem_of_an_error_is_a_line_without_markup(capsys):
  console.show_error(InputError(["lora.targets: [red]q[/] \x1b[2Jmatches nothing " + "long " * 60, "second"]))
  out, err = capsys.readouterr()
  assert out == ""
  assert err.splitlines() == ["error: lora.targets: [red]q[/] \\x1b[2Jmatches nothing " + "long " * 60, "error: second"]


def test_text_of_a_model_cannot_move_the_cursor(capsys):
  console.show("Once\x1b[2J [b]upon\r\x07\x9b a\ttime")
  out = capsys.readouterr().out
  assert "\\x1b[2J [b]upon\\x0d\\x07\\x9b" in out
  assert not set("\x1b\r\x07\x9b") & set(out)


@pytest.mark.parametrize("value, shown", [
  (1234567, "1,234,567"), (0.0123456, "0.01235"), (12345.6, "12,346"), (True, "yes"), (None, "-"),
  (np.float32(0.5), "0.5"), (np.int64(1000), "1,000"), ([8, "x"], "8, x"), ((256, 8), "(256, 8)"),
  (float("nan"), "nan"), (1e-7, "1e-07")])
def test_values_in_tables(value, shown):
  assert console.cell(value) == shown


def test_a_table_aligns_numbers_and_fits_a_hundred_columns(capsys):
  console.show_table("AdaptedModule", ["path", "rank"], [["q_proj", 8], ["segment." * 30, 12345]])
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 100
  assert lines[4].rstrip().endswith("     8") and lines[5].rstrip().endswith("12,345")


def test_progress_in_a_pipe_is_a_few_lines_of_long_work(capsys, monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(progress_bars.time, "monotonic", lambda: clock[0])
  for seconds in (0.001, 1.0):
    for total in (1000, None, 7):
      with console.progress("train", total, "steps", start=2) as bar:
        for _ in range((total or 1000) - 2):
          clock[0] += seconds
          bar.advance(loss=0.5)
      lines = capsys.readouterr().out.splitlines()
      if seconds < 0.01:
        assert lines == []
      else:
        assert 2 <= len(lines) <= 25
        assert f"train: {total or 1000:,}" in lines[-1] and "loss 0.5" in lines[-1]
