"""`task=dashboard run=DIR`: a wandb workspace of a sweep or a run, saved where there is a key, and a file otherwise.

It shows the loss against steps and tokens, a line for each setting; what each setting's parameters buy; parallel
coordinates of what varies; and a table of the runs. wandb draws it from what the runs have sent.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_exp.config import Config, InputError, LoraExpError
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.grouping.setting_keys import varied_keys
from lora_exp.report.reading.run_reader import flatten_settings, read_sweep
from lora_exp.report.reading.run_record import SEEDS, RunRecord
from lora_exp.runtime import console
from lora_exp.runtime.run_files import CONFIG
from lora_exp.runtime.saved_config import load_config
from lora_exp.runtime.sweep_directory import sweep_trial
from lora_exp.train.logger import wandb_mode

SPEC = Path("wandb") / "dashboard.json"
LOSS, TRAINABLE, FORGETTING = "eval/loss", "parameters.trainable", "losses.forgetting"  # in the summary of a run
KINDS = ("lora.scaling", "lora.init", "lora.lr_ratio", "lora.quant")  # that tell methods of one lora.method apart
CURVES = {"eval": "Held-out loss", "train": "Training loss", "retain": "Loss on the retained text"}
MOST_RUNS = 100  # lines of a plot
SECONDS = 45.0  # of waiting for the server, all requests together


@dataclass
class Subject:
  """What the workspace is about."""

  name: str  # of the sweep or run
  home: Path  # the directory that holds wandb/ with its runs
  project: str
  runs: tuple[str, str]  # (attribute of a run, its value): the runs that are shown
  settings: list[str]  # that tell its runs apart, seeds aside
  columns: list[str]  # settings that a person wants to see, with those
  retain: bool  # whether forgetting is watched


def run(cfg: Config) -> None:
  """Builds the workspace of `cfg.run`, writes it there as JSON, and saves it online where there is a key."""
  directory = Path(str(cfg.run))
  subject = subject_of(directory)
  spec = json.loads(workspace(subject, "")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
  path = directory / SPEC
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({"name": subject.name, "project": subject.project, "spec": spec}, indent=2) + "\n")
  console.show(f"Workspace of {subject.name}: {_short(path)}")
  sync = f"wandb sync {_short(subject.home)}/wandb/offline-run-*"
  if wandb_mode(cfg.logger.mode) != "online":
    console.show("Not saved online, as there is no key, or wandb is set to be offline. Later: set WANDB_API_KEY or type "
                f"`wandb login`, then\n  {sync}\n  python -m lora_exp task=dashboard run={_short(directory)}")
    return
  console.show(f"Saved: {within(SECONDS, lambda: saved(subject))}")
  if offline := len(list((subject.home / "wandb").glob("offline-run-*"))):
    console.show(f"Runs logged offline ({offline}) are shown there once they are sent: {sync}")


def _short(path: Path) -> Path:
  """A path as a person would type it here."""
  return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def subject_of(directory: Path) -> Subject:
  """What is known of the sweep or run in `directory` from its files. Raises InputError if that is neither."""
  one = (directory / CONFIG).is_file()
  if one:
    trials = [RunRecord(0, directory.name, "done", None, flatten_settings(asdict(load_config(str(directory)))))]
  else:
    trials = [trial for trial in read_sweep(directory) if trial.config]
  logged = [trial for trial in trials if trial.config.get("logger.name") == "wandb"]
  if not logged:
    raise InputError(f"run={directory}: was trained with logger=none, so wandb has nothing of it to show")
  first = logged[0].config
  place = sweep_trial(directory) if one else None
  name = place.name(first["lora.method"]) if place else directory.name
  columns = [key for key in varied_keys(trials) if key not in SEEDS]
  settings = [] if one else _telling(trials, columns)
  usual = ["lora.method", "lora.rank", "lora.alpha", "lora.targets", "optim.lr"]
  shown = [key for key in usual if any(trial.config.get(key) is not None for trial in trials)]
  return Subject(
    name=name,
    home=place.sweep if place else directory,
    project=first["logger.project"],
    runs=("Name", name) if one else ("Group", first.get("logger.group") or name),
    settings=settings,
    columns=list(dict.fromkeys([*shown, *settings])),
    retain=any("retain.source" in trial.config for trial in trials),
  )


def _telling(trials: Sequence[RunRecord], columns: Sequence[str]) -> list[str]:
  """The settings by which wandb is to group the runs, so that seeds alone are in one group."""
  keys = make_groups(trials)[0].keys
  kinds = [key for key in KINDS if key in columns] if "method" in keys else []
  methods = {trial.config.get("lora.method") for trial in trials}
  adapted = any(trial.method.adapts_kernels for trial in trials)
  return [*(["lora.method"] if len(methods) > 1 and adapted else []), *kinds, *(key for key in keys if key != "method")]


def workspace(subject: Subject, entity: str) -> Any:
  """The workspace (wandb_workspaces.workspaces.Workspace) of `subject`, in the account `entity`."""
  import wandb_workspaces.reports.v2 as wr
  import wandb_workspaces.workspaces as ws
  from wandb_workspaces import expr

  attribute, value = subject.runs
  return ws.Workspace(
    entity=entity,
    project=subject.project,
    name=f"{subject.name}: how few parameters, and where",
    sections=[
      ws.Section(name="Loss", panels=_curves(wr, subject), is_open=True),
      ws.Section(name="What the parameters buy", panels=_tradeoffs(wr, subject), is_open=True),
      ws.Section(name="Settings", panels=_settings(wr, subject), is_open=True),
    ],
    settings=ws.WorkspaceSettings(x_axis="step", max_runs=MOST_RUNS),
    runset_settings=ws.RunsetSettings(
      filters=expr.And(expr.Metric(attribute) == value),
      groupby=[expr.Config(key) for key in subject.settings],
      order=[expr.Ordering(expr.Summary(LOSS), ascending=True)],
      pinned_columns=[
        "run:displayName", *(_column(key) for key in subject.columns), _column("train.seed"),
        f"summary:{TRAINABLE}", f"summary:{LOSS}", *([f"summary:{FORGETTING}"] if subject.retain else []),
      ],
    ),
  )  # fmt: skip


def _column(key: str) -> str:
  """A setting as a column of the table of runs: config:lora.value.rank."""
  group, dot, rest = key.partition(".")
  return f"config:{group}.value{dot}{rest}"


def _curves(wr: Any, subject: Subject) -> list[Any]:
  """Each loss against steps and against tokens; the workspace's groups are the lines."""
  layout = lambda x, y: wr.Layout(x=12 * x, y=6 * y, w=12, h=6)
  panels = []
  for y, (split, title) in enumerate(CURVES.items()):
    if split == "retain" and not subject.retain:
      continue
    for x, (axis, metric) in enumerate((("step", f"{split}/loss"), ("tokens", f"loss_by_tokens/{split}"))):
      panels.append(wr.LinePlot(title=f"{title} against {axis}s".replace("tokenss", "tokens"), x=wr.Metric(axis),
                                y=[wr.Metric(metric)], title_y="loss", max_runs_to_show=MOST_RUNS,
                                layout=layout(x, y)))
  return panels


