"""The base as it is: no parameter is trained. The lower reference line of a study."""

from lora_exp.lora.methods.base import Method


class Frozen(Method):
  """Trains nothing."""

  name = "frozen"
  title = "frozen base"
  cost = "nothing"
  adapts_kernels = False
  trains_nothing = True
  changes_kernels = False
