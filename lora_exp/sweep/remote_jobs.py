"""Jobs of a sweep that another launcher runs, in processes and on machines of their own.

A job is one run, or a pack of runs that train as one program. The launchers give up all jobs when the process of one
dies; here only that job is lost.
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
from lora_exp.sweep.launcher_plugins import PLUGINS
from lora_exp.sweep.ledger import Ledger, Outcome

Jobs = Sequence[Sequence[str]]  # the overrides of each
End = JobReturn | Exception  # an exception if the process of the job died


def launch(launcher: Any, jobs: Jobs, first: int, runs: Sequence[Sequence[Outcome]], sweep: Path) -> list[Outcome]:
  """Runs `jobs`, numbered from `first`, with the launcher of a plugin; shows and returns how their runs ended.

  `runs` are those that each job trains into the directory `sweep`.
  """
  gather = {"Joblib": _joblib, "Ray": _ray, "Slurm": _submitit, "Local": _submitit}
  kind = f"{type(launcher).__module__}.{type(launcher).__qualname__}"
  [ends] = [gather[name] for name, (plugin, _) in PLUGINS.items() if plugin == kind]
  found = []
  for end, own in zip(ends(launcher, jobs, first), runs, strict=True):
    for outcome in outcomes(end, own, Ledger(sweep)):
      found.append(outcome)
      if outcome.code == DONE:
        console.show(f"run {outcome.number}: done")
      elif outcome.code == StoppedError.code:
        console.show_warning(f"run {outcome.number}: {outcome.reason}")
      else:
        console.show_error(LoraExpError(f"run {outcome.number}: {outcome.reason}"))
  return found


def _joblib(launcher: Any, jobs: Jobs, first: int) -> Iterable[End]:
  """Runs jobs in joblib's pool, which a process that dies breaks with all its jobs.

  Each half then runs again, skipping the runs that have ended, until the job that died is alone.
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
      ray.cancel(task)  # as Ctrl-C: after a checkpoint
    ray.wait(tasks, num_returns=len(tasks), timeout=60)
    raise
  finally:
    ray.shutdown()


def _require_cluster(address: str) -> None:
  """Raises InputError at once where Ray would retry for minutes."""
  host, _, port = address.removeprefix("ray://").rpartition(":")
  if not port.isdecimal():  # local, auto, or none
    return
  try:
    socket.create_connection((host, int(port)), timeout=10).close()
  except OSError as error:
    start = f"ray start --head --port={port}"
    raise InputError(f"{address}: no Ray cluster answers ({error}); {start}, or leave the address out") from error


def _submitit(launcher: Any, jobs: Jobs, first: int) -> Iterable[End]:
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
  try:
    found: JobReturn = get()
    return found
  except Exception as error:  # any error of the cluster about a job that it lost
    return error


def outcomes(end: End, runs: Sequence[Outcome], ledger: Ledger) -> list[Outcome]:
  """How the `runs` of one job ended; runs that died with its process are recorded as lost."""
  if isinstance(end, JobReturn) and end.status == JobStatus.COMPLETED:
    value = end.return_value
    return value if isinstance(value, list) else [value]
  error = end._return_value if isinstance(end, JobReturn) else end  # raised by the job, or the death of its process
  code = error.code if isinstance(error, LoraExpError) else BUG
  reason = f"{'a bug' if error is not end else 'its process died'}: {sentence(error)}"
  found = []
  for run in runs:
    if (outcome := ledger.outcome(run.number, run.overrides)) is None:
      outcome = replace(run, code=code, reason=str(error) if isinstance(error, LoraExpError) else reason)
      ledger.add("lost", trial=run.number, reason=outcome.reason)
    found.append(outcome)
  return found


def sentence(error: BaseException) -> str:
  """The type of an error and the first line of its message; the last line, if the message is a traceback."""
  lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
  if any(line.endswith("Traceback (most recent call last):") for line in lines):
    return lines[-1][:300]
  return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
