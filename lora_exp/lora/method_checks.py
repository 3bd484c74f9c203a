"""Checks of a config that need the method. They run after the checks of `config` have passed."""

import importlib.util
from collections.abc import Iterator
from importlib import import_module

from lora_exp.config import Config, InputError, LoraConfig, did_you_mean
from lora_exp.config.checks import ADAPTER_FORMATS, BASE_FORMATS
from lora_exp.config.conversion import shown
from lora_exp.lora.declared_methods import declared_of
from lora_exp.lora.method_declaration import MethodDeclaration


def method_problems(cfg: Config) -> list[str]:
  """Returns the settings that are incompatible with the method of `cfg`, as one sentence each."""
  try:
    method = declared_of(cfg.lora)
  except InputError as error:
    return error.problems
  parts = (_unused_problems, _kernel_problems, _rank_problems, _option_problems)
  problems = [problem for part in parts for problem in part(cfg.lora, method)]
  return [*problems, *method.check(cfg.lora), *_task_problems(cfg, method)]


def _unused_problems(lora: LoraConfig, method: MethodDeclaration) -> Iterator[str]:
  """Settings that the method does not use. They are errors, as they would be ignored silently."""
  if method.adapts_kernels and not method.uses_alpha:
    names = ("alpha_pattern", "scaling") if lora.alpha is None else ("alpha", "alpha_pattern", "scaling")
    yield from _not_default(lora, names, f"{method.title} has no alpha; remove it")
  if method.adapts_kernels and (method.one_rank or not method.uses_rank):
    yield from _not_default(lora, ("rank_pattern",), f"{method.title} has no rank for each module; remove it")
  if method.trains_everything or method.trains_nothing:
    reason = f"is not used by lora.method={lora.method}; remove it"
    yield from _not_default(lora, ("bias", "train_modules"), reason)
  if lora.budget is not None and not method.uses_budget:
    every = import_module("lora_exp.lora.methods").every()
    users = ", ".join(f"lora={other.name}" for other in every if other.uses_budget)
    yield f"lora.budget={lora.budget:g}: is only used by {users}; remove it"
  if lora.lr_ratio != 1 and not method.has_lr_ratio:
    yield f"lora.lr_ratio={lora.lr_ratio:g}: lora.method={lora.method} trains no A and B; set it to 1"
  if lora.dropout and method.adapts_kernels and not method.drops_input:
    yield f"lora.dropout={lora.dropout:g}: {method.title} has no dropout; set it to 0"


def _not_default(lora: LoraConfig, names: tuple[str, ...], reason: str) -> Iterator[str]:
  """A problem for each of the settings `names` that is not at its default."""
  for name in names:
    if getattr(lora, name) != getattr(LoraConfig, name):
      yield f"lora.{name}={shown(getattr(lora, name))}: {reason}"


def _kernel_problems(lora: LoraConfig, method: MethodDeclaration) -> Iterator[str]:
  """Settings of adapted kernels; most are errors for a method that adapts none."""
  if method.adapts_kernels and not lora.targets:
    yield "lora.targets: must name at least one module; lora=frozen trains nothing"
  if lora.quant and method.adapts_kernels and importlib.util.find_spec("qwix") is None:
    yield f"lora.quant={lora.quant}: needs qwix: pip install 'lora_exp[quant]'"
  if method.adapts_kernels:
    return
  if lora.bias == "lora_only":
    yield f"lora.bias=lora_only: lora.method={lora.method} adapts no module; use all or none"
  if lora.quant:
    yield f"lora.quant={lora.quant}: only kernels under adapters are quantised, and {lora.method} has none"
  if lora.init_from is not None:
    yield f"lora.init_from={lora.init_from}: lora.method={lora.method} has no adapter to start from"


def _rank_problems(lora: LoraConfig, method: MethodDeclaration) -> Iterator[str]:
  """Settings that conflict with `lora.parameters`, which chooses the rank."""
  if lora.parameters is None or not method.adapts_kernels:
    return
  if not method.uses_rank:
    yield f"lora.parameters={shown(lora.parameters)}: {method.title} has no rank to choose; remove it"
  for name in ("rank_pattern", "init_from"):
    if getattr(lora, name) is not None:
      yield (
        f"lora.parameters={shown(lora.parameters)}: chooses the rank, and lora.{name}={shown(getattr(lora, name))} "
        "does too; remove one of them"
      )


def _option_problems(lora: LoraConfig, method: MethodDeclaration) -> Iterator[str]:
  """Entries of `lora.options` that the method does not declare."""
  for name in lora.options or {}:
    if name not in method.options:
      choices = f"choose {', '.join(method.options)}" if method.options else f"{method.title} has no options; remove it"
      yield f"lora.options.{name}: {choices}{did_you_mean(name, method.options)}"


def _task_problems(cfg: Config, method: MethodDeclaration) -> Iterator[str]:
  """Tasks that are not possible with this method, or for a run of it."""
  if cfg.task == "advise" and (not method.uses_rank or method.one_rank or not method.additive):
    yield f"lora={method.name}: task=advise predicts a rank, and {method.title} has none to choose; use lora=lora"
  if cfg.run is None:
    return
  if cfg.task == "inspect" and not method.changes_kernels:
    trained = "nothing" if method.trains_nothing else "no kernel"
    yield f"run={cfg.run}: lora={method.name} trained {trained}; there is no ΔW to inspect"
  if cfg.task in ("merge", "export") and method.trains_nothing and cfg.format not in BASE_FORMATS:
    yield f"run={cfg.run}: lora={method.name} trained nothing; export the base with task=export format=base"
  if cfg.task != "export" or cfg.format not in ADAPTER_FORMATS or cfg.export.rank is not None:
    return
  if method.trains_everything:
    yield (f"format={cfg.format}: lora={method.name} trains the model itself and has no adapter; use format=merged, or "
           "export.rank=R for the LoRA of rank R that is nearest to it")
