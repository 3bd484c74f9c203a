"""Several adapters on one base, each under a name; one of them, or none, answers at a time.

>>> from flax import nnx
>>> from lora_exp.lora.multi_adapter import Adapters
>>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
>>> adapters = Adapters(model)
>>> rows = adapters.add("math", "layers.0", rank=2), adapters.add("code", "layers.*", rank=4)
>>> adapters.select("math")  # train the model, or ask it
>>> adapters.select("code")  # what math learned is kept
>>> adapters.select(None)  # the base, bit for bit
>>> adapters.names, adapters.selected, adapters["code"].rows[0].rank
(['math', 'code'], None, 4)
"""

from collections.abc import Iterator, Sequence

from flax import nnx

from lora_exp.config import InputError
from lora_exp.config.errors import did_you_mean
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.inject import adapted_modules, attach, eject, extract_adapter, inject, trained_in_full


class Adapters:
  """The adapters of one base by name. Those that are not selected wait off the model, as numpy arrays.

  What goes with training and not with an adapter does not: an optimizer's state is the caller's to keep, and a
  selected adapter starts with its dropout off, as after `inject`. While one is selected, do not eject or inject by
  hand: a switch then refuses rather than lose what was trained.
  """

  def __init__(self, model: nnx.Module):
    """`model` carries no adapter yet; else InputError."""
    self.model = model
    self.selected: str | None = None
    self._kept: dict[str, Adapter] = {}
    self._compute: dict[str, str] = {}
    self._check()

  @property
  def names(self) -> list[str]:
    """In the order in which they were added."""
    return list(self._kept)

  def add(
    self,
    name: str,
    targets: str | Sequence[str] = "re:.*",
    *,
    adapter: Adapter | None = None,
    compute: str = "auto",
    **settings,
  ) -> tuple[AdaptedModule, ...]:
    """Keeps a new adapter, injected with `settings` as of `lora.inject`, or the `adapter` given; returns its rows.

    The one selected stays selected. Raises InputError for a name that is taken, and what `inject` or `attach` raise.
    """
    if not name or name in self._kept:
      raise InputError(f"an adapter is named {name} already: remove it, or choose another name" if name else NO_NAME)
    if adapter is not None and (settings or targets != "re:.*"):
      raise InputError(f"{name}: an adapter that is given has its targets and settings: give it alone, or give these")
    selected = self.selected
    self.select(None)
    try:
      if adapter is None:
        inject(self.model, targets, compute=compute, **settings)
      else:
        attach(self.model, adapter, compute)  # so that a misfit is refused now and not at the switch
      self._kept[name], self._compute[name] = eject(self.model), compute
    finally:
      self.select(selected)
    return self._kept[name].rows

  def select(self, name: str | None) -> None:
    """Puts the adapter of this name on the model, or none: the base, bit for bit. What was trained is kept."""
    if name is not None:
      self._known(name)
    if name == self.selected:
      return
    self._check()
    if self.selected is not None:
      self._kept[self.selected] = eject(self.model)
      self.selected = None
    if name is not None:
      attach(self.model, self._kept[name], self._compute[name])
      self.selected = name

  def remove(self, name: str) -> Adapter:
    """Forgets the adapter of this name and returns it; if it was selected, the base answers."""
    self._known(name)
    if name == self.selected:
      self.select(None)
    del self._compute[name]
    return self._kept.pop(name)

  def __getitem__(self, name: str) -> Adapter:
    """The adapter of this name; the selected one as it stands, with all that was trained since."""
    self._known(name)
    if name == self.selected:
      self._check()
      return extract_adapter(self.model)
    return self._kept[name]

  def __contains__(self, name: object) -> bool:
    return name in self._kept

  def __iter__(self) -> Iterator[str]:
    return iter(self._kept)

  def __len__(self) -> int:
    return len(self._kept)

  def _known(self, name: str) -> None:
    if name not in self._kept:
      known = f"the names are {', '.join(self._kept)}" if self._kept else "there is none yet: add one"
      raise InputError(f"no adapter is named {name}{did_you_mean(name, self._kept)} ({known})")

  def _check(self) -> None:
    """Refuses a model whose adapter was put on or taken off by other hands."""
    found = {*adapted_modules(self.model), *trained_in_full(self.model)}
    if self.selected is None:
      if found:
        raise InputError(f"the model carries an adapter without a name at {min(found)}: eject it, and add it under one")
    elif found != (own := self._kept[self.selected]).leaves.keys() | own.full.keys():
      raise InputError(
        f"the model no longer carries {self.selected} as it was selected (merged, disabled or ejected since?): "
        "undo that first, so that nothing trained is lost"
      )


NO_NAME = "an adapter needs a name"