def _tradeoffs(wr: Any, subject: Subject) -> list[Any]:
  """Held-out loss against trainable parameters, and against forgetting."""
  loss = wr.SummaryMetric(LOSS)  # a plain string would be taken for a summary key as well, and say nothing
  panels = [wr.ScatterPlot(title="Held-out loss against trainable parameters", x=wr.SummaryMetric(TRAINABLE), y=loss,
                           log_x=True, running_ymin=True, layout=wr.Layout(w=12, h=8))]
  if subject.retain:
    panels.append(wr.ScatterPlot(title="Held-out loss against forgetting", x=wr.SummaryMetric(FORGETTING), y=loss,
                                 layout=wr.Layout(x=12, w=12, h=8)))
  return panels


def _settings(wr: Any, subject: Subject) -> list[Any]:
  """A line for each run through its settings to its loss; what the loss depends on; the settings that differ."""
  column = wr.ParallelCoordinatesPlotColumn
  logarithmic = ("lora.rank", "optim.lr", "lora.alpha")
  lines = [column(wr.Config(key), display_name=key, log=key in logarithmic or None) for key in subject.columns]
  lines += [column(wr.SummaryMetric(TRAINABLE), display_name="trainable", log=True),
            column(wr.SummaryMetric(LOSS), display_name="held-out loss")]
  panels = [wr.ParallelCoordinatesPlot(title="From settings to held-out loss", columns=lines,
                                       layout=wr.Layout(w=24, h=9))]
  if subject.settings:
    panels += [wr.ParameterImportancePlot(with_respect_to=LOSS, layout=wr.Layout(y=9, w=12, h=8)),
               wr.RunComparer(diff_only="split", layout=wr.Layout(x=12, y=9, w=12, h=8))]
  return panels


def saved(subject: Subject) -> str:
  """Saves the workspace under the account of the key; its address."""
  os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
  os.environ.setdefault("WANDB_SILENT", "true")
  import wandb

  entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
  if not entity:
    raise InputError("wandb: the key has no default account; set WANDB_ENTITY")
  made = workspace(subject, entity)
  made.save()
  return str(made.url)


def within(seconds: float, work: Callable[[], str]) -> str:
  """What `work` returns; raises LoraExpError where it fails, or takes longer: wandb itself waits for minutes."""
  found: list[str | Exception] = []

  def kept() -> None:
    try:
      found.append(work())
    except Exception as error:  # whatever wandb raises
      found.append(error)

  thread = threading.Thread(target=kept, name="dashboard", daemon=True)
  thread.start()
  thread.join(seconds)
  [result] = found or [LoraExpError(f"no answer within {seconds:.0f} s")]
  if isinstance(result, InputError):
    raise result
  if isinstance(result, Exception):
    why = " ".join(str(result).split())
    raise LoraExpError(f"wandb: the workspace could not be saved ({why}); it is in {SPEC}; give this command again "
                       "when the server can be reached and has the runs")
  return result
