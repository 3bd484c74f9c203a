"""Parquet and Arrow files, files compressed with zstd, and data sets of Hugging Face in a directory."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from corpora import BYTES, PAIRS

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.documents import Document, Skipped
from lora_exp.data.formats.hf_datasets import HubName
from lora_exp.data.rows import make_rows, rows_key
from lora_exp.data.sources import data_facts, open_source

TEXTS = [(pair["prompt"], pair["response"]) for pair in PAIRS]
TABLE = pyarrow.Table.from_pylist(PAIRS)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CHATS = [{"messages": [{"role": "user", "content": f"Say {n}"}, CALLING, {"role": "tool", "content": "1"},
                       {"role": "assistant", "content": f"N {n}"}]} for n in range(4)]


def config(path: object, **settings) -> DataConfig:
  return DataConfig(**{"source": "files", "path": str(path), "eval_fraction": 0.5, **settings})


def texts(path: object, **settings) -> list[tuple[str, str]]:
  found = open_source(config(path, **settings)).documents()
  return [(document.prompt, document.text) for document in found if isinstance(document, Document)]


def arrow_file(path: Path, stream: bool) -> None:
  writer = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
  with pyarrow.OSFile(str(path), "wb") as file, writer(file, TABLE.schema) as out:
    out.write_table(TABLE)


def test_parquet_and_arrow_are_found_from_their_content(tmp_path):
  pyarrow.parquet.write_table(TABLE, tmp_path / "a.parquet")
  (tmp_path / "no_suffix").write_bytes((tmp_path / "a.parquet").read_bytes())
  pyarrow.feather.write_feather(TABLE, str(tmp_path / "b.feather"))
  for stream in (False, True):
    arrow_file(tmp_path / f"{stream}.arrow", stream)
  for name in ("a.parquet", "no_suffix", "b.feather", "False.arrow", "True.arrow"):
    assert texts(tmp_path / name) == TEXTS, name
  (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
  with pytest.raises(InputError, match="cut.parquet: pyarrow cannot read it"):
    texts(tmp_path / "cut.parquet")


def test_zstd_is_read_and_its_damage_is_told(tmp_path):
  lines = "\n".join(map(json.dumps, PAIRS)).encode()
  packed = pyarrow.compress(lines, codec="zstd", asbytes=True)
  (tmp_path / "a.jsonl.zst").write_bytes(packed)
  assert texts(tmp_path / "a.jsonl.zst") == TEXTS
  (tmp_path / "two.jsonl.zst").write_bytes(packed + pyarrow.compress(b"\n" + lines, codec="zstd", asbytes=True))
  assert texts(tmp_path / "two.jsonl.zst") == TEXTS * 2
  (tmp_path / "bad.jsonl.zst").write_bytes(packed[:40] + b"\xff" * 40)
  with pytest.raises(InputError, match="its zstd data is damaged or truncated"):
    texts(tmp_path / "bad.jsonl.zst")


def test_the_nulls_that_arrow_adds_are_no_keys(tmp_path):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHATS), tmp_path / "chats.parquet")
  found = list(open_source(config(tmp_path / "chats.parquet")).documents())
  assert [document.conversation.messages for document in found] == [
    tuple(row["messages"]) for row in CHATS]


def test_a_directory_that_datasets_saved_is_read_by_split(tmp_path):
  datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
  datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS[:6]), "test": datasets.Dataset.from_list(PAIRS[6:])}
                       ).save_to_disk(tmp_path / "two")
  assert texts(tmp_path / "one") == TEXTS
  assert texts(tmp_path / "two") == TEXTS[:6] and texts(tmp_path / "two", train_split="test") == TEXTS[6:]
  [left_out] = [x for x in open_source(config(tmp_path / "two")).documents() if isinstance(x, Skipped)]
  assert left_out.unit == "splits" and "data.eval_split=test" in left_out.reason
  rows = make_rows(config(tmp_path / "two", eval_split="test"), BYTES, tmp_path / "cache")
  assert (rows.documents, rows.eval_documents, rows.not_learned) == (10, 4, ())
  assert "split train" in str(data_facts(config(tmp_path / "two"))["format"])
  keys = {rows_key(cfg, BYTES, open_source(cfg)) for cfg in (config(tmp_path / "one"), config(tmp_path / "two"))}
  assert len(keys) == 2
  with pytest.raises(InputError, match="no such split; its splits are train, test; did you mean test"):
    make_rows(config(tmp_path / "two", train_split="tset"), BYTES, tmp_path / "cache")


def test_a_data_set_of_the_hub_is_loaded_by_datasets(tmp_path, monkeypatch):
  """A directory takes the place of the hub: `load_dataset` reads both in one way."""
  (tmp_path / "owner" / "name").mkdir(parents=True)
  for split, rows in {"train": PAIRS[:6], "test": PAIRS[6:]}.items():
    (tmp_path / "owner" / "name" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  assert texts("hub:owner/name") == TEXTS[:6] and texts("hub:owner/name", train_split="test") == TEXTS[6:]
  assert texts("hub:owner/name", options={"streaming": True}) == TEXTS[:6]
  with pytest.raises(InputError, match="data.path=hub:owner/other: datasets cannot load it: "):
    make_rows(config("hub:owner/other"), BYTES, tmp_path / "rows")
  assert HubName.parse("hub:owner/name@v1") == HubName("owner/name", "v1")
