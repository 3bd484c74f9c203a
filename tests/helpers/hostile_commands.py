"""Good files of every kind that a command reads, hostile versions of each, and the commands that read them.

`good_files` makes a folder once. A case is a copy of it with one hostile file; the command of its kind is run in a
process with limits, and what it printed and created is compared with the promise: an exit code, one screen of text, no
traceback, nothing outside of its run directory.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml
from hostile_files import FOREIGN_FILES, damaged
from runs import QUIET, TINY, command, environment, process
from served_runs import FEW, chat_base

SECONDS = 20  # of processor time that a command may take
LONGEST = 90  # seconds after which it is killed, on a machine that does other work too
DATA_LIMIT, MEMORY = 6 * 2**30, 2 * 2**30  # bytes that it may allocate, and that may be resident
MOST_LINES, MOST_CHARACTERS = 40, 6000  # of stderr: one screen
SECRET = "planted-secret-9a7b"
PAIRS = [{"prompt": f"the cat {n}", "response": f"a hat was {n}!"} for n in range(40)]
DEEP = b"[" * 100_000 + b"]" * 100_000
BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *(
  f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]).encode()


def good_files(at: Path) -> Path:
  """A folder with a base, a finished and a stopped run on it, data in three formats, and a folder of configs."""
  at.mkdir(exist_ok=True)
  base = chat_base(at / "base")
  lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
  (at / "rows.jsonl").write_text(lines)
  (at / "rows.csv").write_text("prompt,response\n" + "".join(f"{p['prompt']},{p['response']}\n" for p in PAIRS))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), at / "rows.parquet")
  FOREIGN_FILES["gguf"].make(at / "gguf")
  (at / "conf" / "lora").mkdir(parents=True)
  (at / "conf" / "lora" / "mine.yaml").write_text(json.dumps({"defaults": ["lora"], "rank": 3, "alpha": 6}))
  train = ["model=hf", f"model.weights={base}", *QUIET, "data=files", f"data.path={at / 'rows.jsonl'}", *FEW,
           f"cache={at / 'cache'}"]  # fmt: skip
  done = process(*train, "train.steps=2", "train.save_every=1", f"hydra.run.dir={at / 'done'}", cwd=at)
  assert done.returncode == 0, done.stderr
  stopped = process(*train, "train.steps=4", "train.stop_at=2", f"hydra.run.dir={at / 'stopped'}", cwd=at)
  assert stopped.returncode == 75, stopped.stderr
  for run in ("done", "stopped"):
    file = at / run / "config.yaml"
    file.write_text(json.dumps(yaml.safe_load(file.read_text())))  # JSON is YAML, and `damaged` changes its values
  return at


@dataclass(frozen=True)
class Kind:
  """A kind of file: its path in the folder of `good_files`, the command that reads it, and hostile contents."""

  file: str
  argv: tuple[str, ...]  # {0} is the folder
  contents: tuple[Callable[[bytes], bytes] | bytes, ...]  # each is refused with the first of `codes`
  codes: tuple[int, ...] = (2,)
  passes: bool = False  # whether some of `contents` are passed over, with exit code 0
  after: Callable[[Path], None] | None = None  # called after the file was written


def values(**changes: object) -> Callable[[bytes], bytes]:
  """The JSON object with other values."""
  return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def at_path(path: str, value: object) -> Callable[[bytes], bytes]:
  """The JSON object with another value at a dotted path."""

  def changed(content: bytes) -> bytes:
    whole = json.loads(content)
    *groups, name = path.split(".")
    node = whole
    for group in groups:
      node = node[group]
    node[name] = value
    return json.dumps(whole).encode()

  return changed


def header(text: bytes) -> bytes:
  """A safetensors file with the header `text` and 64 bytes of data."""
  return len(text).to_bytes(8, "little") + text + bytes(64)


def tensor(**changes: object) -> bytes:
  """A safetensors file with one tensor, changed."""
  entry = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}
  return header(json.dumps({"model.norm.weight": entry}).encode())


def template(text: str) -> Callable[[bytes], bytes]:
  return values(chat_template=text)


def gguf_count(offset: int) -> Callable[[bytes], bytes]:
  """The GGUF file with the largest number at `offset` of its header."""
  return lambda content: content[:offset] + b"\xff" * 7 + b"\x7f" + content[offset + 8 :]


def renew_sums(folder: Path) -> None:
  """Makes the checksums of the stopped run's checkpoint right again, so that its content is believed."""
  [sums] = (folder / "stopped").glob("checkpoints/*/SHA256SUMS")
  names = [line.split("  ", 1)[1] for line in sums.read_text().splitlines()]
  sums.write_text("".join(f"{hashlib.sha256((sums.parent / n).read_bytes()).hexdigest()}  {n}\n" for n in names))


