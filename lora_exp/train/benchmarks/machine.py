"""The machine of a bench: its devices, its processor and the versions of the libraries that matter for speed."""

import importlib.metadata
import os
import platform

import jax

from lora_exp import __version__
from lora_exp.runtime.device import core_count

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def machine_facts() -> dict[str, object]:
  """The facts about the machine, by name, for the table and for bench.json."""
  first = jax.devices()[0]
  limit = (first.memory_stats() or {}).get("bytes_limit")
  versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
  facts: dict[str, object] = {
    "device": f"{len(jax.devices())} × {first.device_kind} ({first.platform})",
    "memory": f"{(limit or _host_memory()) / 1e9:.1f} GB{' each' if limit and len(jax.devices()) > 1 else ''}",
    "processor": f"{_processor()}, {core_count()} cores",
    "versions": ", ".join([f"lora_exp {__version__}", *versions]),
    "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
  }
  flags = os.environ.get("XLA_FLAGS")
  if flags:
    facts["XLA_FLAGS"] = flags
  if hasattr(os, "getloadavg"):
    facts["load before"] = f"{os.getloadavg()[0]:.1f} processes in the last minute"
  return facts


def _processor() -> str:
  """The name of the processor."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
  except OSError:
    names = []
  return names[0] if names else platform.processor() or platform.machine()


def _host_memory() -> int:
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
