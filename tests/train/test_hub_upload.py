"""`push=OWNER/NAME`: files reach a hub on 127.0.0.1, and the token is neither written nor printed."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOKEN = "hf_" + "x" * 34
SCRIPT = """
import sys
from pathlib import Path
from lora_exp.config import LoraExpError
from lora_exp.train.serving.hub_upload import upload
try:
  upload(Path(sys.argv[1]), sys.argv[2])
except LoraExpError as error:
  sys.exit(f"code {error.code}: {error}")
"""


class Hub(BaseHTTPRequestHandler):
  """The parts of the Hugging Face Hub's interface that an upload needs."""

  files: dict[str, bytes] = {}
  repositories: list[dict] = []

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers["Content-Length"]))
    if self.headers["Authorization"] != f"Bearer {TOKEN}":
      self.answer(401, {"error": "Invalid credentials"})
    elif self.path == "/api/repos/create":
      self.repositories.append(json.loads(body))
      self.answer(200, {"url": f"http://{self.headers['Host']}/owner/name"})
    elif self.path.endswith("/preupload/main"):
      names = [file["path"] for file in json.loads(body)["files"]]
      self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
    elif self.path.endswith("/commit/main"):
      for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
          self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
      self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/owner/name/commit/1", "commitOid": "1"})
    else:
      self.answer(200, {"errors": [], "warnings": []})

  def do_GET(self) -> None:
    self.answer(200, {"id": "owner/name", "sha": "1", "siblings": []})

  def answer(self, status: int, content: dict) -> None:
    body = json.dumps(content).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args: object) -> None:
    """Prints nothing."""


@pytest.fixture
def address():
  server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  server.server_close()


def push(directory: Path, address: str, token: str) -> subprocess.CompletedProcess[str]:
  env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token,
         "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(directory.parent / "hf")}
  command = [sys.executable, "-c", SCRIPT, str(directory), "owner/name"]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_files_are_uploaded_without_showing_the_token(tmp_path, address):
  out = tmp_path / "out"
  out.mkdir()
  (out / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# A model\n")
  (out / "adapter_config.json").write_text("{}")
  done = push(out, address, TOKEN)
  assert done.returncode == 0, done.stderr
  assert Hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
  [repository] = Hub.repositories
  assert repository["name"] == "name" and repository["organization"] == "owner"
  assert repository.get("private") is True or repository.get("visibility") == "private"
  assert f"Uploaded to {address}/owner/name" in done.stdout
  everything = done.stdout + done.stderr + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
  assert TOKEN not in everything


def test_refused_token_is_an_input_error(tmp_path, address):
  out = tmp_path / "out"
  out.mkdir()
  (out / "adapter_config.json").write_text("{}")
  done = push(out, address, "hf_" + "y" * 34)
  assert done.returncode == 1 and "code 2:" in done.stderr and "log in with `hf auth login`" in done.stderr, done.stderr
  assert "Traceback" not in done.stderr and "yyyy" not in done.stderr
