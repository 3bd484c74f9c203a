"""`task=advise`: suggests a learning rate, targets and a rank from a few short runs, before an expensive sweep.

Each suggestion is shown with how often such suggestions were right in `tests/bench/advise.py`.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lora_exp.config import Config
from lora_exp.config.typed_command import PROGRAM, typed_overrides
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.files import write_text_atomically
from lora_exp.train.costs.plan_tables import folded
from lora_exp.train.probing.advice import (
  ADVISED_PARAMETERS,
  ADVISED_REGRET,
  DEFAULT_REGRET,
  RANK_SHARE,
  RELIABILITY,
  RULE_REGRET,
  TARGET_SHARE,
  Advice,
  advise,
  width_rule,
)
from lora_exp.train.probing.probe import Probe, measure

FILE = "advice.json"  # in the directory `out`
REPLACED = ("task", "out", "optim.lr", "lora.targets", "lora.rank", "lora.alpha")  # overrides that the advice replaces


def run(cfg: Config) -> Advice:
  """Measures, shows the measurements and the advice with the commands to run, and writes advice.json if `out` is set.

  Raises InputError as `measure` does.
  """
  start_jax(cfg.cache)
  probe = measure(cfg)
  advice = advise(probe)
  _show_modules(probe)
  _show_gains(probe)
  for sentence in _sentences(cfg, probe, advice):
    console.show(sentence)
  commands = _commands(cfg, advice)
  console.show_command("\nTrain with it:", commands["train"])
  console.show_command("Compare it with its neighbours:", commands["sweep"])
  if cfg.out is not None:
    _write(Path(cfg.out) / FILE, probe, advice, commands)
  return advice


def _show_modules(probe: Probe) -> None:
  """Gradient energy and used directions by module, those of all blocks in one row."""
  gradients = probe.gradients
  total = sum(gradient.energy for gradient in gradients) or 1.0
  per_parameter = total / sum(gradient.parameters for gradient in gradients)
  rows = []
  for name, places in folded([(gradient.module,) for gradient in gradients]):
    group = [gradients[place] for place in places]
    energy, parameters = sum(g.energy for g in group), sum(g.parameters for g in group)
    used = sum(probe.directions[g.module] for g in group) / len(group)
    kernel = f"{group[0].fan_in}×{group[0].fan_out}"
    rows.append((name, kernel, f"{100 * energy / total:.1f} %", energy / parameters / per_parameter, used))
  columns = ("module", "kernel", "gradient energy", "per parameter", "directions")
  console.show_table(f"Modules at the base ({len(gradients)})", columns, rows, right=columns[2:])


def _show_gains(probe: Probe) -> None:
  """The gains of rates, targets and ranks, each as a share of the best of its kind."""
  lora = probe.cfg.lora
  rows: list[tuple] = []
  kinds = (("optim.lr", probe.rates), ("lora.targets", probe.targets), ("lora.rank, truncated", probe.ranks))
  for setting, gains in kinds:
    best = max(gains.values())
    for value, gain in gains.items():
      shown = f"{value:g}" if isinstance(value, float) else str(value)
      rows.append((setting, shown, f"{gain:.4g}", f"{100 * gain / best:.0f} %"))
  title = f"Gain of {probe.steps} steps over the base ({probe.base_loss:.4f}), rank {lora.rank}, alpha {lora.alpha:g}"
  console.show_table(title, ("setting", "value", "gain", "of the best"), rows, right=("value", "gain", "of the best"))


def _sentences(cfg: Config, probe: Probe, advice: Advice) -> Iterator[str]:
  """Yields the advice and its reasons, one sentence each."""
  rate, configured = advice.lr, cfg.optim.lr
  share = 100 * probe.rates[configured] / max(probe.rates.values())
  yield ""
  if rate == configured:
    yield f"Rate {rate:g}, as configured: no other rate was better by enough ({share:.0f} % of the best gain)."
  else:
    yield f"Rate {rate:g}; the configured {configured:g} reached {share:.0f} % of the best gain."
  yield f"  {RELIABILITY['optim.lr']}"
  if cfg.model.family != "mlp":
    yield (f"  The published rule 5e-5·10·(2000/width)^p gives {width_rule(cfg.model.family, cfg.model.width):.2g} "
           "(LoRA Without Regret, 2025).")
  yield (f"Targets {advice.targets}: the fewest parameters with {100 * TARGET_SHARE:.0f} % of the largest gain.")
  yield f"  {RELIABILITY['lora.targets']}"
  yield (f"Rank {advice.rank}: the smallest at which the update of rank {max(probe.ranks)} keeps "
         f"{100 * RANK_SHARE:.0f} % of its gain.")
  yield f"  {RELIABILITY['lora.rank']}"
  yield (f"In the bench, advice lost {ADVISED_REGRET:.1%} of the best gain with {ADVISED_PARAMETERS:.0%} of the "
         f"default's parameters, and the defaults lost {DEFAULT_REGRET:.1%}. The default targets and rank at the "
         f"published rate lost only {RULE_REGRET:.1%}: they are the better start if the number of parameters "
         "does not matter.")


def _commands(cfg: Config, advice: Advice) -> dict[str, str]:
  """The commands that train with the advice, and with its neighbours in rate and rank on three seeds."""
  typed = [text for text in typed_overrides("advise") if text.split("=")[0].lstrip("+") not in REPLACED]
  settings = {"optim.lr": f"{advice.lr:g}", "lora.targets": advice.targets, "lora.rank": str(advice.rank)}
  settings["lora.alpha"] = f"{advice.alpha:g}"
  rates = ",".join(f"{factor * advice.lr:g}" for factor in (0.5, 1, 2))
  ranks = ",".join(map(str, sorted({max(1, advice.rank // 2), advice.rank, 2 * advice.rank})))
  around = settings | {"optim.lr": rates, "lora.rank": ranks, "seed": "0,1,2", "hydra/launcher": "packed"}
  typed_without_seed = [text for text in typed if not text.startswith("seed=")]
  return {
    "train": shlex.join([*PROGRAM, *typed, *(f"{key}={value}" for key, value in settings.items())]),
    "sweep": shlex.join([*PROGRAM, "-m", *typed_without_seed, *(f"{key}={value}" for key, value in around.items())]),
  }


def _write(path: Path, probe: Probe, advice: Advice, commands: dict[str, str]) -> None:
  """Writes advice.json: the advice, the commands, and every measurement."""
  content = {
    "advice": asdict(advice),
    "commands": commands,
    "steps": probe.steps,
    "base_loss": probe.base_loss,
    "gains": {"optim.lr": probe.rates, "lora.targets": probe.targets, "lora.rank": probe.ranks},
    "modules": [{**asdict(g), "directions": probe.directions[g.module]} for g in probe.gradients],
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text_atomically(path, json.dumps(_finite(content), indent=1) + "\n")
  console.show(f"Written: {display_path(path)}")


def _finite(node: object) -> object:
  """`node` with None for numbers that JSON does not have: the gain of a run that diverged."""
  if isinstance(node, dict):
    return {str(key): _finite(value) for key, value in node.items()}
  if isinstance(node, list):
    return [_finite(value) for value in node]
  return None if node == float("-inf") else node
