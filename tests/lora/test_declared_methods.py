"""What is read from a method's file without importing it is what the method declares."""

import subprocess
import sys

import pytest

from lora_exp.config.schema import LoraConfig
from lora_exp.lora import declared_methods, methods
from lora_exp.lora.method_declaration import MethodDeclaration

ATTRIBUTES = [name for name in vars(MethodDeclaration) if not name.startswith("_")]


@pytest.mark.parametrize("name", methods.names())
def test_a_declaration_is_that_of_the_imported_method(name):
  declared, imported = declared_methods.declared_of(LoraConfig(method=name)), methods.get(name)
  for attribute in ATTRIBUTES:
    if not callable(getattr(imported, attribute)):
      assert getattr(declared, attribute) == getattr(imported, attribute), attribute


def test_plain_lora_is_not_imported_and_ia3_is():
  code = """
import sys
from lora_exp.config.schema import LoraConfig
from lora_exp.lora.declared_methods import declared_of
names = [declared_of(LoraConfig(method=name)).title for name in ("lora", "dora", "vera", "full")]
print(names, "jax" in sys.modules, declared_of(LoraConfig(method="ia3")).leaf_names("x.down_proj", {}))
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.strip() == "['LoRA', 'DoRA', 'VeRA', 'full fine-tuning'] False ('ia3_in',)", done.stderr


def test_an_init_that_is_a_method_selects_it():
  assert declared_methods.declared_of(LoraConfig(init="pissa")).name == "pissa"
