"""README.md of exported files: a model card in the format of the Hugging Face Hub."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_exp.config import Config
from lora_exp.config.metrics import METRICS
from lora_exp.lora import methods
from lora_exp.models.weights.locate import base_name, is_path
from lora_exp.report.estimation.held_out_text import text_covariance
from lora_exp.report.reading.document_losses import read_document_losses
from lora_exp.runtime.json_files import read_json_object
from lora_exp.runtime.run_files import HYDRA, OVERRIDES, SUMMARY
from lora_exp.runtime.yaml_text import safe_load
from lora_exp.train.serving.served_adapter import ServedAdapter

MODEL_CARD = "README.md"
Z95 = 1.96  # half-width of a 95 % interval, in standard errors


def model_card(cfg: Config, served: ServedAdapter | None, library: str, notes: list[str]) -> str:
  """The text of the card: data, base, method, rank, targets, metrics, command and versions.

  `served` is None for a merged model. `library` is the program that reads the files, by its name on the hub. `notes`
  are paragraphs on how to use them.
  """
  run = Path(str(cfg.run))
  summary = read_json_object(run / SUMMARY) if (run / SUMMARY).is_file() else {}
  title = f"# {cfg.name}"
  parts = [_front_matter(cfg, library), title, _sentence(cfg), *notes, _table("Training", _training_rows(cfg, summary))]
  if served is not None:
    parts.append(_table("Adapter", _adapter_rows(cfg, served)))
  parts += [_table("Results", _metric_rows(run, summary)), _command(run)]
  versions = summary.get("versions", {})
  if versions:
    parts.append("## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()))
  return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(cfg: Config, library: str) -> str:
  """The metadata that the hub reads, as YAML."""
  fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["lora", "lora_exp"]}
  base = _base(cfg)
  if cfg.model.base == "weights" and cfg.model.weights and not is_path(cfg.model.weights):
    fields["base_model"] = base.partition("@")[0]
    fields["base_model_relation"] = "adapter" if library in ("peft", "mlx") else "finetune"
  paths = cfg.data.path if isinstance(cfg.data.path, list) else [cfg.data.path]
  datasets = [path.removeprefix("hub:") for path in paths if isinstance(path, str) and path.startswith("hub:")]
  if datasets:
    fields["datasets"] = datasets
  return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _base(cfg: Config) -> str:
  """The base in words: its hub id or directory, or how it was made."""
  if cfg.model.weights and cfg.model.base == "weights":
    name = base_name(cfg.model.weights)
    return Path(name).name if is_path(cfg.model.weights) else name
  return f"a {cfg.model.family} of this run (model.base={cfg.model.base})"


def _sentence(cfg: Config) -> str:
  method = methods.of(cfg.lora)
  return f"{_base(cfg)}, fine-tuned with {method.title} by lora_exp."


def _training_rows(cfg: Config, summary: Mapping[str, Any]) -> dict[str, Any]:
  data = cfg.data
  source = data.source if data.path is None else f"{data.source}: {_names(data.path)}"
  return {"base": _base(cfg), "data": source, "tokens in a row": data.seq_len, "steps": summary.get("steps"),
          "rows in a step": cfg.train.batch_size, "learning rate": f"{cfg.optim.lr:g}", "optimizer": cfg.optim.name,
          "seed": cfg.train.seed}


def _names(path: Any) -> str:
  """The names of files without their directories, which are of no use elsewhere."""
  paths = path if isinstance(path, list) else [path]
  return ", ".join(str(p) if str(p).startswith("hub:") else Path(str(p)).name for p in paths)


def _adapter_rows(cfg: Config, served: ServedAdapter) -> dict[str, Any]:
  rows = served.adapter.rows
  ranks, scales = sorted({row.rank for row in rows}), sorted({row.scale for row in rows})
  targets = dict.fromkeys(".".join(part for part in row.path.split(".")[-2:] if not part.isdigit()) for row in rows)
  facts = {"method": methods.of(cfg.lora).title, "rank": ", ".join(map(str, ranks)) or "-",
           "scale": ", ".join(f"{scale:g}" for scale in scales) or "-", "targets": ", ".join(targets) or "-",
           "trained in full": ", ".join(served.adapter.full) or "nothing"}
  converted = served.conversion
  if converted:
    facts["converted"] = (f"from {converted['from']} by SVD; KL from the original {converted['kl_mean']:.2g} nats over "
                          f"{converted['tokens']:,} held-out tokens")
  return facts


def _metric_rows(run: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
  """Held-out loss of base and adapted model, the gain with its interval over held-out documents, other scores."""
  losses = summary.get("losses") or {}
  rows: dict[str, Any] = {}
  if losses.get("base") is not None and losses.get("best") is not None:
    rows["held-out loss, base (all documents)"] = f"{losses['base']:.4f}"
    rows["held-out loss, adapted (all documents)"] = f"{losses['best']:.4f}"
  rows |= _gains(run, losses.get("exported_step"))
  scores = summary.get("scores") or {}
  before, after = scores.get("base") or {}, scores.get("final") or {}
  for name, value in after.items():
    if isinstance(value, float) and isinstance(before.get(name), float) and name != "loss":
      rows[name] = f"{before[name]:.4g} → {value:.4g}"
  return rows


def _gains(run: Path, step: Any) -> dict[str, str]:
  """The gain in each metric on the documents that score the run, with its 95 % interval over these documents."""
  try:
    by_metric = read_document_losses(run, step) if isinstance(step, int) else {}
  except ValueError:
    return {}
  rows = {}
  for name, losses in by_metric.items():
    gain_D, tokens_D = losses.base - losses.exported, losses.tokens
    error = math.sqrt(float(text_covariance([gain_D], tokens_D)[0, 0]))
    unit = " in nats per token" if name == "loss" else ""
    label = f"gain in {METRICS[name].label}{unit} (documents that did not choose the step, with a 95 % interval)"
    rows[label] = f"{gain_D.sum() / tokens_D.sum():.4f} ± {Z95 * error:.4f}"
  return rows


def _command(run: Path) -> str:
  """The command that trained the run."""
  file = run / HYDRA / OVERRIDES
  if not file.is_file():
    return ""
  try:
    overrides = safe_load(file.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError):
    return ""
  words = [str(word) for word in overrides] if isinstance(overrides, list) else []
  return "## Command\n\n```sh\npython -m lora_exp " + " ".join(map(shlex.quote, words)) + "\n```"


def _table(title: str, rows: Mapping[str, Any]) -> str:
  """A section with a table; empty without rows."""
  if not rows:
    return ""
  lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
  return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
  return "-" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
