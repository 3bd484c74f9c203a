"""The instructions for adding a source work, and every setting of a source is part of its identity."""

import dataclasses
import re
import textwrap
from pathlib import Path

import pytest

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError
from lora_exp.config.schema import DataConfig, TeacherConfig
from lora_exp.data import sources
from lora_exp.data.rows import make_rows, rows_key
from lora_exp.data.sources import open_source, registry
from lora_exp.data.sources.settings import make_source
from lora_exp.data.tokenization import get_tokenizer

BYTES = get_tokenizer("bytes")
POEMS = "\n\n".join(f"Poem {n}\nThe first line of {n}\nThe second line" for n in range(40))


def blocks(page: str) -> list[str]:
  """The indented blocks of a docstring."""
  found = re.findall(r"(?:^(?:    .*)?\n)+", page, re.MULTILINE)
  return [textwrap.dedent(block).strip() + "\n" for block in found if block.strip()]


@pytest.fixture
def poems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """Installs the example in folders searched in addition to data/sources and conf; returns overrides that use it."""
  code, settings = blocks(sources.__doc__ or "")
  (tmp_path / "sources").mkdir()
  (tmp_path / "sources" / "poems.py").write_text(code)
  (tmp_path / "conf" / "data").mkdir(parents=True)
  (tmp_path / "conf" / "data" / "poems.yaml").write_text(settings)
  (tmp_path / "poems.txt").write_text(POEMS)
  monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "sources")])
  registry.cache_clear()
  yield ["--config-dir", str(tmp_path / "conf"), "data=poems", f"data.path={tmp_path / 'poems.txt'}"]
  registry.cache_clear()


def test_the_pages_example_makes_rows(poems, tmp_path):
  cfg = check_command_line([*poems, "data.options.title_as_prompt=true", "data.chat=none"]).jobs[0]
  rows = make_rows(cfg.data, BYTES, tmp_path / "cache")
  assert (rows.documents, rows.eval_documents) == (40, 4)
  learned = sum(len(f"The first line of {n}\nThe second line") + 1 for n in range(40) if n % 10 == 9)
  assert rows.eval_tokens == learned  # the title is read, and not learned


def test_an_option_of_a_new_source_is_in_the_key(poems, tmp_path):
  keys = set()
  for typed in ([], ["data.options.min_lines=3"], ["data.options.title_as_prompt=true"]):
    data = check_command_line([*poems, *typed]).jobs[0].data
    keys.add(rows_key(data, BYTES, open_source(data)))
  assert len(keys) == 3


def test_problems_of_a_new_source_come_with_all_others(poems):
  typed = ["data.options.min_lines=1", "lora.rank=0", "data@retain=poems", "retain.options.title_as_prompt=maybe"]
  with pytest.raises(InputError) as error:
    check_command_line([*poems, *typed])
  assert error.value.problems == [
    "lora.rank=0: must be at least 1",
    "data.options.min_lines=1: must be at least 2, a title and a line",
    "retain.options.title_as_prompt=maybe: must be true or false",
    "retain.path=null: give retain.path=FILE, a text file of poems, separated by blank lines",
  ]


def test_an_unknown_option_is_refused_with_the_nearest(poems):
  data = check_command_line(poems).jobs[0].data
  with pytest.raises(InputError, match=r"data\.options\.min_lnies: no such option .*; did you mean min_lines\?"):
    open_source(dataclasses.replace(data, options={"min_lnies": 3}))


# ---- identity


@pytest.mark.parametrize("name", registry())
def test_every_setting_is_part_of_the_identity(name):
  """Unless it is declared to be covered by the digest, which the next tests hold to it."""
  source, _ = make_source(registry()[name], DataConfig(source=name))
  for setting in dataclasses.fields(source):
    changed = source.replace(**{setting.name: "another value"})
    covered = setting.metadata.get("covered_by_digest", False)
    assert (changed.settings() == source.settings()) == covered, setting.name


def files(folder: Path) -> dict[str, str]:
  """Two text files and two of JSON lines, by name."""
  for n in (1, 2):
    (folder / f"{n}.txt").write_text(f"one<|endoftext|>two {n}")
    (folder / f"{n}.jsonl").write_text(f'{{"prompt": "a", "response": "{n}"}}\n' * 2)
  return {file.name: str(file) for file in folder.iterdir()}


@pytest.mark.parametrize(("name", "settings", "changes"), [
  ("text", {"path": "1.txt"}, [{"path": "2.txt"}, {"eval_path": "2.txt"}, {"eval_fraction": 0.5}]),
  ("jsonl", {"path": "1.jsonl"}, [{"path": "2.jsonl"}, {"eval_path": "2.jsonl"}, {"eval_fraction": 0.5}]),
  ("arithmetic", {"limit": 20}, [{"limit": 21}, {"options": {"examples_seed": 1}}]),
  ("sentences", {"sentences": ["a", "b"]}, [{"sentences": ["a", "c"]}, {"repeat": 2}]),
])
def test_what_the_digest_covers_changes_the_key(tmp_path, name, settings, changes):
  names = files(tmp_path)
  keys = []
  for change in ({}, *changes):
    values = {key: names.get(value, value) if isinstance(value, str) else value
              for key, value in {**settings, **change}.items()}
    data = DataConfig(source=name, **values)
    keys.append(rows_key(data, BYTES, open_source(data)))
  assert len(set(keys)) == len(keys)
  covered = {field.name for field in dataclasses.fields(registry()[name]) if field.metadata.get("covered_by_digest")}
  assert covered - {"streaming"} == {key for change in changes for key in change.get("options", change)}


NOT_IN_KEY = {"shuffle", "seed", "split", "prompts", "steps", "teacher"}  # order and use of rows
CHANGES = {  # a value that differs from the default
  "view": "docs", "eval_fraction": 0.25, "seq_len": 64, "packing": "pad", "pad_in_loss": True, "prompt_in_loss": True,
  "loss": "last",
  "limit": 7, "shuffle": False, "seed": 1, "split": "none", "prompts": ["x"], "steps": 1, "teacher": TeacherConfig(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_data_is_in_the_key_or_declared_not_to_be(name, monkeypatch):
  monkeypatch.setattr(sources.stdlib.StandardLibrary, "digest", lambda source: "the files")
  first = DataConfig(view="code", packing="pad" if name == "pad_in_loss" else "pack")
  other = dataclasses.replace(first, **{name: CHANGES[name]})
  keys = [rows_key(data, BYTES, open_source(data)) for data in (first, other)]
  assert (keys[0] == keys[1]) == (name in NOT_IN_KEY)


def test_all_settings_of_data_are_accounted_for():
  of_sources = {field.name for cls in registry().values() for field in dataclasses.fields(cls)}
  elsewhere = {"source", "chat", "loss", "options"}  # tested above, and in test_chat
  assert {field.name for field in dataclasses.fields(DataConfig)} <= set(CHANGES) | of_sources | elsewhere
