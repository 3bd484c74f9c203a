"""`seed`, the default of all seeds that change between repetitions of a run."""

from collections.abc import Mapping
from typing import Any

FOLLOWING = ("train", "data")  # groups whose `seed` is `seed` if it is null
FIXED = ("pretrain_data", "retain")  # groups whose `seed` is 0 if it is null: repetitions share a base and a retain set


def with_seeds(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested settings in which `train.seed`, `data.seed` and the seeds of the other data sources are numbers.

  Explicit numbers take precedence. A missing or invalid `seed` is reported by the conversion.
  """
  resolved = dict(values)
  for groups, seed in ((FOLLOWING, resolved.get("seed", 0)), (FIXED, 0)):
    for name in groups:
      group = resolved.get(name)
      if isinstance(group, Mapping) and "seed" in group and group["seed"] is None:
        resolved[name] = {**group, "seed": seed}
  return resolved
