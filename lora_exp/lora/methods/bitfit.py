"""BitFit: every bias is trained, and nothing else (arXiv 2106.10199)."""

from lora_exp.config import LoraConfig
from lora_exp.lora.methods.base import Method


class BitFit(Method):
  """Trains what lora.bias and lora.train_modules name."""

  name = "bitfit"
  title = "BitFit"
  paper = "2106.10199"
  cost = "the model's biases"
  adapts_kernels = False
  changes_kernels = False

  def check(self, config: LoraConfig) -> list[str]:
    """Without biases nothing is left to train."""
    if config.bias == "none":
      return [f"lora.bias=none: nothing is left to train with lora.method={self.name}; set lora.bias=all"]
    return []
