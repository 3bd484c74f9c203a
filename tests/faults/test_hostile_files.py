"""Damaged and hostile files of others are refused in one sentence, quickly, and nothing in them is run."""

import gzip
import json
import pickle
import random
import struct
import time
from pathlib import Path

import pytest
from hostile_files import FOREIGN_FILES, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_exp.config.errors import InputError, LoraExpError
from lora_exp.data.chats import template_limits
from lora_exp.data.chats.chat_template import chat_template
from lora_exp.data.formats import file_content
from lora_exp.data.formats.row_formats import file_rows, find_format
from lora_exp.models.weights.locate import weights_problem
from lora_exp.runtime.yaml_text import check_size, safe_load

FEW, MANY = 8, 300  # damaged files of a kind
SECONDS = 20.0  # for one file
ROLES = [{"role": "user", "content": "hi"}]


def damage_and_read(kind: str, folder: Path, count: int) -> dict[str, int]:
  """Reads `count` damaged files of a kind: each is read, or refused by an error of ours. Counts both."""
  foreign = FOREIGN_FILES[kind]
  file = foreign.make(folder)
  content = file.read_bytes()
  foreign.read(file)
  found = {"read": 0, "refused": 0}

  @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
  @given(st.randoms(use_true_random=False))
  def read_one(moments: random.Random) -> None:
    file.write_bytes(damaged(moments, content))
    started = time.monotonic()
    try:
      foreign.read(file)
      found["read"] += 1
    except LoraExpError as error:
      assert str(error).strip()
      found["refused"] += 1
    assert time.monotonic() - started < SECONDS

  read_one()
  return found


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN_FILES if kind not in ("gguf tokenizer", "sentencepiece")])
def test_a_damaged_file_is_refused_or_read(kind, tmp_path):
  found = damage_and_read(kind, tmp_path, FEW)
  assert found["refused"] + found["read"] >= FEW


@pytest.mark.faults_full
@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_many_damaged_files_are_refused_or_read(kind, tmp_path):
  found = damage_and_read(kind, tmp_path, MANY)
  print(f"\n{kind}: {found['refused']} refused, {found['read']} read")
  assert found["refused"]


TEMPLATES = {
  "takes more than": ["{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
                      "{% for a in range(9999) if range(9999)|sum %}{% endfor %}" * 99],
  "more than": ["{{ 'a' * 10**10 }}", "{{ 'a'.ljust(10**9) }}", "{{ 'a'|center(10**9) }}", "{{ range(10**9)|list }}",
                "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}", "{{ (range(9999)|join('x' * 9999))|length }}",
                "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
                "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
                "{% for a in range(9999) %}{% for b in range(9999) %}" + "x" * 999 + "{% endfor %}{% endfor %}"],
  "too large": ["{{ 99999**99999 }}", "{{ '%999999999d' % 1 }}",
                "{{ '{:>999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}", "{{ '%*d' % (10**9, 1) }}"],
  "recursion": ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"],
  "unsafe": ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"],
  "no loader": ["{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}"],
}


@pytest.mark.parametrize(("words", "source"), [(words, text) for words, texts in TEMPLATES.items() for text in texts])
def test_a_hostile_template_is_refused(words, source, monkeypatch):
  monkeypatch.setattr(template_limits, "SECONDS", 0.05)
  with pytest.raises(InputError, match=words):
    chat_template("it", source).render({}, ROLES, True)


def test_limits_leave_ordinary_templates_as_they_are():
  source = ("{% macro f(x, y='z') %}{{ x }}{{ y }}{% endmacro %}"
            "{% for m in messages if m.role %}{{ f(m.role) ~ loop.index }}{% else %}none{% endfor %}"
            "{% set ns = namespace(x='') %}{% for i in range(3) %}{% set ns.x = ns.x ~ i %}{% endfor %}{{ ns.x }}"
            "{{ ['a', 'b']|join(', ') }}{{ {'a': 1}|tojson(indent=1) }}{{ 'a %s' % 'b' }}{{ nothing }}{{ 'x' * 3 }}"
            "{{ 'x'.replace('x', 'y') }}{% set t %}in{{ 1 }}{% endset %}{{ t }}{{ '50% of *all*' }}")
  assert chat_template("it", source).render({}, ROLES, True) == (
    'userz1012a, b{\n "a": 1\n}a bxxxyin150% of *all*')


def test_yaml_that_expands_is_refused():
  lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
  lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
  for text in ("\n".join(lines), "[" * 10_000, "- " * 10_000 + "x", "a: &a [*a]"):
    with pytest.raises(Exception, match="too large|too deeply|nesting depth|expected the node"):
      check_size(text)
  assert safe_load("base: &b {x: 1}\ncopy: *b\n") == {"base": {"x": 1}, "copy": {"x": 1}}


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
def test_a_file_that_expands_is_refused(name, tmp_path, monkeypatch):
  monkeypatch.setattr(file_content, "MOST_EXPANDED", 10**7)
  file = tmp_path / name
  with gzip.open(file, "wb", 9) as out:
    out.write(b'{"prompt": "' if "csv" not in name else b"prompt,response\n")
    for _ in range(20):
      out.write(b" " * 10**6)
  with pytest.raises(InputError, match="times as large when decompressed"):
    list(file_rows(file, find_format(file), name, None))


def test_a_long_object_of_equal_keys_is_refused_at_once(tmp_path):
  keys = ", ".join(f'"{n}": 1' for n in [*range(200_000), 199_999])
  (tmp_path / "a.jsonl").write_text(f"{{{keys}}}\n" + '{"n": ' + "9" * 5000 + "}\n")
  rows = list(file_rows(tmp_path / "a.jsonl", "jsonl", "a", None))
  assert rows[0].problem == "duplicate key '199999'" and rows[1].problem == "not JSON"


def test_offsets_outside_of_an_arrow_file_are_refused(tmp_path):
  file = FOREIGN_FILES["arrow"].make(tmp_path)
  content, offsets = file.read_bytes(), struct.pack("<3i", 0, 4, 8)  # of the prompts, which have four letters
  assert offsets in content
  file.write_bytes(content.replace(offsets, struct.pack("<3i", 0, 2**31 - 1, 8)))
  with pytest.raises(InputError, match="pyarrow cannot read it"):
    FOREIGN_FILES["arrow"].read(file)


class Payload:
  """Its pickle creates a file."""

  def __init__(self, target: Path):
    self.target = target

  def __reduce__(self):
    return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "adapter_model.bin", "x.gguf"])
def test_a_pickle_under_any_name_is_not_run(name, tmp_path):
  (tmp_path / "model").mkdir()
  file, ran = tmp_path / "model" / name, tmp_path / "ran"
  file.write_bytes(pickle.dumps(Payload(ran)))
  (tmp_path / "model" / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
  (tmp_path / "model" / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
  assert weights_problem(str(file)) and not ran.exists()
