"""Output that is lost, refused or not read never raises and never waits for a reader during training."""

import contextlib
import io
import os
import sys

import pytest

from lora_exp.runtime.output_stream import TolerantStream, output_lost, tolerant_output, without_waiting


def stream_of(descriptor: int, encoding: str = "utf-8") -> io.TextIOWrapper:
  return io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)), encoding=encoding)


@pytest.fixture
def pipe():
  """(reader, writer): the file descriptors of a pipe."""
  descriptors = os.pipe()
  yield descriptors
  for descriptor in descriptors:
    with contextlib.suppress(OSError):
      os.close(descriptor)


def test_a_closed_pipe_discards_text(pipe):
  reader, writer = pipe
  stream = TolerantStream(stream_of(writer))
  stream.write("seen\n")
  assert os.read(reader, 100) == b"seen\n" and not stream.lost
  os.close(reader)
  for _ in range(3):
    assert stream.write("lost\n") == 5
    stream.flush()
  assert stream.lost
  os.write(writer, b"as other writers of the descriptor do")  # into /dev/null


def test_a_full_pipe_is_waited_for_only_at_the_end(pipe):
  reader, writer = pipe
  stream, lines = TolerantStream(stream_of(writer)), [f"line {n}\n" for n in range(20_000)]
  with without_waiting():
    for line in lines:
      stream.write(line)
    assert stream.pending
    text = b""
    while stream.pending:  # the reader wakes up
      text += os.read(reader, 1 << 16)
      stream.flush()
  os.close(writer)
  while part := os.read(reader, 1 << 16):
    text += part
  assert text.decode() == "".join(lines)
  stream.pending += b"x"
  stream.finish(0.1)
  assert stream.lost


def test_a_reader_that_never_reads_costs_bounded_memory(pipe):
  stream = TolerantStream(stream_of(pipe[1]))
  with without_waiting():
    for _ in range(40):
      stream.write("x" * 100_000)
  assert 0 < len(stream.pending) <= 1 << 20
  stream.finish(0.01)
  assert not stream.pending


@pytest.mark.parametrize(("encoding", "expected"), [
  ("ascii", "64x64 -> 2 +/- 1 ???"), ("latin-1", "64×64 -> 2 ± 1 ???"), ("utf-8", "64×64 → 2 ± 1 é日?")])
def test_characters_that_an_encoding_lacks_are_replaced(tmp_path, encoding, expected):
  text = "64×64 → 2 ± 1 é日\udcff" if encoding == "utf-8" else "64×64 → 2 ± 1 Ж日\udcff"
  with open(tmp_path / "out", "w", encoding=encoding) as file:
    TolerantStream(file).write(text)
  assert (tmp_path / "out").read_text(encoding=encoding) == expected


@pytest.mark.parametrize("kind", ["absent", "closed", "full"])
def test_streams_that_cannot_be_written_are_silent(tmp_path, monkeypatch, kind):
  file = None if kind == "absent" else open("/dev/full" if kind == "full" else tmp_path / "out", "w")  # noqa: SIM115
  if file and kind == "closed":
    file.close()
  monkeypatch.setattr(sys, "stdout", file)
  with tolerant_output():
    assert not sys.stdout.isatty()
    print("text")
    sys.stdout.flush()
    assert output_lost()
  assert sys.stdout is file
