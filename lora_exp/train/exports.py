"""Export of a run for other programs: the adapter in PEFT's format, the merged model, or the base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_exp import __version__, lora
from lora_exp.config import Config, LoraConfig
from lora_exp.config.checks import export_directory
from lora_exp.lora.peft.adapter_files import read_metadata
from lora_exp.models.weights.locate import SMOLLM2, is_path
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.files import write_json
from lora_exp.runtime.output_directory import new_directory
from lora_exp.runtime.run_files import ADAPTER
from lora_exp.train.base import make_base
from lora_exp.train.loaded_run import plan_of
from lora_exp.train.merge_check import merge_checked
from lora_exp.train.model_directory import MODEL_CONFIG, write_model

NOTE = "lora_exp.json"  # in an exported model's directory: the run and the version that it comes from
LOAD = "AutoModelForCausalLM.from_pretrained"


def export_merged(cfg: Config, out: Path) -> None:
  """Writes the merged model. Raises LoraExpError if its outputs differ too much from those of the run."""
  merged, check = merge_checked(cfg)
  with new_directory(out) as directory:
    for_transformers = write_model(directory, merged.plan, merged.frozen)
    _write_note(directory, cfg, {"format": "merged", "check": check})
  _show_model(out, cfg, "the model with the adapter merged", for_transformers)


def export_base(cfg: Config, out: Path) -> None:
  """Writes the base of the run, unquantised, as it was before training."""
  plan = plan_of(replace(cfg, run=None, lora=LoraConfig(method="frozen")))
  base, facts = make_base(plan)
  with new_directory(out) as directory:
    for_transformers = write_model(directory, plan, base)
    _write_note(directory, cfg, {"format": "base", "base": facts})
  if cfg.lora.quant:
    console.show_warning(f"the run quantised adapted kernels to {cfg.lora.quant}; the exported ones are not quantised")
  _show_model(out, cfg, "the base of the run", for_transformers)


def export_adapter(cfg: Config, out: Path) -> None:
  """Writes the adapter of the run in PEFT's format, with the name of the base that PEFT loads."""
  plan = plan_of(cfg)
  assert plan.start is not None
  metadata = read_metadata(Path(str(cfg.run)) / ADAPTER)
  base, loadable = base_for_peft(cfg)
  with new_directory(out) as directory:
    for_peft = lora.save_adapter(directory, plan.start, plan.naming(), metadata, base=base,
                                 dropout=cfg.lora.dropout)
    reason = read_metadata(directory).get("reason")
  if not for_peft:
    path = display_path(out)
    console.show_warning(f"PEFT cannot load {path}: {reason}. Use it with lora.init_from={path}")
    return
  console.show(f"{display_path(out)}: the adapter, for PEFT")
  if not loadable:
    run = display_path(Path(str(cfg.run)))
    console.show(f"Export the base for it with: python -m lora_exp task=export run={run} format=base")


def base_for_peft(cfg: Config) -> tuple[str | None, bool]:
  """(base, loadable): the base exported by format=base or else the run's weights, and whether transformers loads it."""
  exported = export_directory(replace(cfg, format="base", out=None))
  if (exported / MODEL_CONFIG).is_file():
    return str(exported), True
  weights = cfg.model.weights if cfg.model.base == "weights" else None
  if weights is None or weights == SMOLLM2:
    return weights, False
  return weights, not is_path(weights) or (Path(weights) / MODEL_CONFIG).is_file()


def _write_note(directory: Path, cfg: Config, facts: Mapping[str, Any]) -> None:
  """Writes NOTE: the version, the run and its method, and `facts`."""
  write_json(directory / NOTE, {"version": __version__, "run": cfg.run, "method": cfg.lora.method, **facts})


def _show_model(out: Path, cfg: Config, description: str, for_transformers: bool) -> None:
  """Shows the path of the model and how to load it."""
  console.show(f"{display_path(out)}: {description}")
  if for_transformers:
    console.show(f"Use it: {LOAD}({str(out)!r}), or model=hf model.weights={display_path(out)}")
    return
  console.show_warning(
    f"transformers has no such model (model.family={cfg.model.family}), so the tensors have lora_exp's names; load "
    f"them with the model settings of the run and model.weights={display_path(out)}"
  )
