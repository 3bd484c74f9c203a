"""The names of the tensors in an adapter file, reduced to those that current PEFT writes.

Tools differ in the prefix of a name (doubled, missing, `language_model` in several places), and some keep the name of
the adapter (`lora_A.default.weight`) or of a wrapper (`_orig_mod` of torch.compile) in it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_exp.lora.peft_files.names import BASE, PREFIX, TOKEN_ROWS, Naming, module_name
from lora_exp.lora.peft_format import PeftFormat

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # anywhere in a name
PREFIXES = {"base_model", "model", "module", "transformer", "language_model", "text_model"}  # before a module's path
TOKEN_DELTA = TOKEN_ROWS.rpartition(".")[2]  # new rows of an embedding
SAVED = "modules_to_save"  # PEFT's wrapper of a module that is trained in full
PARAMETERS = ("weight", "bias")


class StoredTensor(NamedTuple):
  """A tensor in a file."""

  name: str  # in the file
  module: str  # PEFT's name of its module, in the model that the adapter was trained on
  path: str  # our path of the module
  suffix: str  # PEFT's name of the tensor in the module


@dataclass
class PeftNames:
  """The tensors of a file by PEFT's name. `paths` are our paths of all modules that the model has."""

  form: PeftFormat
  naming: Naming | None
  paths: Collection[str]
  tensors: dict[str, StoredTensor] = field(default_factory=dict)
  unknown: list[str] = field(default_factory=list)  # names in the file whose module the model does not have
  problems: list[str] = field(default_factory=list)
  adapters: set[str] = field(default_factory=set)  # names of adapters that occur in tensor names

  def __post_init__(self) -> None:
    tables = self.form.table_keys or {}
    suffixes = [*self.form.keys.values(), *tables.values()]
    self.suffixes = {suffix.partition(".")[0]: suffix for suffix in suffixes}
    self.shared = {name.rpartition(".")[2]: name for name in self.form.shared_keys.values()}

  def read(self, names: Iterable[str]) -> "PeftNames":
    """Adds the tensors `names` of a file; returns self."""
    for name in names:
      tensor = self._parsed(name)
      if tensor is None:
        self.unknown.append(name)
        continue
      standard = self.standard_name(tensor)
      if standard in self.tensors:
        self.problems.append(f"{self.tensors[standard].name} and {name} both name the tensor {standard} of PEFT")
      self.tensors[standard] = tensor
    if len(self.adapters) > 1:
      found = sorted(self.adapters)
      self.problems = [f"holds several adapters ({', '.join(found[:4])}); give a file with one of them"]
    return self

  def standard_name(self, tensor: StoredTensor) -> str:
    """The name of `tensor` in a file of current PEFT."""
    if not tensor.path:
      return tensor.suffix
    return f"{PREFIX}{module_name(self.naming, tensor.path)}.{tensor.suffix}"

  def modules(self) -> dict[str, str]:
    """Path -> name in the file, for the modules that have a leaf of the method."""
    found: dict[str, str] = {}
    for tensor in self.tensors.values():
      if self._is_leaf(tensor):
        found.setdefault(tensor.path, tensor.module)
    return found

  def is_leaf(self, standard: str) -> bool:
    """Whether the tensor is a leaf of the method, and not a parameter of the base."""
    return self._is_leaf(self.tensors[standard])

  def _is_leaf(self, tensor: StoredTensor) -> bool:
    return tensor.path != "" and tensor.suffix.partition(".")[0] in self.suffixes

  def prefixes(self) -> list[str]:
    """The prefixes of module names in the file, compared with our paths; without modules that have no prefix."""
    bare = self.naming.bare if self.naming is not None else ()
    found = [t.module.removesuffix(t.path) for t in self.tensors.values() if t.path and t.path not in bare]
    return list(dict.fromkeys(found))

  def _parsed(self, name: str) -> StoredTensor | None:
    """The tensor `name`; None if the model has no such module."""
    segments = [segment for segment in name.split(".") if segment not in WRAPPERS]
    if self.shared and len(segments) in (2, 3) and segments[1] in self.shared:
      self.adapters.update(segments[2:])
      return StoredTensor(name, "", "", self.shared[segments[1]])
    for i, segment in enumerate(segments):
      if segment in self.suffixes:
        return self._located(name, segments[:i], self._leaf_suffix(segment, segments[i + 1 :]))
      if segment == "token_adapter":
        self.adapters.update(segments[i + 2 :])
        suffix = TOKEN_ROWS if segments[i + 1 : i + 2] == [TOKEN_DELTA] and len(segments) < i + 4 else None
        return self._located(name, segments[:i], suffix)
      if segment == TOKEN_DELTA:  # an adapter of type TRAINABLE_TOKENS
        self.adapters.update(segments[i + 1 :])
        return self._located(name, segments[:i], TOKEN_ROWS if len(segments) < i + 3 else None)
      if segment == SAVED:
        return self._saved(name, segments[:i], segments[i + 1 :])
    if len(segments) > 2 and segments[-2] == BASE:
      return self._located(name, segments[:-2], f"{BASE}.{segments[-1]}")
    return self._located(name, segments[:-1], segments[-1])

  def _leaf_suffix(self, head: str, tail: Sequence[str]) -> str | None:
    """PEFT's name of a leaf with the first segment `head` and the segments `tail`; None if `tail` is unknown."""
    suffix = self.suffixes[head]
    end = tail[-1] if tail and tail[-1] in PARAMETERS else ""
    adapter = tail[:-1] if end else tail
    if len(adapter) > 1:
      return None
    self.adapters.update(adapter)
    if end == "bias":
      return f"{head}.bias"
    return suffix if end == "weight" or "." not in suffix else None

  def _saved(self, name: str, module: Sequence[str], tail: Sequence[str]) -> StoredTensor | None:
    """A tensor of modules_to_save, whose name may contain that of the adapter."""
    for inner in (tail[1:], tail):
      tensor = self._located(name, [*module, *inner[:-1]], inner[-1]) if inner else None
      if tensor is not None:
        self.adapters.update(tail[:1] if len(inner) < len(tail) else [])
        return tensor
    return None

  def _located(self, name: str, segments: Sequence[str], suffix: str | None) -> StoredTensor | None:
    """The tensor with its module's path: `segments` without a prefix."""
    if suffix is None:
      return None
    for i in range(len(segments)):
      path = ".".join(segments[i:])
      if path in self.paths:
        return StoredTensor(name, _module(segments), path, suffix)
      if segments[i] not in PREFIXES:
        return None
    return None


def _module(segments: Sequence[str]) -> str:
  """The name of a module without PEFT's prefix, even if that is repeated."""
  while tuple(segments[:2]) == ("base_model", "model"):
    segments = segments[2:]
  return ".".join(segments)
