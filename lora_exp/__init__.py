"""How few trainable parameters are enough to adapt a language model, and where should they go?

A run passes through the packages in this order: `cli` parses the command line into a `config`; `data` packs text into
rows of tokens; `models` builds the frozen base; `lora` adds adapters to it; `train` runs the compiled step over a pack
of trials and writes a run directory; `report` reads run directories and answers the question. `tasks` has one file per
task, `sweep` defines the runs of a sweep and groups them into packs, and `runtime` has everything that is independent
of models and data: the mesh, the cache, files, locks and the console.

A package imports only from those to its left:

    config < runtime < report < lora < models < data < train < tasks < sweep < cli

There are no import cycles inside a package either. `config` and `report` do not import jax.

Axis letters in array names and docstrings, as in `x_BTD` and `lora_a_IR`:

    B  batch: rows                 H  attention heads             R  rank of an adapter
    T  tokens in a row             K  key/value heads             I  a kernel's input features
    D  features of the model       h  features of a head          O  a kernel's output features
    F  features in a feed-forward  V  vocabulary                  N  trials in a pack

From Python, `compose(overrides)` returns a checked config, `run(config)` runs it and returns a `Result`, and
`load(run_dir)` loads the trained model; see `lora_exp/cli/python_api.py`. Importing `lora_exp` does not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from lora_exp.cli.python_api import Result, compose, load, run

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "compose", "load", "run"]


def __getattr__(name: str) -> Any:
  """Imports the names of the Python API on first use (PEP 562)."""
  if name in ("Result", "compose", "load", "run"):
    return getattr(import_module("lora_exp.cli.python_api"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
