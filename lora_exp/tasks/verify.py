"""`task=verify`: checks whether a server computes the adapted model, and if not, names the fault."""

from pathlib import Path
from typing import Any

from lora_exp.config import Config, InputError, LoraExpError
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.json_files import read_json_object
from lora_exp.train.serving.card_file import card_rows, read_card
from lora_exp.train.serving.completions_client import CompletionsClient, template_problem
from lora_exp.train.serving.diagnosis import Measured, diagnose
from lora_exp.train.serving.gguf_export import ADAPTER_FILE, MODEL_FILE
from lora_exp.train.serving.llama_server import llama_server
from lora_exp.train.serving.modelfile import MODELFILE
from lora_exp.train.serving.torch_models import measure_merged, measure_peft


def run(cfg: Config) -> None:
  """Compares `verify.backend` with answers.json in `verify.adapter`. Raises LoraExpError that names the fault."""
  directory = Path(str(cfg.verify.adapter))
  card = read_card(directory)
  diagnosis = diagnose(card, MEASURES[cfg.verify.backend](cfg, directory, card), cfg.verify.tolerance)
  console.show_facts(f"{cfg.verify.backend} against {display_path(directory / 'answers.json')}", {
    "largest difference of a log-probability": f"{diagnosis.largest:.3g} nats (at most {cfg.verify.tolerance:g} is "
                                               f"allowed), {diagnosis.count} tokens of {len(card['prompts'])} answers",
    "result": "right" if diagnosis.fault is None else f"wrong ({diagnosis.fault})",
  })
  if diagnosis.fault is not None:
    raise LoraExpError(diagnosis.text)
  console.show(diagnosis.text)


def _peft(cfg: Config, directory: Path, card: dict[str, Any]) -> Measured:
  return measure_peft(directory, cfg.verify.model, card, card_rows(card))


def _transformers(cfg: Config, directory: Path, card: dict[str, Any]) -> Measured:
  return measure_merged(Path(cfg.verify.model or directory), card, card_rows(card))


def _llama_cpp(cfg: Config, directory: Path, card: dict[str, Any]) -> Measured:
  adapter = directory / ADAPTER_FILE
  with llama_server(_gguf_model(cfg, directory), adapter if adapter.is_file() else None) as url:
    client = CompletionsClient(url, None)
    bare = CompletionsClient(url, None, {"lora": [{"id": 0, "scale": 0.0}]}) if adapter.is_file() else None
    return _asked(client, bare, card, cfg.verify.tolerance)


def _url(cfg: Config, directory: Path, card: dict[str, Any]) -> Measured:
  url, name = str(cfg.verify.url), cfg.verify.base
  bare = CompletionsClient(url, name) if name is not None else None
  return _asked(CompletionsClient(url, cfg.verify.model), bare, card, cfg.verify.tolerance)


def _asked(
  client: CompletionsClient, bare: CompletionsClient | None, card: dict[str, Any], tolerance: float
) -> Measured:
  """What a server computes, and its base if that can be asked for."""
  rows, texts = card_rows(card), [prompt["tokens"] for prompt in card["prompts"]]
  adapted = client.logprobs(rows, texts)
  right = diagnose(card, Measured(adapted), tolerance).largest <= tolerance
  base = None if bare is None or right else bare.logprobs(rows, texts)  # tells a wrong base from a wrong adapter
  return Measured(adapted, base, template_problem(client, card))


def _file(cfg: Config, directory: Path, card: dict[str, Any]) -> Measured:
  file = Path(str(cfg.verify.file))
  if not file.is_file():
    raise InputError(f"verify.file={file}: no such file")
  content, lengths = read_json_object(file), [len(answer) for _, answer in card_rows(card)]
  for name in ("adapted", "base"):
    rows = content.get(name)
    if name == "adapted" and rows is None or rows is not None and not _fits(rows, lengths):
      raise InputError(f"{file}: {name} must be a list of lists of numbers, of the lengths {lengths}")
  return Measured(content["adapted"], content.get("base"))


def _fits(rows: Any, lengths: list[int]) -> bool:
  """Whether `rows` has a number or null for every token."""
  if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
    return False
  numbers = all(x is None or isinstance(x, int | float) for row in rows for x in row)
  return numbers and [len(row) for row in rows] == lengths


def _gguf_model(cfg: Config, directory: Path) -> Path:
  """The GGUF model to serve: `verify.model`, model.gguf in the directory, or the one that the Modelfile names."""
  if cfg.verify.model is not None:
    candidates = [Path(cfg.verify.model)]
  else:
    modelfile = directory / MODELFILE
    lines = modelfile.read_text(encoding="utf-8").splitlines() if modelfile.is_file() else []
    named = [directory / line.removeprefix("FROM ").strip() for line in lines if line.startswith("FROM ")]
    candidates = [directory / MODEL_FILE, *named]
  found = next((path for path in candidates if path.is_file()), None)
  if found is None:
    raise InputError(f"verify.model: {candidates[-1]} does not exist; give the base as GGUF, written with task=export "
                     "format=gguf_base")
  return found


MEASURES = {"peft": _peft, "transformers": _transformers, "llama_cpp": _llama_cpp, "url": _url, "file": _file}
