"""Overrides are quoted so that Hydra's grammar reads them back."""

import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.config.override_grammar import parse, quoted, quoting_advice, typed, typed_list


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_quoting(text):
  if "$" not in text:  # ${…} stays an interpolation, as in any value
    assert OverridesParser.create().parse_override(f"prompt={quoted(text)}").value() == text


@pytest.mark.parametrize(("typed", "advice"), [
  ("lora.targets=re:(q|v)_proj", """'lora.targets="re:(q|v)_proj"'"""),
  ("lora.targets=[re:(q|v),mlp]", """'lora.targets=["re:(q|v)",mlp]'"""),
  ("prompt=Hello, world", """'prompt="Hello, world"'"""),
  ('prompt=say "hi", you', r"""'prompt="say \"hi\", you"'"""),
  ("lora.rank_pattern={re:(a|b): 4}", r"""'lora.rank_pattern={re\:\(a|b\): 4}'"""),
])
def test_a_refused_override_is_shown_with_quotes(typed, advice):
  assert quoting_advice(typed).endswith(advice)


def test_paths_in_hints_survive_the_shell_and_the_grammar():
  paths = ["outputs/0-x", "/a/b.c", "my runs", "lr=0.1,rank=8", "it's", 'a"b', "[x]", "a{b}", "1e5", "12", "null",
           "True", "back\\slash", "end\\", "~home", "-dash", "Ж→", "a:b", "a#b", "$HOME",
           "a;b", "100%", "(x)", "tab\tx", "*"]
  pasted = " ".join(typed("run", path) for path in paths)
  script = f"printf '%s\\0' {pasted} {typed_list('runs', paths)}"
  words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
  overrides, problems = parse(words)
  assert problems == []
  assert [override.value() for override in overrides] == [*paths, paths]
  assert words[:2] == ["run=outputs/0-x", "run=/a/b.c"]
