"""PEFT's names of a family's modules follow from its table."""

from dataclasses import replace

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.families import llama
from lora_exp.train.compute.trained_targets import peft_naming

NAMES = replace(llama.FAMILY.names, prefix="gpt_neox.", unprefixed=("embed_out",))
FAMILY = replace(llama.FAMILY, names=NAMES, presets=llama.FAMILY.presets | {"embeddings": ["embed_in"]})


def test_peft_names_follow_from_the_familys_table():
  naming = peft_naming(ModelConfig(family="llama", arch=ArchConfig(tied=True)), FAMILY)
  assert naming is not None
  assert (naming.prefix, naming.bare, naming.tables) == ("gpt_neox.", ("embed_out",), ("embed_in",))
  assert naming.tied == ("embed_in", "embed_out")
