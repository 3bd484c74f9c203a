"""MLflow: the server in MLFLOW_TRACKING_URI, otherwise the database mlflow.db here. `mlflow ui` displays it."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from lora_exp.train.logged_run import LoggedRun, named_values

ID = "lora_exp.id"  # the tag by which a resumed run is found
MOST_TEXT = 500  # characters of a parameter


def open_run(run: LoggedRun, warn: Callable[[str], None]) -> "MlflowWriter":
  """Starts the run, or continues the one with its id, and logs its settings as parameters."""
  from mlflow import MlflowClient
  from mlflow.entities import Param

  for name in ("mlflow", "alembic"):  # they report the creation of a database
    logging.getLogger(name).setLevel(logging.WARNING)
  client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
  experiment = client.get_experiment_by_name(run.project)
  experiment_id = experiment.experiment_id if experiment else client.create_experiment(run.project)
  earlier = client.search_runs([experiment_id], f"tags.`{ID}` = '{run.id}'", max_results=1)
  if earlier:
    return MlflowWriter(client, earlier[0].info.run_id)
  tags = {ID: run.id, **dict.fromkeys(run.tags, "true")} | ({"group": run.group} if run.group else {})
  run_id = client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id
  client.log_batch(run_id, params=[Param(key, str(value)[:MOST_TEXT]) for key, value in _flat(run.config).items()])
  return MlflowWriter(client, run_id)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested settings by dotted path."""
  settings: dict[str, Any] = {}
  for key, value in node.items():
    if isinstance(value, Mapping) and value:
      settings |= _flat(value, f"{prefix}{key}.")
    else:
      settings[f"{prefix}{key}"] = value
  return settings


class MlflowWriter:
  """Writes to one run of MLflow."""

  def __init__(self, client: Any, run_id: str):
    self.client, self.run_id = client, run_id

  def log(self, row: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric

    values = {"tokens": row.get("tokens"), **named_values(row)}
    now = int(1000 * time.time())
    metrics = [Metric(name, float(x), now, row["step"]) for name, x in values.items() if isinstance(x, Real)]
    self.client.log_batch(self.run_id, metrics=metrics)

  def summary(self, values: Mapping[str, Any]) -> None:
    for name in ("status", "steps"):
      self.client.set_tag(self.run_id, name, str(values.get(name)))

  def finish(self, exit_code: int) -> None:
    self.client.set_terminated(self.run_id, "FAILED" if exit_code else "FINISHED")
