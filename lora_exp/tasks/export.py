"""What a run trained, as files for other programs: the adapter, the model with it merged and checked, or the base."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_exp import __version__, lora
from lora_exp.config import Config, InUseError, LoraConfig, ModelConfig
from lora_exp.config.checks import export_directory
from lora_exp.config.data_checks import merges
from lora_exp.data.tokenizers import Tokenizer
from lora_exp.data.tokenizers.save import save_tokenizer
from lora_exp.models.hf_export import same_model, to_hf
from lora_exp.models.registry import get_family
from lora_exp.models.weights.hf_writer import save_hf
from lora_exp.models.weights.locate import SMOLLM2, find_weights, is_path
from lora_exp.runtime import console
from lora_exp.runtime.disk_errors import write_error
from lora_exp.runtime.files import sync_tree, write_json
from lora_exp.runtime.json_files import read_json_object
from lora_exp.runtime.mesh import flatten, keep_programs
from lora_exp.tasks.merge import checked
from lora_exp.train.base import make_base
from lora_exp.train.loaded_run import plan_of
from lora_exp.train.plan import Plan, naming_of
from lora_exp.train.run_summary import short

GENERATION = "generation_config.json"
FACTS = "lora_exp.json"  # beside the files: what they were made from
LOAD = "AutoModelForCausalLM.from_pretrained"


def run(cfg: Config) -> None:
  """Writes what task=merge or task=export asks for; nothing is left behind where it fails."""
  keep_programs(cfg.cache)
  out = export_directory(cfg)
  kind = "merged" if merges(cfg) else cfg.format
  {"merged": _merged, "base": _base, "peft": _peft}[kind](cfg, out)


def _merged(cfg: Config, out: Path) -> None:
  opened, check = checked(cfg)
  with written(out) as directory:
    theirs = write_model(directory, opened.plan, opened.frozen)
    _note(directory, cfg, {"format": "merged", "check": check})
  _tell(out, cfg, "the model with what the run trained", theirs)


def _base(cfg: Config, out: Path) -> None:
  plan = plan_of(replace(cfg, run=None, lora=LoraConfig(method="frozen")))
  base, facts = make_base(plan)
  with written(out) as directory:
    theirs = write_model(directory, plan, base)
    _note(directory, cfg, {"format": "base", "base": facts})
  if cfg.lora.quant:
    console.show_warning(f"the run held the adapted kernels in {cfg.lora.quant}; here they are as they were before")
  _tell(out, cfg, "the base of the run", theirs)


def _peft(cfg: Config, out: Path) -> None:
  plan = plan_of(cfg)
  assert plan.start is not None
  own = _lora_exp(Path(str(cfg.run)) / "adapter")
  base, known = base_for_peft(cfg)
  with written(out) as directory:
    theirs = lora.save_adapter(directory, plan.start, naming_of(cfg.model), own, base=base, dropout=cfg.lora.dropout)
    why = _lora_exp(directory).get("reason")
  if not theirs:
    where = short(out)
    console.show_warning(f"PEFT cannot load {where}: {why}. The names in it are ours, for lora.init_from={where}")
    return
  console.show(f"{short(out)}: the adapter, for PEFT")
  if not known:
    console.show(f"The base to put it on: python -m lora_exp task=export run={short(Path(str(cfg.run)))} format=base")


def _lora_exp(adapter: Path) -> dict[str, Any]:
  """What this program noted in an adapter's config."""
  return read_json_object(adapter / "adapter_config.json").get("lora_exp", {})


def base_for_peft(cfg: Config) -> tuple[str | None, bool]:
  """The directory that format=base wrote, or what the run took its base from; and whether transformers loads that."""
  exported = export_directory(replace(cfg, format="base", out=None))
  if (exported / "config.json").is_file():
    return str(exported), True
  weights = cfg.model.weights if cfg.model.base == "weights" else None
  if weights is None or weights == SMOLLM2:
    return weights, False
  return weights, not is_path(weights) or (Path(weights) / "config.json").is_file()


