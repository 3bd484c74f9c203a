"""The table of tensor names in published checkpoints, used for reading and writing.

Most tensors need no row: `layers.0.self_attn.q_proj.kernel` is stored as `model.layers.0.self_attn.q_proj.weight`,
transposed. A `NameRow` is needed for a different name, for a stored tensor that is the concatenation of several of our
kernels, and for a kernel of ours that is stored as several tensors.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lora_exp.config.schema import ModelConfig

TEXT_PART = "language_model."  # before the text model in a multimodal checkpoint
# prefixes of all names: none, and those of torch.compile, DistributedDataParallel, PEFT, and an attribute `model`
WRAPPERS = ("", "_orig_mod.", "module.", "base_model.model.", "model.")
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")  # group 1: the number of a layer in a name
OWN_SUFFIXES = (".kernel", ".embedding", ".scale")  # ends of our paths, which no published checkpoint uses


@dataclass(frozen=True)
class NameRow:
  """Modules of ours and the equivalent stored modules.

  Each is the end of a path. One side may list several modules, whose outputs are concatenated in the single module of
  the other side. If several are stored, `sizes` returns the outputs of each.

  >>> fused = NameRow(("attn.q", "attn.k", "attn.v"), ("attn.qkv",))  # one stored tensor, three kernels of ours
  """

  ours: tuple[str, ...]
  stored: tuple[str, ...]
  sizes: Callable[[ModelConfig], Sequence[int]] | None = None

  def __post_init__(self) -> None:
    if min(len(self.ours), len(self.stored)) != 1 or (len(self.stored) > 1) != (self.sizes is not None):
      raise ValueError(f"{self}: one side names one module, and several stored modules need their sizes")


@dataclass(frozen=True)
class ExpertRow:
  """A module of ours with the kernels of all experts, (E, I, O), and the stored modules of one expert.

  `{}` in a stored name is the number of the expert. The outputs of several stored modules are concatenated.
  """

  ours: str
  stored: tuple[str, ...]


@dataclass(frozen=True)
class TensorNames:
  """The names of a family's tensors in checkpoints: those of module `P` are `prefix`P.weight and `prefix`P.bias."""

  prefix: str = "model."  # before every path except those in `unprefixed`
  transposed: bool = True  # kernels are stored (out, in), as torch's Linear does; GPT-2's Conv1D does not
  unprefixed: tuple[str, ...] = ("lm_head",)  # stored modules without the prefix, always (out, in)
  rows: tuple[NameRow, ...] = ()  # modules with different names or parts
  experts: tuple[ExpertRow, ...] = ()  # modules with the kernels of all experts
  token_embedding: str = "embed_tokens"  # also the head of a tied model
  computed: tuple[tuple[str, str], ...] = ()  # tensors that the model computes: (regular expression, kind of tensor)


