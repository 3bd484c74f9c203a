"""A wandb server on 127.0.0.1 with the HTTP interface that runs, sweeps, agents and workspaces need."""

import gzip
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY = {"id": "e", "name": "me"}


class Hub:
  """The received data. A sweep gives each idle agent one of `jobs`, {parameter: value}."""

  def __init__(self, jobs: Sequence[dict[str, Any]] = ()):
    self.jobs = list(jobs)
    self.runs: dict[str, dict[str, Any]] = {}  # by id: what was upserted, `history` and `summary`
    self.views: list[dict[str, Any]] = []
    self.sweep: dict[str, Any] = {}
    self.unknown: list[str] = []  # operations without an answer
    self.given = 0  # jobs
    self.url = ""

  # operations of the GraphQL interface, by name

  def on_Viewer(self, _: dict) -> dict:
    return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}

  def on_GetDefaultEntity(self, _: dict) -> dict:
    return {"viewer": {"id": "u", "entity": "me"}}

  def on_UpsertBucket(self, v: dict) -> dict:
    run = self.runs.setdefault(v["name"], {"history": [], "summary": {}})
    run |= {key: value for key, value in v.items() if value is not None}
    project = {"id": "p", "name": v["project"] or "uncategorized", "entity": ENTITY}
    bucket = {"id": f"b-{v['name']}", "name": v["name"], "displayName": v.get("displayName") or v["name"],
              "description": "", "config": v.get("config"), "sweepName": v.get("sweep"), "project": project,
              "historyLineCount": 0}  # fmt: skip
    return {"upsertBucket": {"bucket": bucket, "inserted": True}}

  def on_RunResumeStatus(self, _: dict) -> dict:
    return {"model": {"id": "p", "name": "lora_exp", "entity": ENTITY, "bucket": None}}

  def on_CreateRunFiles(self, v: dict) -> dict:
    files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in v["files"]]
    return {"createRunFiles": {"runID": f"b-{v['run']}", "uploadHeaders": [], "files": files}}

  def on_UpsertView2(self, v: dict) -> dict:
    self.views.append(v | {"spec": json.loads(v["spec"])})
    return {"upsertView": {"view": {"id": "view", "name": v["name"]}, "inserted": True}}

  def on_UpsertSweep(self, v: dict) -> dict:
    self.sweep = yaml.safe_load(v["config"])
    project = {"id": "p", "name": v["projectName"], "entity": ENTITY}
    return {"upsertSweep": {"sweep": {"name": "s0", "project": project}, "configValidationWarnings": []}}

  def on_SweepWithRuns(self, _: dict) -> dict:
    sweep = {"id": "s", "name": "s0", "config": yaml.safe_dump(self.sweep), "runs": {"edges": []}}
    return {"project": {"sweep": sweep}}

  def on_CreateAgent(self, _: dict) -> dict:
    return {"createAgent": {"agent": {"id": "agent"}}}

  def on_Heartbeat(self, _: dict) -> dict:
    commands = []
    if self.given < len(self.jobs):
      args = {key: {"value": value} for key, value in self.jobs[self.given].items()}
      commands = [{"type": "run", "run_id": f"job{self.given}", "args": args, "program": "lora_exp"}]
      self.given += 1
    return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

  # HTTP

  def answer(self, path: str, body: dict) -> dict:
    if "query" in body:
      name = body.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", body["query"])[0]
      operation = getattr(self, f"on_{name}", None)
      if operation is None:
        self.unknown.append(f"{name} {body}")
      return {"data": operation(body.get("variables") or {}) if operation else {}}
    if path.endswith("/file_stream"):
      run = self.runs[path.split("/")[-2]]
      for name, part in (body.get("files") or {}).items():
        lines = [json.loads(line) for line in part["content"]]
        if name == "wandb-history.jsonl":
          run["history"] += lines
        elif name == "wandb-summary.json":
          run["summary"] = lines[-1]
      if body.get("complete"):
        run["exit_code"] = body["exitcode"]
    return {}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
  """`hub` at `hub.url`."""

  class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
      body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
      if self.headers.get("Content-Encoding") == "gzip":
        body = gzip.decompress(body)
      try:
        read = json.loads(body)
      except ValueError:
        read = {}
      answer = json.dumps(hub.answer(self.path, read)).encode()
      self.send_response(200)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(answer)))
      self.end_headers()
      self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
      """Logs nothing."""

  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  hub.url = f"http://127.0.0.1:{server.server_port}"
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
