"""How few trainable parameters are enough to adapt a language model, and where should they go?

A run goes through the packages in this order: `cli` reads the command line into a `config`; `data` turns text into rows
of tokens; `models` builds the frozen base; `lora` adds adapters to it; `train` runs the compiled step over a pack of
trials and writes a run directory; `report` reads run directories and answers the question. `tasks` holds one file for
each thing that a command can do, `sweep` decides which runs a sweep consists of and which of them train together, and
`runtime` holds what knows neither models nor data: the mesh, the cache, files, locks and the console.

A package imports only from those before it:

    config < runtime < report < lora < models < data < train < tasks < sweep < cli

Inside a package, files import only downwards too. `config` and `report` import no jax.

Axis letters in array names and docstrings, as in `x_BTD` and `lora_a_IR`:

    B  batch: rows                 H  attention heads             R  rank of an adapter
    T  tokens in a row             K  key/value heads             I  a kernel's input features
    D  features of the model       h  features of a head          O  a kernel's output features
    F  features in a feed-forward  V  vocabulary                  N  trials in a pack

From Python, `compose(overrides)` makes a checked config, `run(config)` runs it, and `load(run_dir)` loads what it
trained; see `lora_exp/cli/python_api.py`. Importing `lora_exp` imports no jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from lora_exp.cli.python_api import compose, load, run

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "load", "run"]


def __getattr__(name: str) -> Any:
  """`compose`, `load` and `run`, imported when they are first used (PEP 562)."""
  if name in ("compose", "load", "run"):
    return getattr(import_module("lora_exp.cli.python_api"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
