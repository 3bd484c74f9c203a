"""Small files of every kind that the program reads from others, their readers, and ways to damage them."""

import io
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from adapters import FULL, KINDS, LLAMA, SHAPES
from checkpoints import CONFIG
from corpora import PAIRS
from safetensors.numpy import save_file
from tokenizer_files import CHATML, byte_level, gguf_file, sentencepiece_model, user

from lora_exp import lora
from lora_exp.config.errors import InputError
from lora_exp.data.chats.chat_template import chat_template
from lora_exp.data.formats.file_formats import TEXT
from lora_exp.data.formats.row_formats import file_rows, find_format
from lora_exp.data.prompts import read_prompts
from lora_exp.data.tokenization.tokenizer_files import read_tokenizer
from lora_exp.models.hf_config import from_hf
from lora_exp.models.weights.gguf_config import read_gguf_config
from lora_exp.models.weights.store import open_source
from lora_exp.report.reading.document_losses import read_document_losses
from lora_exp.runtime.gguf_header import read_gguf
from lora_exp.runtime.json_files import read_json_object
from lora_exp.runtime.json_lines import read_ledger, read_metrics
from lora_exp.runtime.safetensors_reader import read_arrays, read_header
from lora_exp.runtime.saved_config import load_config
from lora_exp.runtime.sweep_directory import sweep_trial
from lora_exp.train.run_summary import read_summary

MISSING = object()
VALUES = [None, True, -1, 0, 1.5, 10**30, 2**31, -(2**63), 1e308, "", "a", "x" * 5000, "\x00\ud800", [], {}, [[]],
          [None], {"a": [1]}, {"content": 3}, "../../../etc/passwd", MISSING]  # fmt: skip
BYTES = [b"\xff" * 8, b"\x00" * 8, b"\x7f", b"\x00", b"[", b"{", b'"', b"\n", b"\xff\xfe", b"9" * 30]
Value = Any  # of JSON


@dataclass(frozen=True)
class ForeignFile:
  """A kind of file: `make` writes a good one into a folder and returns it, and `read` reads it."""

  make: Callable[[Path], Path]
  read: Callable[[Path], object]


def damaged(moments: random.Random, content: bytes) -> bytes:
  """`content` with values of its JSON replaced or, if it is not JSON, with other bytes."""
  try:
    value = json.loads(content)
  except ValueError:
    return _with_other_bytes(moments, content)
  if moments.randrange(5) == 0:
    return _with_other_bytes(moments, content)
  for _ in range(moments.randint(1, 3)):
    value = _with_other_value(value, moments.choice(list(_paths(value)) or [()]), moments.choice(VALUES))
  return json.dumps(value).encode()