GENERATE = ("task=generate", "prompt=hi", "sample.max_tokens=1", "model.base=weights")
ON_BASE = (*GENERATE, "model=hf", "model.weights={0}/base")
ON_RUN = (*GENERATE[:3], "run={0}/done")
RESUME = ("train.resume={0}/stopped",)
DATA = ("task=data", "data=files", *TINY)
SIZE = 10**12
KINDS: Mapping[str, Kind] = {
  "base config": Kind("base/config.json", ON_BASE, (
    b"", b"\xff\xfe", DEEP, values(hidden_size=SIZE), values(num_hidden_layers=10**9), values(vocab_size=SIZE),
    values(intermediate_size=SIZE), values(num_attention_heads=0), values(head_dim=-1), values(hidden_size="64"),
    values(model_type="../../evil"), values(rope_scaling={"rope_type": "linear", "factor": 1e400}),
    values(architectures=[["LlamaForCausalLM"]], model_type=None), values(rms_norm_eps="nan"))),
  "base weights": Kind("base/model.safetensors", ON_BASE, (
    b"", b"\xff" * 64, header(DEEP), header(b" " * 2**20), header(b"{" + b'"a":0,' * 10**5 + b'"b":0}'),
    tensor(shape=[2**40, 2**40]), tensor(data_offsets=[0, 2**60]), tensor(data_offsets=[-64, 0]),
    tensor(dtype="F" * 5000), tensor(shape=[-4, -4]), tensor(shape="4"), (2**62).to_bytes(8, "little") + b"{}",
    lambda content: content[: len(content) // 2])),
  "tokenizer": Kind("base/tokenizer.json", ON_BASE, (
    b"", b"null", DEEP, values(model={}), values(model={"type": "BPE", "vocab": {"a": 2**40}, "merges": []}),
    values(added_tokens=[{"id": 10**9, "content": "x", "special": True}]), values(decoder={"type": "Evil"}),
    values(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$("}, "behavior": "Isolated", "invert": False}),
    at_path("model.merges", [["a", "b"]]), at_path("model.vocab", {str(n): n for n in range(10**5)}))),
  "chat template": Kind("base/tokenizer_config.json", (*ON_BASE, "sample.chat=always"), (
    template("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"),
    template("{{ 'a' * 10**10 }}"), template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    template("{% include '/etc/passwd' %}"), template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), template("{{ cycler.__init__.__globals__.os }}"),
    template("{% if %}"), values(chat_template=[{"name": 3}]), DEEP)),
  "gguf": Kind("gguf/model.gguf", (*GENERATE, "model=hf", "model.weights={0}/gguf/model.gguf", "model.tokenizer=bytes"),
               (b"", b"GGUF", gguf_count(8), gguf_count(16), gguf_count(24), lambda content: content[:100],
                lambda content: content[:4] + b"\xff" * 4 + content[8:], lambda content: b"\x80\x04" + content)),
  "adapter config": Kind("done/adapter/adapter_config.json", (*ON_BASE, "lora.init_from={0}/done/adapter"), (
    b"", b"[]", DEEP, values(r=SIZE), values(r=-1), values(lora_alpha="x"), values(peft_type="../evil"),
    values(target_modules="(a+)+$"), values(target_modules=[[]]), values(rank_pattern={"(a|a)*b": SIZE}),
    values(auto_mapping={"base_model_class": "os.system"}, peft_type="EVIL"),
    values(target_modules=["q_proj"], layers_to_transform=[10**12]))),
  "adapter weights": Kind("done/adapter/adapter_model.safetensors", (*ON_BASE, "lora.init_from={0}/done/adapter"), (
    b"", header(DEEP), tensor(), tensor(shape=[2**40, 2**40]), tensor(data_offsets=[0, 2**60]),
    lambda content: content[: len(content) // 2], b"\x80\x04K\x01.")),
  "json lines": Kind("rows.jsonl", (*DATA, "data.path={0}/rows.jsonl"), (
    b"", b"\x00" * 1000, DEEP, b'{"prompt": ' + b"[" * 10**6, b"\xff\xfe\x00" * 99,
    b'{"prompt": "' + b"x" * (70 * 2**20) + b'"', b'{"a": 1}\n' * 1000)),
  "csv": Kind("rows.csv", (*DATA, "data.path={0}/rows.csv"), (
    b"", b"prompt,response\n" + b'"' + b"x" * 10**6, b"\x00" * 1000, b"," * 10**6 + b"\n1", b"prompt,prompt\n1,2\n",
    b"\xff\xfe" * 500)),
  "parquet": Kind("rows.parquet", (*DATA, "data.path={0}/rows.parquet"), (
    b"", b"PAR1", b"PAR1" + b"\xff" * 8 + b"PAR1", lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1",
    lambda content: content[: len(content) // 2], lambda content: b"PAR1" + bytes(2**20) + content[-200:])),
  "config of a run": Kind("done/config.yaml", ON_RUN, (
    b"", b"- a", BOMB, DEEP, b"a: !!python/object/apply:os.system ['touch ran']", b"model: ${oc.env:PLANTED}",
    at_path("model.width", SIZE), at_path("model.layers", "9" * 4400), b'{"model": {"layers": ' + b"9" * 5000 + b"}}",
    at_path("model.weights", "../../../etc/passwd"),
    at_path("lora.method", "../../evil"), at_path("model.family", "os"),
    at_path("model._target_", "os.system"), b"\xff\xfe\x00")),
  "config of a resumed run": Kind("stopped/config.yaml", RESUME, (
    b"", BOMB, b"a: !!python/name:os.system", at_path("train.steps", 10**30), at_path("cache", "/proc/x"),
    at_path("name", "../../evil"), at_path("data.path", "${oc.env:PLANTED}"),
    at_path("hydra", {"callbacks": {"a": {"_target_": "os.abort"}}}))),
  "summary": Kind("stopped/summary.json", RESUME, (b"", b"[]", DEEP, b'{"status": ' + b"9" * 5000), passes=True),
  "metrics": Kind("done/metrics.jsonl", ("task=compare", "runs=[{0}/done,{0}/stopped]"), (
    b"", DEEP, b'{"step": "x"}\n' * 99, b"\x00\xff" * 99, b'{"step": 1e999, "loss": NaN, "split": []}\n'), passes=True),
  "metrics of a resumed run": Kind("stopped/metrics.jsonl", RESUME, (
    b"", DEEP, b'{"step": "x"}\n' * 99, b"\x00\xff" * 99, b'{"step": 1, "split": []}\n'), passes=True),
  "held-out losses of a resumed run": Kind("stopped/held_out.npz", RESUME, (
    b"", b"PK\x03\x04" + b"\xff" * 99, lambda content: content[: len(content) // 2]), passes=True),
  "checkpoint": Kind("stopped/checkpoints/2/meta.json", RESUME, (
    b"", b"[]", DEEP, values(step=10**30), values(meta=[]), values(arrays={"../evil": 1}), at_path("meta.record", []),
    at_path("meta.record.skipped", "x"), at_path("meta.settings", "x"), at_path("meta.data", None),
    at_path("meta.record.evil", 1)), codes=(4, 2), after=renew_sums),
  "checksums": Kind("stopped/checkpoints/2/SHA256SUMS", RESUME, (
    b"", b"0" * 64 + b"  ../../../../etc/passwd\n", b"\xff" * 99, DEEP), codes=(4,)),
  "config directory": Kind("conf/lora/mine.yaml", (
    "--config-dir", "{0}/conf", "task=plan", "lora=mine", *TINY), (
    BOMB, DEEP, b"_target_: os.abort", b"rank: ${oc.env:PLANTED}", b"rank: !!python/object/apply:os.abort []",
    b"defaults: [../../../etc/passwd]", b"defaults: [mine]", b"# @package hydra\ncallbacks: {a: {_target_: os.abort}}",
    b"\xff\xfe\x00", b"rank: 1000000000000", b"rank: ${rank}")),
}


@dataclass(frozen=True)
class Case:
  """A kind of file with hostile content: one of its list, or by a seed from the good one."""

  kind: str
  listed: bool
  number: int

  def __str__(self) -> str:
    return f"{self.kind} {'' if self.listed else 'damaged '}{self.number}"

  def content(self, good: bytes) -> bytes:
    """The hostile content of the file whose content was `good`."""
    if not self.listed:
      moments = random.Random(f"{self.kind} {self.number}")
      return next(content for content in iter(lambda: damaged(moments, good), None) if content != good)
    content = KINDS[self.kind].contents[self.number]
    return content if isinstance(content, bytes) else content(good)


def cases(seeds: int) -> Iterator[Case]:
  """All listed contents, and `seeds` damaged ones of each kind."""
  for name, kind in KINDS.items():
    yield from (Case(name, True, number) for number in range(len(kind.contents)))
    yield from (Case(name, False, number) for number in range(seeds))


@dataclass(frozen=True)
class Ended:
  """How a limited process ended."""

  code: int
  out: str
  err: str
  seconds: float  # of processor time
  memory: int  # bytes, resident at most


def run_limited(argv: list[str], cwd: Path, cache: Path) -> Ended:
  """Runs the command line with the limits of this module."""
  home, temporary = cwd / "home", cwd / "tmp"
  for folder in (home, temporary):
    folder.mkdir(parents=True, exist_ok=True)
  env = {**environment(), "HOME": str(home), "TMPDIR": str(temporary), "LORA_EXP_CACHE": str(cache),
         "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"), "PLANTED": SECRET}  # fmt: skip
  out, err = cwd.with_suffix(".out"), cwd.with_suffix(".err")
  with open(out, "wb") as out_file, open(err, "wb") as err_file:
    child = subprocess.Popen(command(*argv), cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out_file,
                             stderr=err_file, preexec_fn=_limit)  # fmt: skip
    timer = threading.Timer(LONGEST, child.kill)
    timer.start()
    _, status, usage = os.wait4(child.pid, 0)
    timer.cancel()
  child.returncode = os.waitstatus_to_exitcode(status)
  texts = [file.read_text(errors="replace") for file in (out, err)]
  for file in (out, err):
    file.unlink()
  return Ended(child.returncode, *texts, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _limit() -> None:
  # Not RLIMIT_AS: the library that draws plots reserves more addresses than any memory has.
  resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT, resource.RLIM_INFINITY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def everything(folder: Path) -> set[Path]:
  return {path for path in folder.rglob("*") if not path.name.endswith(".lock")}


def faults(case: Case, good: Path, at: Path) -> tuple[int, list[str]]:
  """Runs the command of a case in a copy of `good`: its exit code, and what it did against the promise."""
  kind, folder = KINDS[case.kind], at / "files"
  if folder.exists():
    shutil.rmtree(at)
  shutil.copytree(good, folder, ignore=shutil.ignore_patterns("cache", "cwd"), symlinks=True)
  file = folder / kind.file
  file.write_bytes(case.content(file.read_bytes()))
  if kind.after is not None:
    kind.after(folder)
  cwd = at / "cwd"
  (cwd / "home").mkdir(parents=True)
  (cwd / "tmp").mkdir()
  before = everything(at)
  ended = run_limited(argv_of(kind, folder, good), cwd, good / "cache")
  return ended.code, list(broken_promises(case, ended, everything(at) - before, folder))


def argv_of(kind: Kind, folder: Path, good: Path) -> list[str]:
  """The command line of a kind on the files in `folder`."""
  cache = [] if kind.argv == RESUME else [f"cache={good / 'cache'}"]  # a run has its own
  return [*(word.format(folder) for word in kind.argv), *cache]


def broken_promises(case: Case, ended: Ended, created: set[Path], folder: Path) -> Iterator[str]:
  """What a command did that it should not have done."""
  kind = KINDS[case.kind]
  allowed = {*kind.codes, *([0] if kind.passes or not case.listed else [])}
  if ended.seconds > SECONDS:
    yield f"took {ended.seconds:.1f} s of processor time"
  if ended.code not in allowed:
    yield f"exit code {ended.code}, not one of {sorted(allowed)}"
  if ended.memory > MEMORY:
    yield f"took {ended.memory / 2**30:.1f} GiB"
  text = ended.err
  if "Traceback" in text + ended.out:
    yield "a traceback"
  if text.count("\n") > MOST_LINES or len(text) > MOST_CHARACTERS:
    yield f"{text.count(chr(10))} lines, {len(text)} characters of stderr"
  if ended.code and not text.strip():
    yield "no word of why"
  if SECRET in text + ended.out:
    yield "the secret is shown"
  outside = [path for path in created if not path.is_relative_to(folder / "stopped")]
  if outside:
    yield f"created {', '.join(str(path) for path in sorted(outside)[:4])}"

