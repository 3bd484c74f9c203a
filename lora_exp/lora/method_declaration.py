"""What a fine-tuning method declares: its leaves and its restrictions, without its computation. No jax.

`methods/base.py` has the rest of the interface of a method.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from lora_exp.config import LoraConfig
from lora_exp.lora.adapted_module import AdaptedModule


class Leaf(NamedTuple):
  """An array that a method adds to a module."""

  axes: str  # one letter per axis: I in, O out, R rank, or a letter of `Method.sizes`
  trained: bool = True  # False: a constant
  shared: bool = False  # one array for all modules, sized for the largest; each module uses the leading part it needs


class MethodDeclaration:
  """The declared attributes of a method, and the sizes that follow from them."""

  name: ClassVar[str]  # the value of lora.method, equal to the name of the file
  title: ClassVar[str]  # the name in text and plots, spelled as in the paper
  paper: ClassVar[str] = ""  # arXiv number
  cost: ClassVar[str] = ""  # trained parameters per kernel (I, O) and any unusual cost, in one sentence

  leaves: ClassVar[Mapping[str, Leaf]] = {}  # every array that a module may get
  init_of: ClassVar[str | None] = None  # the lora.method that lora.init=<name> turns into this method (PiSSA: lora)

  adapts_kernels: ClassVar[bool] = True  # adds leaves to the modules of lora.targets
  trains_everything: ClassVar[bool] = False  # trains every parameter of the model; exports are complete models
  trains_nothing: ClassVar[bool] = False
  changes_kernels: ClassVar[bool] = True  # there is a ΔW to inspect and to merge
  uses_alpha: ClassVar[bool] = True  # scale = alpha/rank; False: the scale is 1
  one_rank: ClassVar[bool] = False  # all modules must have the same rank
  stackable: ClassVar[bool] = True  # supports stacks of kernels
  paddable: ClassVar[bool] = True  # zero-padded ranks stay zero in training, so trials of different rank can be packed
  drops_input: ClassVar[bool] = True  # lora.dropout applies to the input of the update
  elementwise_update: ClassVar[bool] = True  # an update depends on the gradients of other values only by their norm
  additive: ClassVar[bool] = True  # the adapted kernel is W + ΔW, and ΔW does not depend on W
  has_lr_ratio: ClassVar[bool] = False  # lora.lr_ratio applies
  uses_budget: ClassVar[bool] = False  # lora.budget applies
  options: ClassVar[Mapping[str, Any]] = {}  # the method's settings in lora.options, with their defaults
  inspect_note: ClassVar[str | None] = None  # a sentence that task=inspect prints below its table

  @property
  def uses_rank(self) -> bool:
    """Whether any leaf has an axis R."""
    return any("R" in leaf.axes for leaf in self.leaves.values())

  @property
  def shared_leaves(self) -> tuple[str, ...]:
    """Names of the leaves that all modules share."""
    return tuple(name for name, leaf in self.leaves.items() if leaf.shared)

  @property
  def has_constants(self) -> bool:
    """Whether any leaf is a constant."""
    return any(not leaf.trained for leaf in self.leaves.values())

  @property
  def zeros_stay_zero(self) -> bool:
    """Whether a kernel of a stack whose leaves are all zero is unchanged, and its leaves get no gradient."""
    return all("R" in leaf.axes and not leaf.shared for leaf in self.leaves.values()) and self.additive

  @property
  def split_axes(self) -> dict[str, str]:
    """The axes of the trained factors by name, which are sharded like the axes of the kernel."""
    return {name: leaf.axes for name, leaf in self.leaves.items() if leaf.trained and leaf.axes in ("IR", "RO")}

  def leaf_names(self, path: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the leaves for the module at `path`; by default all leaves."""
    return tuple(self.leaves)

  def sizes(self, module: AdaptedModule) -> dict[str, int]:
    """Returns the length of each axis letter: I, O, R, and letters of the method, such as factors of I."""
    return module.sizes()

  def trained_size(self, names: Sequence[str], module: AdaptedModule) -> int:
    """Returns the number of trained parameters that the leaves `names` add to one kernel."""
    sizes = self.sizes(module)
    shapes = [[sizes[axis] for axis in self.leaves[name].axes] for name in names if self.leaves[name].trained]
    return sum(math.prod(shape) for shape in shapes)

  def check(self, config: LoraConfig) -> list[str]:
    """Returns problems with the config group `lora` that are specific to this method, one sentence each."""
    return []
