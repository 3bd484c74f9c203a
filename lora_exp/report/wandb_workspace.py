"""A wandb workspace of a sweep or a run: the selection of runs, and the panels, which wandb draws from the logged runs.

It shows the loss against steps and tokens, one line per setting; the loss against trainable parameters; parallel
coordinates of the varied settings; and a table of the runs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_exp.config import InputError
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.grouping.setting_keys import ALPHA, METHOD, RANK, RATE, TARGETS, varied_keys
from lora_exp.report.reading.run_reader import flatten_settings, read_sweep
from lora_exp.report.reading.run_record import SEEDS, RunRecord
from lora_exp.runtime.run_files import CONFIG
from lora_exp.runtime.saved_config import load_config
from lora_exp.runtime.sweep_directory import sweep_trial

LOSS, TRAINABLE, FORGETTING = "eval/loss", "parameters.trainable", "losses.forgetting"  # in the summary of a run
METHOD_KEY = "lora.method"
USUAL_COLUMNS = (METHOD_KEY, RANK, ALPHA, TARGETS, RATE)
VARIANT_KEYS = ("lora.scaling", "lora.init", "lora.lr_ratio", "lora.quant")  # define variants of a lora.method
CURVES = {"eval": "Held-out loss", "train": "Training loss", "retain": "Loss on the retained text"}
MOST_RUNS = 100  # maximum number of lines in a plot


@dataclass(frozen=True)
class WorkspaceContents:
  """The contents of a workspace."""

  name: str  # name of the sweep or run
  home: Path  # the directory that contains wandb/ with its runs
  project: str
  runs: tuple[str, str]  # (attribute of a run, its value): selects the runs
  settings: list[str]  # settings that distinguish the runs, without seeds
  columns: list[str]  # columns of the table: the usual settings, and those in `settings`
  retain: bool  # whether forgetting was measured


def workspace_contents(directory: Path) -> WorkspaceContents:
  """The contents for the sweep or run in `directory`. Raises InputError if it is neither, or did not log to wandb."""
  is_run = (directory / CONFIG).is_file()
  if is_run:
    runs = [RunRecord(0, directory.name, "done", None, flatten_settings(asdict(load_config(str(directory)))))]
  else:
    runs = [run for run in read_sweep(directory) if run.config]
  logged = [run for run in runs if "wandb" in str(run.config.get("logger.name")).split(",")]
  if not logged:
    raise InputError(f"run={directory}: was trained without logger=wandb, so wandb has no data to show")
  first = logged[0].config
  trial = sweep_trial(directory) if is_run else None
  name = trial.name(first[METHOD_KEY]) if trial else directory.name
  settings = [] if is_run else _group_keys(runs)
  usual = [key for key in USUAL_COLUMNS if any(run.config.get(key) is not None for run in runs)]
  return WorkspaceContents(
    name=name,
    home=trial.sweep if trial else directory,
    project=first["logger.project"],
    runs=("Name", name) if is_run else ("Group", first.get("logger.group") or name),
    settings=settings,
    columns=list(dict.fromkeys([*usual, *settings])),
    retain=any("retain.source" in run.config for run in runs),
  )


def _group_keys(runs: Sequence[RunRecord]) -> list[str]:
  """The keys by which wandb groups the runs, so that the runs of a group differ only in their seeds."""
  keys = make_groups(runs)[0].keys
  varied = [key for key in varied_keys(runs) if key not in SEEDS]
  variants = [key for key in VARIANT_KEYS if key in varied] if METHOD in keys else []
  several = len({run.config.get(METHOD_KEY) for run in runs}) > 1
  by_method = [METHOD_KEY] if several and any(run.method.adapts_kernels for run in runs) else []
  return [*by_method, *variants, *(key for key in keys if key != METHOD)]


def build_workspace(contents: WorkspaceContents, entity: str) -> Any:
  """The workspace (wandb_workspaces.workspaces.Workspace) of `contents`, in the wandb account `entity`."""
  import wandb_workspaces.reports.v2 as wr
  import wandb_workspaces.workspaces as ws
  from wandb_workspaces import expr

  attribute, value = contents.runs
  return ws.Workspace(
    entity=entity,
    project=contents.project,
    name=f"{contents.name}: how few parameters, and where",
    sections=[
      ws.Section(name="Loss", panels=_curves(wr, contents), is_open=True),
      ws.Section(name="Loss against parameters and forgetting", panels=_tradeoffs(wr, contents), is_open=True),
      ws.Section(name="Settings", panels=_settings(wr, contents), is_open=True),
    ],
    settings=ws.WorkspaceSettings(x_axis="step", max_runs=MOST_RUNS),
    runset_settings=ws.RunsetSettings(
      filters=expr.And(expr.Metric(attribute) == value),
      groupby=[expr.Config(key) for key in contents.settings],
      order=[expr.Ordering(expr.Summary(LOSS), ascending=True)],
      pinned_columns=[
        "run:displayName", *(_column(key) for key in contents.columns), _column("train.seed"),
        f"summary:{TRAINABLE}", f"summary:{LOSS}", *([f"summary:{FORGETTING}"] if contents.retain else []),
      ],
    ),
  )  # fmt: skip


def _column(key: str) -> str:
  """A setting as a column of the table of runs: config:lora.value.rank."""
  group, dot, rest = key.partition(".")
  return f"config:{group}.value{dot}{rest}"


def _curves(wr: Any, contents: WorkspaceContents) -> list[Any]:
  """Each loss against steps and against tokens, one line per group."""
  panels = []
  for y, (split, title) in enumerate(CURVES.items()):
    if split == "retain" and not contents.retain:
      continue
    for x, (axis, metric) in enumerate((("step", f"{split}/loss"), ("tokens", f"loss_by_tokens/{split}"))):
      panels.append(wr.LinePlot(title=f"{title} against {axis}s".replace("tokenss", "tokens"), x=wr.Metric(axis),
                                y=[wr.Metric(metric)], title_y="loss", max_runs_to_show=MOST_RUNS,
                                layout=wr.Layout(x=12 * x, y=6 * y, w=12, h=6)))
  return panels


def _tradeoffs(wr: Any, contents: WorkspaceContents) -> list[Any]:
  """Held-out loss against trainable parameters, and against forgetting."""
  loss = wr.SummaryMetric(LOSS)  # a plain string would be read as a summary key too, and plot nothing
  panels = [wr.ScatterPlot(title="Held-out loss against trainable parameters", x=wr.SummaryMetric(TRAINABLE), y=loss,
                           log_x=True, running_ymin=True, layout=wr.Layout(w=12, h=8))]
  if contents.retain:
    panels.append(wr.ScatterPlot(title="Held-out loss against forgetting", x=wr.SummaryMetric(FORGETTING), y=loss,
                                 layout=wr.Layout(x=12, w=12, h=8)))
  return panels


def _settings(wr: Any, contents: WorkspaceContents) -> list[Any]:
  """Parallel coordinates of the runs and, if settings vary, their importance and a table of differences."""
  column = wr.ParallelCoordinatesPlotColumn
  logarithmic = ("lora.rank", "optim.lr", "lora.alpha")
  lines = [column(wr.Config(key), display_name=key, log=key in logarithmic or None) for key in contents.columns]
  lines += [column(wr.SummaryMetric(TRAINABLE), display_name="trainable", log=True),
            column(wr.SummaryMetric(LOSS), display_name="held-out loss")]
  panels = [wr.ParallelCoordinatesPlot(title="From settings to held-out loss", columns=lines,
                                       layout=wr.Layout(w=24, h=9))]
  if contents.settings:
    panels += [wr.ParameterImportancePlot(with_respect_to=LOSS, layout=wr.Layout(y=9, w=12, h=8)),
               wr.RunComparer(diff_only="split", layout=wr.Layout(x=12, y=9, w=12, h=8))]
  return panels
