"""task=data: what is read and what is learned, with and without colours, and what is cut off."""

import io
import json
import re

import pytest
from rich.console import Console

from lora_exp.cli import main as entry
from lora_exp.runtime import console

QUIET = ["task=data", "model=minigpt_tiny", "model.tokenizer=bytes", "data=jsonl", "data.seq_len=40"]


def lines_of(folder, pairs):
  (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"prompt": q, "response": a}) for q, a in pairs))
  return [*QUIET, f"data.path={folder / 'pairs.jsonl'}", f"cache={folder / 'cache'}"]


@pytest.mark.parametrize("packing", ["pack", "pad", "stream"])
def test_a_row_shows_what_is_learned(tmp_path, capfd, monkeypatch, packing):
  monkeypatch.chdir(tmp_path)
  assert entry.run([*lines_of(tmp_path, [(f"Q{n}?\n", f"A{n}.") for n in range(10)]), f"data.packing={packing}"]) == 0
  out = capfd.readouterr().out
  plain = [" ".join(line.split()) for line in out.splitlines()]
  at = plain.index("read Q0?\\n")
  assert plain[at - 1].endswith("8 tokens, 4 learned") and plain[at + 2] == "learn A0.<|endoftext|>"
  assert "tokens of a document 8 to 8; median 8, 90th percentile 8" in plain
  learned = "an epoch 36 tokens learned of 72 read" if packing == "pad" else "an epoch 36 tokens learned of 63 read"
  assert any(line.startswith(learned) for line in plain)
  assert "\x1b" not in out and sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pairs.jsonl"]


def test_colours_and_eighty_columns(tmp_path, monkeypatch):
  file = io.StringIO()
  monkeypatch.setattr(console, "console", Console(
    file=file, force_terminal=True, width=80, color_system="standard", markup=False, highlight=False, emoji=False))
  assert entry.run(lines_of(tmp_path, [(f"Q{n} " + "x" * 500, "a" * 400) for n in range(10)] + [("Q", "b\x1b[2J")] * 9)
                   + ["data.seq_len=1000", "model.max_len=1000"]) == 0
  out = file.getvalue()
  assert "\x1b[1;32ma" in out and "\x1b[2J" not in out
  lines = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in out.split("\nTrain on it:")[0].splitlines()]
  assert max(map(len, lines)) <= 80
  assert f"[{503 - 160}moretokens]" in "".join("".join(lines).split())


def test_what_is_cut_off_is_told(tmp_path, capfd):
  assert entry.run(lines_of(tmp_path, [("Q" * 60, "A")] * 5 + [("Q", "A" * 60)] * 5 + [("Q", "A")] * 10)) == 0
  out, err = capfd.readouterr()
  assert "warning: not everything is learned: 5 of 20 answers: they lie beyond data.seq_len=40" in err
  assert "warning: not everything is learned: 5 of 20 answers: their end lies beyond data.seq_len=40" in err
  assert "10 documents are longer than a row (50.0%)" in out


def test_numeric_examples_are_counted(capfd):
  assert entry.run(["task=data", "model=mlp", "data=xor", "model.mlp.inputs=2", "data@retain=none"]) == 0
  assert "examples" in capfd.readouterr().out


def test_data_that_is_missing_is_refused(tmp_path, capfd):
  assert entry.run([*QUIET, f"data.path={tmp_path / 'none.jsonl'}"]) == 2
  assert "none.jsonl" in capfd.readouterr().err
