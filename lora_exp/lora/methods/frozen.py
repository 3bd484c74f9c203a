"""No training: the base as it is, the lower reference of a study."""

from lora_exp.lora.methods.base import Method


class Frozen(Method):
  """Trains no parameter."""

  name = "frozen"
  title = "frozen base"
  cost = "nothing"
  adapts_kernels = False
  trains_nothing = True
  changes_kernels = False
