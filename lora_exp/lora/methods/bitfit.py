"""BitFit: trains the biases of the base and nothing else (arXiv 2106.10199)."""

from lora_exp.config import LoraConfig
from lora_exp.lora.methods.base import Method


class BitFit(Method):
  """Trains the parameters that lora.bias and lora.train_modules select."""

  name = "bitfit"
  title = "BitFit"
  paper = "2106.10199"
  cost = "the model's biases"
  adapts_kernels = False
  changes_kernels = False

  def check(self, config: LoraConfig) -> list[str]:
    """Biases must be trained."""
    if config.bias == "none":
      return [f"lora.bias=none: lora.method={self.name} would train nothing; set lora.bias=all"]
    return []