def _paths(value: Value, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
  """The places of all values, at most the first 40 of each object or list."""
  items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
  for key, inner in items[:40]:
    yield (*path, key)
    yield from _paths(inner, (*path, key))


def _with_other_value(value: Value, path: tuple[Any, ...], other: Value) -> Value:
  """A copy of `value` with `other` at `path`."""
  if not path:
    return None if other is MISSING else other
  key, *rest = path
  copy = dict(value) if isinstance(value, dict) else list(value)
  if not rest and other is MISSING:
    del copy[key]
  else:
    copy[key] = _with_other_value(copy[key], tuple(rest), other)
  return copy


def _with_other_bytes(moments: random.Random, content: bytes) -> bytes:
  """`content` with up to eight bytes or numbers replaced, and perhaps shorter or longer."""
  changed = bytearray(content)
  for _ in range(moments.randint(0, 8)):
    place = moments.randrange(max(1, min(len(content), 4000)))
    new = moments.choice(BYTES)
    changed[place : place + len(new)] = new
  cut = moments.choice([None, None, len(content) // 2, 9, 0])
  return bytes(changed[:cut]) + moments.choice([b"", b"", b"\x00", content[:50]])


def _written(name: str, content: bytes | str) -> Callable[[Path], Path]:
  def write(folder: Path) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file

  return write


def _adapter(name: str) -> Callable[[Path], Path]:
  def write(folder: Path) -> Path:
    lora.save_adapter(folder, KINDS["biases and modules"][0], LLAMA, {})
    return folder / name

  return write


def _read_adapter(file: Path) -> object:
  return lora.load_adapter(file.parent, LLAMA, SHAPES, FULL)


def _safetensors(folder: Path) -> Path:
  file = folder / "model.safetensors"
  save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, file)
  return file


def _read_safetensors(file: Path) -> object:
  entries = read_header(file)
  names = [name for name, entry in entries.items() if entry.dtype in ("F32", "F16")]
  return read_arrays(file, entries, names), open_source(file, file.parent / "cache")


def _index(folder: Path) -> Path:
  _safetensors(folder).rename(folder / "model-00001-of-00002.safetensors")
  weight_map = dict.fromkeys("ab", "model-00001-of-00002.safetensors")
  return _written("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))(folder)


def _text(text: str) -> bytes:
  return struct.pack("<Q", len(text)) + text.encode()


def _gguf(folder: Path) -> Path:
  """A GGUF file of a model without its data: seven settings and two tensors."""
  numbers = {"block_count": 2, "embedding_length": 8, "attention.head_count": 2, "context_length": 16,
             "feed_forward_length": 12}
  settings = [_text("general.architecture") + struct.pack("<I", 8) + _text("llama"),
              _text("general.alignment") + struct.pack("<II", 4, 32),
              *(_text(f"llama.{name}") + struct.pack("<II", 4, x) for name, x in numbers.items()),
              _text("list") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)]
  tensors = [_text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 5, 0, 64),
             _text("rope_freqs.weight") + struct.pack("<IQIQ", 1, 2, 0, 0)]
  header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
  return _written("model.gguf", header + b"".join([*settings, *tensors]) + struct.pack("<f", 1) * 256)(folder)


def _read_gguf(file: Path) -> object:
  return read_gguf(file), from_hf(read_gguf_config(file), str(file))


def _tokenizer(name: str) -> Callable[[Path], Path]:
  def write(folder: Path) -> Path:
    settings = {"chat_template": CHATML, "additional_special_tokens": ["<|im_start|>"], "bos_token": {"content": "<s>"},
                "added_tokens_decoder": {"1": {"content": "<|im_start|>", "special": True}}}
    byte_level(folder, **settings)
    if name.endswith(".gguf"):
      return gguf_file(folder, "gpt-2")
    return sentencepiece_model(folder) / name if name.endswith(".model") else folder / name

  return write


def _read_tokenizer(file: Path) -> object:
  used = file if file.suffix in (".model", ".gguf") else file.parent / "tokenizer.json"
  tokenizer = read_tokenizer(used)
  ids = tokenizer.encode_batch(["The cat's hat"])
  template = tokenizer.chat_template
  return tokenizer.decode(ids[0]), template and chat_template("it", template).render({}, user("hi"), True)


def _rows(file: Path) -> object:
  kind = find_format(file)
  return kind == TEXT or list(file_rows(file, kind, file.name, None))


def _table(name: str) -> Callable[[Path], Path]:
  """PAIRS as a Parquet or Arrow file."""
  def write(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    table, out = pyarrow.Table.from_pylist(PAIRS), io.BytesIO()
    if name.endswith(".parquet"):
      pyarrow.parquet.write_table(table, out)
    else:
      with pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return _written(name, out.getvalue())(folder)

  return write


def _compressed(name: str, compression: str) -> Callable[[Path], Path]:
  def write(folder: Path) -> Path:
    import bz2
    import gzip
    import lzma

    import pyarrow

    content = LINES.encode()
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    done = packed[compression](content) if compression in packed else pyarrow.compress(content, "zstd", asbytes=True)
    return _written(name, done)(folder)

  return write


def _held_out(folder: Path) -> Path:
  file = folder / "held_out.npz"
  np.savez_compressed(file, steps=[0, 4], nats=[[9.0, 6.0], [6.0, 4.0]], tokens=[3, 2], half=[0, 1])
  return file


def _read_held_out(file: Path) -> object:
  try:
    return read_document_losses(file.parent, 4)
  except ValueError as error:  # the report's own error of a damaged file
    raise InputError(str(error)) from error


def _read_config(file: Path) -> object:
  return load_config(str(file.parent))


def _trial(folder: Path) -> Path:
  hydra = {"hydra": {"sweeper": {"params": {"lora.rank": "1,2"}}, "overrides": {"task": ["seed=1"]}}}
  _written("multirun.yaml", yaml.safe_dump(hydra))(folder)
  return _written("0/.hydra/overrides.yaml", "- lora.rank=1\n- seed=1\n")(folder).parents[2] / "multirun.yaml"


LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
SETTINGS: Mapping[str, Any] = {"name": "a", "lora": {"rank": 4, "rank_pattern": {"q": 2}},
                               "optim": {"betas": [0.9, 0.9]}, "model": {"family": "minigpt", "width": 8},
                               "train": {"steps": 3, "epochs": None}}
ROW = json.dumps({"step": 1, "loss": 2.0, "split": "train"}) + "\n"
FOREIGN_FILES = {
  "safetensors": ForeignFile(_safetensors, _read_safetensors),
  "index": ForeignFile(_index, lambda file: open_source(file, file.parent / "cache")),
  "config.json": ForeignFile(_written("config.json", json.dumps(CONFIG | {"model_type": "llama"})),
                             lambda file: from_hf(read_json_object(file))),
  "gguf": ForeignFile(_gguf, _read_gguf),
  "adapter config": ForeignFile(_adapter("adapter_config.json"), _read_adapter),
  "adapter weights": ForeignFile(_adapter("adapter_model.safetensors"), _read_adapter),
  "tokenizer.json": ForeignFile(_tokenizer("tokenizer.json"), _read_tokenizer),
  "tokenizer settings": ForeignFile(_tokenizer("tokenizer_config.json"), _read_tokenizer),
  "sentencepiece": ForeignFile(_tokenizer("tokenizer.model"), _read_tokenizer),
  "json lines": ForeignFile(_written("rows.jsonl", LINES), _rows),
  "json": ForeignFile(_written("rows.json", json.dumps(PAIRS)), _rows),
  "csv": ForeignFile(_written("rows.csv", "prompt,response\n" + "1+1=,2\n" * 9), _rows),
  "parquet": ForeignFile(_table("rows.parquet"), _rows),
  "arrow": ForeignFile(_table("rows.arrow"), _rows),
  "gzip": ForeignFile(_compressed("rows.jsonl.gz", "gz"), _rows),
  "bz2": ForeignFile(_compressed("rows.jsonl.bz2", "bz2"), _rows),
  "xz": ForeignFile(_compressed("rows.jsonl.xz", "xz"), _rows),
  "zstd": ForeignFile(_compressed("rows.jsonl.zst", "zst"), _rows),
  "prompts": ForeignFile(_written("prompts.json", json.dumps([user("hi"), "a"])), lambda file: read_prompts(str(file))),
  "run config": ForeignFile(_written("config.yaml", yaml.safe_dump(dict(SETTINGS))), _read_config),
  "run config as JSON": ForeignFile(_written("config.yaml", json.dumps(SETTINGS)), _read_config),
  "metrics": ForeignFile(_written("metrics.jsonl", ROW * 3), lambda file: read_metrics(file.parent)),
  "ledger": ForeignFile(_written("sweep.jsonl", ROW * 3), lambda file: read_ledger(file.parent)),
  "summary": ForeignFile(_written("summary.json", json.dumps({"status": "done", "losses": {"final": 2.0}})),
                         lambda file: read_summary(file.parent)),
  "held-out losses": ForeignFile(_held_out, _read_held_out),
  "trial": ForeignFile(_trial, lambda file: sweep_trial(file.parent / "0")),
  "gguf tokenizer": ForeignFile(_tokenizer("model.gguf"), _read_tokenizer),
}