def _note(directory: Path, cfg: Config, facts: Mapping[str, Any]) -> None:
  write_json(directory / FACTS, {"version": __version__, "run": cfg.run, "method": cfg.lora.method, **facts})


def _tell(out: Path, cfg: Config, what: str, theirs: bool) -> None:
  console.show(f"{short(out)}: {what}")
  if theirs:
    console.show(f"Use it: {LOAD}({str(out)!r}), or model=hf model.weights={short(out)}")
    return
  console.show_warning(
    f"transformers has no such model (model.family={cfg.model.family}), so the tensors have our own names; "
    f"use them with the model settings of the run and model.weights={short(out)}"
  )


# Directories of Hugging Face


def write_model(directory: Path, plan: Plan, tree: Any) -> bool:
  """Writes the model of `plan` with the arrays `tree`; returns whether transformers has such a model.

  If not, the tensors have our own names, which `model.weights=DIR` reads.
  """
  dtype = plan.cfg.model.param_dtype
  config = hf_config(plan)
  names = get_family(plan.cfg.model.family).stored_names(plan.cfg.model) if config else None
  arrays = flatten(tree)
  with console.progress("write", len(arrays), "tensors") as bar:
    save_hf(directory, arrays, dtype, names, bar.advance)
  if config is None:
    return False
  given = "dtype" if "dtype" in config else "torch_dtype"
  write_json(directory / "config.json", config | {given: dtype})
  model, source = plan.cfg.model, source_of(plan.cfg.model)
  save_tokenizer(directory, model.tokenizer, model.weights)
  if source is not None and (source / GENERATION).is_file():
    shutil.copyfile(source / GENERATION, directory / GENERATION)
  else:
    # Of a model that was tuned to chat, the end of a turn is an end too.
    write_json(directory / GENERATION, token_ids(plan.tokenizer) | {"eos_token_id": list(plan.tokenizer.stops)})
  return True


def hf_config(plan: Plan) -> dict[str, Any] | None:
  """config.json of the model: the base's own where it has one, else made; None where transformers has no such model."""
  model = plan.cfg.model
  if (source := source_of(model)) is not None and (source / "config.json").is_file():
    config = read_json_object(source / "config.json")
    if same_model(config, model, plan.vocab_size):
      return config
  made = to_hf(model, plan.vocab_size)
  return made and made | token_ids(plan.tokenizer)


def source_of(model: ModelConfig) -> Path | None:
  """The directory that the base's weights came from."""
  if model.base != "weights" or model.weights is None:
    return None
  place = find_weights(model.weights)
  return place if place.is_dir() else place.parent


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
  """The ids that config.json and generation_config.json name."""
  bos = tokenizer.special_tokens.get(tokenizer.template_words.get("bos_token", ""), tokenizer.bos)
  return {"bos_token_id": bos, "eos_token_id": tokenizer.eot, "pad_token_id": None}


# The directory


@contextmanager
def written(out: Path) -> Iterator[Path]:
  """A directory to write into, which becomes `out` when everything is in it.

  Raises InputError or DiskError if it cannot be written, and InUseError if another process is writing it; nothing is
  left then, and what a process that was killed had left is removed.
  """
  temporary, parent = out.with_name(f".{out.name}.tmp"), out.parent.exists()
  try:
    temporary.mkdir(parents=True, exist_ok=True)
    with _held(temporary):
      try:
        for old in temporary.iterdir():
          old.unlink()
        yield temporary
        sync_tree(temporary)
        temporary.replace(out)  # an empty directory may be there
      finally:
        shutil.rmtree(temporary, ignore_errors=True)
  except OSError as error:
    raise write_error(error, out, "out=DIR says where it goes") from error
  finally:
    if not parent and out.parent.is_dir() and not any(out.parent.iterdir()):
      out.parent.rmdir()


@contextmanager
def _held(directory: Path) -> Iterator[None]:
  """Holds a lock on the directory itself, which ends with the process."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  except BlockingIOError as error:
    raise InUseError(f"{directory}: another process is writing here; wait for it, or choose another out=") from error
  finally:
    os.close(descriptor)
