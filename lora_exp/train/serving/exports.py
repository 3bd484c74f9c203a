"""Export of a run for other programs: the adapter in PEFT's format, the merged model, or the base."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_exp import __version__, lora
from lora_exp.config import Config, LoraConfig
from lora_exp.config.checks import export_directory
from lora_exp.data.tokenization.save import FILES as TOKENIZER_FILES
from lora_exp.data.tokenization.save import save_tokenizer
from lora_exp.lora import methods
from lora_exp.lora.peft_files.adapter_files import read_metadata
from lora_exp.models.weights.locate import base_name, is_path
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import display_path, typed_path
from lora_exp.runtime.files import write_json
from lora_exp.runtime.output_directory import new_directory
from lora_exp.train.base import make_base
from lora_exp.train.compute.program import Tree
from lora_exp.train.loaded_run import plan_of
from lora_exp.train.merging.merge_check import merge_checked
from lora_exp.train.merging.model_directory import MODEL_CONFIG, write_model
from lora_exp.train.plan import Plan
from lora_exp.train.sampling.prompt_encoding import prompt_format
from lora_exp.train.serving import gguf_export, mlx_export
from lora_exp.train.serving.answer_card import make_card
from lora_exp.train.serving.card_file import CARD
from lora_exp.train.serving.gguf_export import ADAPTER_FILE, MODEL_FILE, base_gguf, plan_names
from lora_exp.train.serving.model_card import MODEL_CARD, model_card
from lora_exp.train.serving.modelfile import modelfile, write_modelfile
from lora_exp.train.serving.served_adapter import ServedAdapter, open_served

NOTE = "lora_exp.json"  # in an exported model's directory: the run and the version that it comes from
LOAD = "AutoModelForCausalLM.from_pretrained"


def export_merged(cfg: Config, out: Path) -> None:
  """Writes the merged model. Raises LoraExpError if its outputs differ too much from those of the run."""
  merged, check = merge_checked(cfg)
  with new_directory(out) as directory:
    for_transformers = write_model(directory, merged.plan, merged.frozen)
    _write_note(directory, cfg, {"format": "merged", "check": check})
    if for_transformers and _has_adapter(cfg):
      served = open_served(replace(cfg, export=replace(cfg.export, rank=None)))
      _write_sidecars(directory, cfg, served, "transformers", [])
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
  """Writes the adapter of the run in PEFT's format, with the name of the base that PEFT loads and its tokenizer."""
  served = open_served(cfg)
  base, loadable = base_for_peft(cfg)
  with new_directory(out) as directory:
    for_peft = lora.save_adapter(directory, served.adapter, served.plan.naming(), served.metadata, base=base,
                                 dropout=cfg.lora.dropout)
    reason = read_metadata(directory).get("reason")
    if for_peft:
      save_tokenizer(directory, cfg.model.tokenizer, cfg.model.weights)
      _write_sidecars(directory, cfg, served, "peft", [_peft_note(base)])
  if not for_peft:
    path = display_path(out)
    console.show_warning(f"PEFT cannot load {path}: {reason}. Use it with {typed_path('lora.init_from', out)}")
    return
  console.show(f"{display_path(out)}: the adapter, for PEFT")
  if problems := served.problems():
    console.show_warning(f"vLLM and llama.cpp load plain LoRA only, and this adapter is another kind: "
                         f"{'; '.join(problems)}. export.rank={served.suggested_rank()} converts it, and format=merged "
                         "serves it exactly")
  if not loadable:
    run = typed_path("run", Path(str(cfg.run)))
    console.show_command("Export the base for it with:", f"python -m lora_exp task=export {run} format=base")
  _show_verify(cfg, out)


def export_gguf(cfg: Config, out: Path) -> None:
  """Writes the adapter of the run as GGUF for llama.cpp, with a Modelfile for Ollama."""
  plan_names(plan_of(replace(cfg, run=None, lora=LoraConfig(method="frozen"))))
  served = open_served(cfg)
  base = base_gguf(served.plan)
  with new_directory(out) as directory:
    gguf_export.write_adapter(directory, served)
    model = str(base) if base is not None else "./model.gguf"
    format = prompt_format(cfg, served.plan.tokenizer)
    write_modelfile(directory, modelfile(served.plan.tokenizer, model, f"./{ADAPTER_FILE}", format))
    _write_sidecars(directory, cfg, served, "llama.cpp", [_gguf_note(base)])
  console.show(f"{display_path(out)}: the adapter, for llama.cpp and Ollama")
  run, file = typed_path("run", Path(str(cfg.run))), shlex.quote(display_path(out / ADAPTER_FILE))
  where = shlex.quote(display_path(base)) if base is not None else "BASE/model.gguf"
  if base is None:
    command = f"python -m lora_exp task=export {run} format=gguf_base out=BASE"
    console.show_command("Export the base for it with:", command)
  console.show_command("Use it:", f"llama-server -m {where} --lora {file}")
  _show_verify(cfg, out)


def export_mlx(cfg: Config, out: Path) -> None:
  """Writes the adapter of the run in the layout of mlx-lm."""
  served = open_served(cfg)
  base, _ = base_for_peft(cfg)
  with new_directory(out) as directory:
    mlx_export.write_adapter(directory, served, base)
    _write_sidecars(directory, cfg, served, "mlx", [_mlx_note(base)])
  console.show(f"{display_path(out)}: the adapter, for mlx-lm")
  path = shlex.quote(display_path(out))
  console.show_command("Use it:", f"mlx_lm.generate --model {shlex.quote(base or 'BASE')} --adapter-path {path}")


