"""Overrides are quoted so that Hydra's grammar reads them back."""


import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.config.override_grammar import quoted, quoting_advice


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
