"""Full fine-tuning: trains every parameter. It is the upper reference of a study and uses no rank and no targets."""

from lora_exp.lora.methods.base import Method


class Full(Method):
  """Trains every parameter of the model."""

  name = "full"
  title = "full fine-tuning"
  cost = "every parameter of the model, and the optimizer's state for each"
  adapts_kernels = False
  trains_everything = True