class StoredPart(NamedTuple):
  """The part of a stored tensor that contains some outputs of one of our arrays."""

  name: str  # the stored tensor
  transposed: bool  # stored as (out, in)
  width: int  # outputs of the stored tensor
  size: int  # number of outputs of the part
  stored_start: int = 0  # index of its first output in the stored tensor
  start: int = 0  # index of its first output in our array
  expert: int | None = None  # index along the first axis of our array, if the stored tensor belongs to one expert

  def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the stored tensor for an array of ours with `shape`."""
    shape = shape if self.expert is None else shape[1:]
    wide = (*shape[:-1], self.width) if shape else ()
    return wide[::-1] if self.transposed else wide


@dataclass(frozen=True)
class StoredNames:
  """The table of a family for one model and the prefix of one checkpoint; without a table, our own paths."""

  names: TensorNames | None = None
  model: ModelConfig | None = None  # determines the sizes of stored parts
  prefix: str = ""
  head_prefix: str = ""  # before the modules in `names.unprefixed`
  table_as_head: bool = False  # whether the checkpoint stores the table of a tied model under the name of its head

  def parts(self, path: str, shapes: Mapping[str, Sequence[int]]) -> list[StoredPart]:
    """The stored parts of the array at our dotted `path`; `shapes` has the shapes of all arrays by path."""
    width = shapes[path][-1] if shapes[path] else 1
    if self.names is None:
      return [StoredPart(path, transposed=False, width=width, size=width)]
    module, _, leaf = path.rpartition(".")
    for experts in self.names.experts:
      if module.endswith(f".{experts.ours}"):
        return self._expert_parts(experts, module.removesuffix(experts.ours), shapes[path])
    for row in self.names.rows:
      for end in row.ours:
        if module == end or module.endswith(f".{end}"):
          return self._row_parts(row, module.removesuffix(end), end, leaf, shapes)
    name, transposed = self._stored_tensor(module, leaf)
    return [StoredPart(name, transposed, width=width, size=width)]

  def _expert_parts(self, row: ExpertRow, parent: str, shape: Sequence[int]) -> list[StoredPart]:
    """The parts of an array (E, I, O): one or several stored modules for each expert."""
    count, size = shape[0], shape[-1] // len(row.stored)
    parts = []
    for expert in range(count):
      for i, stored in enumerate(row.stored):
        name, transposed = self._stored_tensor(parent + stored.format(expert), "kernel")
        parts.append(StoredPart(name, transposed, width=size, size=size, start=i * size, expert=expert))
    return parts

  def _row_parts(
    self, row: NameRow, parent: str, end: str, leaf: str, shapes: Mapping[str, Sequence[int]]
  ) -> list[StoredPart]:
    """The parts of the array `leaf` of our module `parent` + `end`, which the table stores in parts or fused."""
    if row.sizes is not None:
      assert self.model is not None, "a table with sizes is used with the model's settings"
      parts: list[StoredPart] = []
      start = 0
      for stored, size in zip(row.stored, row.sizes(self.model), strict=True):
        name, transposed = self._stored_tensor(parent + stored, leaf)
        parts.append(StoredPart(name, transposed, width=size, size=size, start=start))
        start += size
      return parts
    sizes = [shapes[f"{parent}{sibling}.{leaf}"][-1] for sibling in row.ours]
    position = row.ours.index(end)
    name, transposed = self._stored_tensor(parent + row.stored[0], leaf)
    before = sum(sizes[:position])
    return [StoredPart(name, transposed, width=sum(sizes), size=sizes[position], stored_start=before)]

  def _stored_tensor(self, module: str, leaf: str) -> tuple[str, bool]:
    """The name of the tensor of a stored module, and whether it is stored as (out, in)."""
    assert self.names is not None
    if self.table_as_head and module == self.names.token_embedding:
      return f"{self.head_prefix}{self._heads()[0]}.weight", False
    unprefixed = module in self.names.unprefixed
    prefix = self.head_prefix if unprefixed else self.prefix
    name = f"{prefix}{module}.{'bias' if leaf == 'bias' else 'weight'}"
    return name, leaf == "kernel" and (unprefixed or self.names.transposed)

  def for_checkpoint(self, stored: Collection[str], shapes: Mapping[str, Sequence[int]]) -> "StoredNames":
    """Returns a copy with the prefix of a checkpoint whose names are `stored`; our own paths if this program saved it.

    Models saved without their head, those with vision, and those saved with the wrapper of a tool have another prefix:
    the one that matches most tensors.
    """
    if self.names is None or any(name.endswith(OWN_SUFFIXES) for name in stored):
      return StoredNames()
    usual, candidates = self.names.prefix, []
    for wrapper in WRAPPERS:
      if wrapper and not any(name.startswith(wrapper) for name in stored):
        continue
      in_text_part = any(f"{wrapper}{TEXT_PART}{name}.weight" in stored for name in self._heads())
      head = wrapper + (TEXT_PART if in_text_part else "")
      prefixes = (usual, "", TEXT_PART + usual, usual + TEXT_PART)
      candidates += [replace(self, prefix=wrapper + prefix, head_prefix=head) for prefix in prefixes]
    counts = [names._count(stored, shapes) for names in candidates]
    best = candidates[counts.index(max(counts))]
    table = f"{best.prefix}{self.names.token_embedding}.weight"
    head = f"{best.head_prefix}{next(iter(self._heads()), '')}.weight"
    is_tied = not any(path.startswith(self._heads()) for path in shapes)
    return replace(best, table_as_head=is_tied and table not in stored and head in stored)

  def is_head(self, name: str) -> bool:
    """Whether `name` is the stored vocabulary projection."""
    return name.removesuffix(".weight") in {f"{self.head_prefix}{head}" for head in self._heads()}

  def is_of_another_part(self, name: str) -> bool:
    """Whether the stored tensor belongs to a part that is not read, such as the vision part of a multimodal model."""
    before, part, _ = self.prefix.partition(TEXT_PART)
    heads = (f"{self.head_prefix}{head}." for head in self._heads())
    return bool(part) and not name.startswith((before + part, *heads))

  def _heads(self) -> tuple[str, ...]:
    """The modules without the prefix."""
    return self.names.unprefixed if self.names else ()

  def computed(self, name: str) -> str | None:
    """The kind of the stored tensor, if the model computes its value; otherwise None."""
    table = self.names.computed if self.names else ()
    return next((kind for pattern, kind in table if re.fullmatch(pattern, name)), None)

  def _count(self, stored: Collection[str], shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of parts of our arrays that are among the names `stored`."""
    return sum(part.name in stored for path in shapes for part in self.parts(path, shapes))


def layer_of(name: str) -> int:
  """The number, from 0, of the layer that a stored tensor belongs to; -1 if it belongs to none."""
  match = LAYER.search(name)
  return -1 if match is None else int(match[1])