def export_gguf_merged(cfg: Config, out: Path) -> None:
  """Writes the merged model as GGUF. Raises LoraExpError if its outputs differ too much from those of the run."""
  card_run = open_served(replace(cfg, export=replace(cfg.export, rank=None))) if _has_adapter(cfg) else None
  exact = replace(cfg, merge=replace(cfg.merge, dtype=cfg.merge.dtype or "float32"))
  merged, check = merge_checked(exact)
  _write_gguf_model(cfg, out, merged.plan, merged.frozen, {"format": "gguf_merged", "check": check}, card_run)
  _show_gguf_model(out, "the model with the adapter merged")


def export_gguf_base(cfg: Config, out: Path) -> None:
  """Writes the base of the run as GGUF, unquantised or as `export.gguf_type`."""
  plan = plan_of(replace(cfg, run=None, lora=LoraConfig(method="frozen")))
  base, facts = make_base(plan)
  _write_gguf_model(cfg, out, plan, base, {"format": "gguf_base", "base": facts}, None)
  _show_gguf_model(out, "the base of the run")


def _has_adapter(cfg: Config) -> bool:
  return not methods.of(cfg.lora).trains_everything


def _write_gguf_model(
  cfg: Config, out: Path, plan: Plan, params: Tree, facts: Mapping[str, Any], served: ServedAdapter | None
) -> None:
  """Writes model.gguf with a Modelfile and notes; the tokenizer is part of the file."""
  with new_directory(out) as directory:
    gguf_export.write_model(directory, plan, params, cfg.export.gguf_type)
    for name in TOKENIZER_FILES:
      (directory / name).unlink(missing_ok=True)
    format = prompt_format(cfg, plan.tokenizer)
    write_modelfile(directory, modelfile(plan.tokenizer, f"./{MODEL_FILE}", None, format))
    _write_note(directory, cfg, facts)
    if served is not None:
      _write_sidecars(directory, cfg, served, "llama.cpp", [])


def _show_gguf_model(out: Path, description: str) -> None:
  console.show(f"{display_path(out)}: {description}, for llama.cpp and Ollama")
  file = out / MODEL_FILE
  console.show(f"Use it in this program: model=hf {typed_path('model.weights', file)}")
  console.show_command("Use it:", f"llama-server -m {shlex.quote(display_path(file))}")


def _write_sidecars(
  directory: Path, cfg: Config, served: ServedAdapter, library: str, notes: list[str]
) -> None:
  """Writes the model card, and the answer card if the model is loaded."""
  (directory / MODEL_CARD).write_text(model_card(cfg, served, library, notes), encoding="utf-8")
  if served.run is not None:
    write_json(directory / CARD, make_card(served.run, cfg))


def _peft_note(base: str | None) -> str:
  return ("## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
          f"base = AutoModelForCausalLM.from_pretrained({base or 'BASE'!r})\n"
          'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")\n```')


def _gguf_note(base: Path | None) -> str:
  model = "BASE.gguf" if base is None else base.name
  return (f"## Use\n\n```sh\nllama-server -m {model} --lora {ADAPTER_FILE}\nollama create NAME -f Modelfile\n```")


def _mlx_note(base: str | None) -> str:
  return f"## Use\n\n```sh\nmlx_lm.generate --model {base or 'BASE'} --adapter-path THIS_DIRECTORY\n```"


def _show_verify(cfg: Config, out: Path) -> None:
  """Shows how to check what a server computes."""
  if cfg.export.answers:
    backend = "llama_cpp" if (out / ADAPTER_FILE).is_file() else "peft"
    command = f"python -m lora_exp task=verify {typed_path('verify.adapter', out)} verify.backend={backend}"
    console.show_command("Check it:", command)


def base_for_peft(cfg: Config) -> tuple[str | None, bool]:
  """(base, loadable): the base exported by format=base or else the run's weights, and whether transformers loads it."""
  exported = export_directory(replace(cfg, format="base", out=None))
  if (exported / MODEL_CONFIG).is_file():
    return str(exported), True
  weights = cfg.model.weights if cfg.model.base == "weights" else None
  if weights is None:
    return None, False
  return base_name(weights), not is_path(weights) or (Path(weights) / MODEL_CONFIG).is_file()


def _write_note(directory: Path, cfg: Config, facts: Mapping[str, Any]) -> None:
  """Writes NOTE: the version, the run and its method, and `facts`."""
  write_json(directory / NOTE, {"version": __version__, "run": cfg.run, "method": cfg.lora.method, **facts})


def _show_model(out: Path, cfg: Config, description: str, for_transformers: bool) -> None:
  """Shows the path of the model and how to load it."""
  console.show(f"{display_path(out)}: {description}")
  if for_transformers:
    console.show(f"Use it: {LOAD}({str(out)!r}), or model=hf {typed_path('model.weights', out)}")
    return
  console.show_warning(
    f"transformers has no such model (model.family={cfg.model.family}), so the tensors have lora_exp's names; load "
    f"them with the model settings of the run and {typed_path('model.weights', out)}"
  )
