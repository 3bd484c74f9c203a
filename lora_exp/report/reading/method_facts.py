"""The facts about a method in a run's files, so that the report needs no method names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class MethodFacts:
  """`method` of summary.json: how to treat the settings and losses of a run. The defaults are a plain adapter's."""

  name: str  # lora.method, or lora.init if that is a method (PiSSA)
  reference: str | None = None  # "upper": everything is trained; "lower": nothing is; None: settings are compared
  adapts_kernels: bool = True  # adapts the modules of lora.targets
  uses_rank: bool = True
  uses_alpha: bool = True
  has_constants: bool = False  # has frozen arrays in addition to the base

  @property
  def is_reference(self) -> bool:
    """Whether runs of this method are a reference in the report."""
    return self.reference is not None

  @property
  def trains_everything(self) -> bool:
    """Whether it is full fine-tuning, the upper reference."""
    return self.reference == "upper"

  @property
  def trains_nothing(self) -> bool:
    """Whether it is the frozen base, the lower reference."""
    return self.reference == "lower"


# Version 0.1.0 wrote no facts. These are its methods that differ from a plain adapter.
VERSION_0_1 = {
  "frozen": MethodFacts("frozen", "lower", adapts_kernels=False),
  "full": MethodFacts("full", "upper", adapts_kernels=False),
  "bitfit": MethodFacts("bitfit", adapts_kernels=False),
  "vera": MethodFacts("vera", uses_alpha=False, has_constants=True),
  "adalora": MethodFacts("adalora", has_constants=True),
  "pissa": MethodFacts("pissa", has_constants=True),
  "olora": MethodFacts("olora", has_constants=True),
}
PLAIN = "lora"  # not named in the labels of its variants: rslora, not lora+rslora


def method_facts(config: Mapping[str, Any], summary: Mapping[str, Any]) -> MethodFacts:
  """The facts in summary.json; without a summary, and for version 0.1.0, those implied by the method's name.

  `config`: settings by dotted path.
  """
  stated = summary.get("method")
  if isinstance(stated, dict) and isinstance(stated.get("name"), str):
    known = {field.name for field in fields(MethodFacts)}
    return MethodFacts(**{key: value for key, value in stated.items() if key in known})
  name = str(config.get("lora.method") or PLAIN)
  init = config.get("lora.init")
  if name == PLAIN and init in VERSION_0_1:  # lora.init selects pissa and olora
    name = str(init)
  return VERSION_0_1.get(name, MethodFacts(name))


def method_label(config: Mapping[str, Any], facts: MethodFacts) -> str:
  """The usual name of the method and its variant: dora, pissa, rslora, rslora+qlora."""
  if not facts.adapts_kernels:
    return facts.name
  init, variants = config.get("lora.init"), []
  if init in VERSION_0_1 and init != facts.name:
    variants.append(str(init))
  if config.get("lora.scaling") == "rslora":
    variants.append("rslora")
  if config.get("lora.lr_ratio") not in (None, 1):
    variants.append("loraplus")
  if config.get("lora.quant"):
    variants.append("qlora")
  names = variants if variants and facts.name == PLAIN else [facts.name, *variants]
  return "+".join(names)
