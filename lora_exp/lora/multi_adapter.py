"""Several named adapters on one base, of which at most one is active at a time.

>>> from flax import nnx
>>> from lora_exp.lora.multi_adapter import Adapters
>>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
>>> adapters = Adapters(model)
>>> rows = adapters.add("math", "layers.0", rank=2), adapters.add("code", "layers.*", rank=4)
>>> adapters.select("math")  # the model computes with this adapter, and can be trained
>>> adapters.select("code")  # saves what "math" has learned
>>> adapters.select(None)  # the base, bit for bit
>>> adapters.names, adapters.selected, adapters["code"].rows[0].rank
(['math', 'code'], None, 4)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
from flax import nnx

from lora_exp.config import InputError
from lora_exp.config.errors import did_you_mean
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.full_parameters import trained_in_full
from lora_exp.lora.injection import attach, eject, extract_adapter, inject
from lora_exp.lora.module_table import adapted_modules
from lora_exp.lora.target_table import Presets


class InjectSettings(TypedDict, total=False):
  """The keyword arguments of `lora.inject`, apart from `compute`."""

  rank: int
  alpha: float | None
  method: str
  scaling: str
  exclude: str | Sequence[str] | None
  blocks: Sequence[int] | None
  rank_pattern: Mapping[str, int] | None
  alpha_pattern: Mapping[str, float] | None
  presets: Presets | None
  key: jax.Array | None
  init: str
  init_std: float | None
  bias: str
  train_modules: str | Sequence[str] | None
  options: Mapping[str, Any] | None


class Adapters:
  """The adapters of one base, by name. Adapters that are not selected are kept off the model, as `Adapter` objects.

  Optimizer state is not part of an adapter; the caller keeps it. Dropout is off after `select`, as after `inject`.
  While an adapter is selected, do not call `inject`, `eject` or `merge` on the model: `select` then raises an error
  rather than lose what was trained.
  """

  def __init__(self, model: nnx.Module):
    """Raises InputError if `model` has an adapter already."""
    self.model = model
    self.selected: str | None = None
    self._adapters: dict[str, Adapter] = {}
    self._compute: dict[str, str] = {}
    self._check_model()

  @property
  def names(self) -> list[str]:
    """The names of the adapters, in the order in which they were added."""
    return list(self._adapters)

  def add(
    self,
    name: str,
    targets: str | Sequence[str] = "re:.*",
    *,
    adapter: Adapter | None = None,
    compute: str = "auto",
    **settings: Unpack[InjectSettings],
  ) -> tuple[AdaptedModule, ...]:
    """Adds a new adapter with the `settings` of `lora.inject`, or an existing `adapter`; returns its table.

    The selected adapter stays selected. Raises InputError if the name is empty or in use, and for the problems of
    `inject` and `attach`.
    """
    if not name:
      raise InputError("an adapter needs a name")
    if name in self._adapters:
      raise InputError(f"an adapter is named {name} already: remove it, or choose another name")
    if adapter is not None and (settings or targets != "re:.*"):
      raise InputError(f"{name}: `adapter` has its own targets and settings; pass either an adapter or settings")
    selected = self.selected
    self.select(None)
    try:
      if adapter is None:
        inject(self.model, targets, compute=compute, **settings)
      else:
        attach(self.model, adapter, compute)  # raises an error now, not at `select`, if the adapter does not fit
      self._adapters[name], self._compute[name] = eject(self.model), compute
    finally:
      self.select(selected)
    return self._adapters[name].rows

  def select(self, name: str | None) -> None:
    """Activates the adapter `name`, or the bare base if None. Saves the state of the previously selected adapter."""
    if name is not None:
      self._check_name(name)
    if name == self.selected:
      return
    self._check_model()
    if self.selected is not None:
      self._adapters[self.selected] = eject(self.model)
      self.selected = None
    if name is not None:
      attach(self.model, self._adapters[name], self._compute[name])
      self.selected = name

  def remove(self, name: str) -> Adapter:
    """Removes the adapter `name` and returns it. If it was selected, the bare base is active afterwards."""
    self._check_name(name)
    if name == self.selected:
      self.select(None)
    del self._compute[name]
    return self._adapters.pop(name)

  def __getitem__(self, name: str) -> Adapter:
    """Returns the adapter `name` in its current state, including recent training if it is selected."""
    self._check_name(name)
    if name == self.selected:
      self._check_model()
      return extract_adapter(self.model)
    return self._adapters[name]

  def __contains__(self, name: object) -> bool:
    return name in self._adapters

  def __iter__(self) -> Iterator[str]:
    return iter(self._adapters)

  def __len__(self) -> int:
    return len(self._adapters)

  def _check_name(self, name: str) -> None:
    """Raises InputError if no adapter has this name."""
    if name not in self._adapters:
      choices = f"the names are {', '.join(self._adapters)}" if self._adapters else "there is none yet: add one"
      raise InputError(f"no adapter is named {name}{did_you_mean(name, self._adapters)} ({choices})")

  def _check_model(self) -> None:
    """Raises InputError if the adapter on the model was changed other than by this object."""
    adapted = {*adapted_modules(self.model), *trained_in_full(self.model)}
    if self.selected is None:
      if adapted:
        raise InputError(f"the model has an adapter without a name, on {min(adapted)}: eject it and add it with a name")
      return
    adapter = self._adapters[self.selected]
    if adapted != adapter.leaves.keys() | adapter.full.keys():
      raise InputError(
        f"the model no longer has the selected adapter {self.selected} (was it merged, disabled or ejected?): "
        "undo that first, so that nothing trained is lost"
      )
