"""The common facts of a sweep's trials: model, base, data, training, device, versions, day and command."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_exp.report.reading.data_labels import last_part, source_label
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.reading.sweep_command import sweep_command, sweep_day

MOST_VALUES = 3  # maximum number of values of a fact in which the trials differ
SHOWN_VERSIONS = ("lora_exp", "python", "jax", "flax", "optax")
COMMAND = "Command"  # name of the fact that is a command line
Facts = list[tuple[str, str]]  # name, value


def compared(directory: Path, runs: Sequence[RunRecord]) -> Facts:
  """(name, value) of all facts needed to judge or repeat the sweep in `directory`."""
  runs = [run for run in runs if run.config]
  facts = [(name, _values(runs, text)) for name, text in FACTS.items()]
  facts.append(("Day", sweep_day(directory) or _values(runs, _day)))
  facts.append((COMMAND, sweep_command(directory) or ""))
  return [(name, value) for name, value in facts if value]


def _values(runs: Sequence[RunRecord], text: Callable[[RunRecord], str]) -> str:
  """The distinct texts of the runs; the first few if there are many."""
  found = dict.fromkeys(value for value in map(text, runs) if value)
  values = [value for value in found if not any(other != value and other.startswith(value) for other in found)]
  more = [f"and {len(values) - MOST_VALUES} more"] if len(values) > MOST_VALUES else []
  return "; ".join([*values[:MOST_VALUES], *more])


def _model(run: RunRecord) -> str:
  sizes = [_counted(run.config.get("model.layers"), "layer"), f"width {run.config.get('model.width')}"]
  count = _base_parameters(run)
  parameters = [f"{count:,} parameters"] if count is not None else []
  return ", ".join([str(run.config.get("model.family")), *(sizes if run.is_text else []), *parameters])


def _counted(number: Any, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def _base_parameters(run: RunRecord) -> int | None:
  """The number of parameters of the base; None if the run trains only some of them, or adds constants."""
  if run.config.get("lora.train_modules") or run.config.get("lora.bias") not in (None, "none"):
    return None
  adapted = run.method.adapts_kernels
  count = run.number_at("parameters", "frozen" if adapted else "total")
  return None if count is None or (adapted and run.method.has_constants) else int(count)


def _base(run: RunRecord) -> str:
  """The origin of the base's weights. A random base is named as such, because results do not transfer from it."""
  kind = run.config.get("model.base")
  if kind == "random":
    return f"random weights (model.seed={run.config.get('model.seed')}), not a trained model"
  if kind == "weights":
    return f"weights of {last_part(run.config.get('model.weights'))}"
  steps, loss = run.config.get("model.pretrain.steps"), run.base_loss
  known = f"; its held-out loss here is {loss:.4f}" if loss is not None and run.method.trains_nothing else ""
  return f"pretrained for {steps} steps on {source_label(run, 'pretrain_data')}{known}"


def _data(run: RunRecord) -> str:
  retained = source_label(run, "retain")
  return f"{source_label(run, 'data')}{f'; retained text: {retained}' if retained else ''}"


def _held_out(run: RunRecord) -> str:
  """The size of the held-out data, and of the half that scores the trials."""
  count = run.number_at("held_out_tokens")
  if count is None:
    return ""
  size = f"{int(count):,} {'tokens' if run.is_text else 'examples'}"
  if run.scores_share_choice:
    return size
  losses = run.documents.get("loss")
  scored = f"{int(losses.tokens.sum()):,} score" if losses is not None else "one half scores"
  return f"{size}: {scored} the trials, the others choose the best step and tuned values"


def _training(run: RunRecord) -> str:
  if run.method.trains_nothing:
    return ""
  rows, length = run.config.get("train.batch_size"), run.config.get("data.seq_len")
  size = f"{rows} rows of {length} tokens" if run.is_text else f"{rows} examples"
  return f"{run.config.get('train.steps')} steps of {size}; {run.config.get('optim.name')}"


def _device(run: RunRecord) -> str:
  return str(run.summary.get("device") or "")


def _versions(run: RunRecord) -> str:
  versions = run.summary.get("versions")
  if not isinstance(versions, dict):
    return ""
  return ", ".join(f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions)


def _day(run: RunRecord) -> str:
  """YYYY-MM-DD, UTC."""
  return str(run.summary.get("finished") or "")[:10]


FACTS: dict[str, Callable[[RunRecord], str]] = {
  "Model": _model,
  "Base": _base,
  "Data": _data,
  "Held out": _held_out,
  "Training": _training,
  "Device": _device,
  "Versions": _versions,
}
