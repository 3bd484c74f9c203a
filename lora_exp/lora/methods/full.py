"""Full fine-tuning: every parameter is trained. The upper reference line of a study; rank and targets are not used."""

from lora_exp.lora.methods.base import Method


class Full(Method):
  """Trains the model itself."""

  name = "full"
  title = "full fine-tuning"
  cost = "every parameter of the model, with the optimizer's state for each"
  adapts_kernels = False
  trains_everything = True
