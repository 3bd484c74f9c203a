"""Detection of run and sweep directories."""

from pathlib import Path

from lora_exp.runtime.run_files import CONFIG


def run_directory_problem(setting: str, directory: str) -> str | None:
  """Why the directory given by `setting` is not a run, or None."""
  if not Path(directory).is_dir():
    return f"{setting}={directory}: no such directory; give a run directory, such as outputs/DAY/TIME-NAME"
  if not (Path(directory) / CONFIG).is_file():
    return f"{setting}={directory}: contains no run (no {CONFIG}); give a run directory, such as outputs/DAY/TIME-NAME"
  return None


def is_sweep(directory: str) -> bool:
  """Whether `directory` contains runs without being one itself."""
  path = Path(directory)
  return not (path / CONFIG).is_file() and any(path.glob(f"*/{CONFIG}"))
