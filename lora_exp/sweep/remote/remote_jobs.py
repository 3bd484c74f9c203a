"""Jobs of a sweep that a Hydra plugin runs in other processes or on other machines.

A job is a run, or a pack of runs that train as one program. If the process of one job dies, the plugins lose all jobs;
here only that job is lost.
"""

import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import open_dict

from lora_exp.config import InputError, LoraExpError, StoppedError
from lora_exp.config.errors import BUG, DONE
from lora_exp.runtime import console
from lora_exp.sweep.ledger import Ledger, Outcome
from lora_exp.sweep.remote.launcher_plugins import PLUGINS

Jobs = Sequence[Sequence[str]]  # the overrides of each job
End = JobReturn | Exception  # an exception if the job's process died


def launch(launcher: Any, jobs: Jobs, first: int, runs: Sequence[Sequence[Outcome]], sweep: Path) -> list[Outcome]:
  """Runs `jobs`, numbered from `first`, with a plugin's launcher. Shows and returns how their runs ended.

  `runs` has the runs of each job. They are trained in the directory `sweep`.
  """
  gather = {"Joblib": _joblib, "Ray": _ray, "Slurm": _submitit, "Local": _submitit}
  kind = f"{type(launcher).__module__}.{type(launcher).__qualname__}"
  [ends] = [gather[name] for name, (plugin, _) in PLUGINS.items() if plugin == kind]
  ended = []
  for end, job_runs in zip(ends(launcher, jobs, first), runs, strict=True):
    for outcome in outcomes(end, job_runs, Ledger(sweep)):
      ended.append(outcome)
      if outcome.code == DONE:
        console.show(f"run {outcome.number}: done")
      elif outcome.code == StoppedError.code:
        console.show_warning(f"run {outcome.number}: {outcome.reason}")
      else:
        console.show_error(LoraExpError(f"run {outcome.number}: {outcome.reason}"))
  return ended


def _joblib(launcher: Any, jobs: Jobs, first: int) -> Iterable[End]:
  """Runs jobs in joblib's pool. If a process dies, the pool breaks and all its jobs are lost.

  Each half of the jobs is then run again, without the runs that have ended, until the failing job is isolated.
  """
  from joblib.externals.loky.process_executor import BrokenProcessPool

  try:
    return list(launcher.launch(jobs, first))
  except (BrokenProcessPool, TimeoutError) as error:
    if len(jobs) == 1:
      return [error]
    half = len(jobs) // 2
    return [*_joblib(launcher, jobs[:half], first), *_joblib(launcher, jobs[half:], first + half)]


def _ray(launcher: Any, jobs: Jobs, first: int) -> Iterable[End]:
  """Runs jobs as tasks of a Ray cluster."""
  _require_cluster(launcher.ray_cfg.init.get("address") or os.environ.get("RAY_ADDRESS") or "")
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
  import ray
  from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray, start_ray

  setup_globals()
  context = launcher.hydra_context
  start_ray(launcher.ray_cfg.init)
  tasks = []
  try:
    for number, texts in enumerate(jobs, first):
      cfg = context.config_loader.load_sweep_config(launcher.config, list(texts))
      with open_dict(cfg):
        cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
      task, state = launcher.task_function, Singleton.get_state()
      tasks.append(launch_job_on_ray(context, launcher.ray_cfg.remote, cfg, task, state))
    for task in tasks:
      yield _end(partial(ray.get, task))
  except KeyboardInterrupt:
    for task in tasks:
      ray.cancel(task)  # like Ctrl-C: the run stops after a checkpoint
    ray.wait(tasks, num_returns=len(tasks), timeout=60)
    raise
  finally:
    ray.shutdown()


def _require_cluster(address: str) -> None:
  """Raises InputError if the cluster cannot be reached. Ray itself would retry for minutes."""
  host, _, port = address.removeprefix("ray://").rpartition(":")
  if not port.isdecimal():  # local, auto, or none
    return
  try:
    socket.create_connection((host, int(port)), timeout=10).close()
  except OSError as error:
    start = f"ray start --head --port={port}"
    problem = f"{address}: the Ray cluster does not respond ({error}); use {start}, or omit the address"
    raise InputError(problem) from error


def _submitit(launcher: Any, jobs: Jobs, first: int) -> Iterable[End]:
  """Runs jobs on SLURM, or in local processes, with submitit."""
  import submitit
  from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

  cluster, params = launcher._EXECUTOR, dict(launcher.params)
  executor = submitit.AutoExecutor(
    params.pop("submitit_folder"), cluster=cluster, slurm_max_num_timeout=params.pop("max_num_timeout", 0)
  )
  shared = {field.name for field in fields(BaseQueueConf)}
  executor.update_parameters(**{key if key in shared else f"{cluster}_{key}": v for key, v in params.items()})
  state = Singleton.get_state()
  each = [(list(texts), "hydra.sweep.dir", number, str(number), state) for number, texts in enumerate(jobs, first)]
  queued = executor.map_array(launcher, *zip(*each, strict=True))
  for job in queued:
    yield _end(job.task(0).result)


def _end(get: Callable[[], Any]) -> End:
  """The result of a job, or the error with which the cluster reports that the job was lost."""
  try:
    result: JobReturn = get()
    return result
  except Exception as error:
    return error


def outcomes(end: End, runs: Sequence[Outcome], ledger: Ledger) -> list[Outcome]:
  """How the `runs` of one job ended. If its process died, runs that have not ended are recorded as lost."""
  if isinstance(end, JobReturn) and end.status == JobStatus.COMPLETED:
    value = end.return_value
    return value if isinstance(value, list) else [value]
  error = end._return_value if isinstance(end, JobReturn) else end  # raised by the job, or because its process died
  code = error.code if isinstance(error, LoraExpError) else BUG
  reason = f"{'a bug' if error is not end else 'its process died'}: {sentence(error)}"
  ended = []
  for run in runs:
    if (outcome := ledger.outcome(run.number, run.overrides)) is None:
      outcome = replace(run, code=code, reason=str(error) if isinstance(error, LoraExpError) else reason)
      ledger.add("lost", trial=run.number, reason=outcome.reason)
    ended.append(outcome)
  return ended


def sentence(error: BaseException) -> str:
  """The type of an error and the first line of its message, or the last line of a traceback."""
  lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
  if any(line.endswith("Traceback (most recent call last):") for line in lines):
    return lines[-1][:300]
  return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
