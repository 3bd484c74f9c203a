"""A server of llama.cpp for one check: the program llama-server, or the Python package xllamacpp, which contains it."""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.config import InputError, LoraExpError

PROGRAM, PACKAGE = "llama-server", "xllamacpp"
START = 300  # seconds until the model is loaded
CONTEXT = 512  # tokens
STARTER = """
import os, sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 1
params.cpuparams.n_threads = max(1, (os.cpu_count() or 1) // 2)
if len(sys.argv) > 4:
  params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path=sys.argv[4], scale=1.0)]
server = xllamacpp.Server(params)
while True:
  time.sleep(3600)
"""


@contextmanager
def llama_server(model: Path, adapter: Path | None) -> Iterator[str]:
  """Serves a GGUF model, with an adapter if it is given; yields the address, and ends the server afterwards.

  Raises InputError if llama.cpp is not installed, and LoraExpError with its last lines if it cannot load the files.
  """
  port = _free_port()
  command = _command(model, adapter, port)
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603 - a list of ours
  address = f"http://127.0.0.1:{port}"
  try:
    _wait(process, address)
    yield address
  finally:
    process.terminate()
    try:
      process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()


def _command(model: Path, adapter: Path | None, port: int) -> list[str]:
  program = shutil.which(PROGRAM)
  if program is not None:
    lora = [] if adapter is None else ["--lora", str(adapter)]
    return [program, "-m", str(model), *lora, "--host", "127.0.0.1", "--port", str(port), "-c", str(CONTEXT)]
  if importlib.util.find_spec(PACKAGE) is not None:
    extra = [] if adapter is None else [str(adapter)]
    return [sys.executable, "-c", STARTER, str(model), str(port), str(CONTEXT), *extra]
  raise InputError(f"verify.backend=llama_cpp: neither the program {PROGRAM} nor the package {PACKAGE} is installed: "
                   "pip install 'lora_exp[llama_cpp]'")


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return int(listener.getsockname()[1])


def _wait(process: subprocess.Popen, address: str) -> None:
  """Waits until the server has loaded the model."""
  for _ in range(START * 4):
    if process.poll() is not None:
      assert process.stderr is not None
      lines = process.stderr.read().decode(errors="replace").strip().splitlines()
      errors = [line for line in lines if " E " in line or "error" in line.lower()]
      raise LoraExpError(f"llama.cpp cannot load the files: {' '.join((errors or lines)[-3:])}")
    try:
      with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:  # noqa: S310 - this machine, over http
        if reply.status == 200:
          return
    except urllib.error.HTTPError:
      pass  # it is loading
    except OSError:
      pass
    time.sleep(0.25)
  raise LoraExpError(f"llama.cpp did not start within {START} s")
