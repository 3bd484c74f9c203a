"""SHA-256 checksums of the files below a directory, in a file that `sha256sum -c` reads."""

import hashlib
from pathlib import Path

from lora_exp.runtime.files import sync_path

SUMS = "SHA256SUMS"


def write_sums(folder: Path, sync: bool = False) -> None:
  """Writes `folder`/SHA256SUMS, the checksums of all other files. With `sync`, everything is flushed to disk."""
  (folder / SUMS).write_text(sums_text(file_digests(folder, sync)), encoding="utf-8")
  if sync:
    sync_path(folder / SUMS)
    sync_path(folder)


def damage(folder: Path) -> str:
  """How the files in `folder` differ from its SHA256SUMS; '' if they do not."""
  try:
    digests = file_digests(folder)
    recorded = (folder / SUMS).read_bytes().decode(errors="replace")
  except OSError as error:
    return str(error)
  if recorded == sums_text(digests):
    return ""
  sums = {name: digest for digest, _, name in (line.partition("  ") for line in recorded.splitlines())}
  changed = [name for name in sums if name in digests and sums[name] != digests[name]]
  missing = [name for name in sums if name not in digests]
  added = [name for name in digests if name not in sums]
  groups = (("changed:", changed), ("missing:", missing), (f"not in {SUMS}:", added))
  parts = [f"{label} {', '.join(names)}" for label, names in groups if names]
  return "; ".join(parts) or f"changed: {SUMS}"


def sums_text(digests: dict[str, str]) -> str:
  """The content of SHA256SUMS."""
  return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def file_digests(folder: Path, sync: bool = False) -> dict[str, str]:
  """SHA-256 (hex) of every file below `folder` except SHA256SUMS. With `sync`, each file is flushed to disk first."""
  digests = {}
  for path in sorted(folder.rglob("*")):
    if sync:
      sync_path(path)
    if path.is_file() and path != folder / SUMS:
      with open(path, "rb") as file:
        digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
  return digests
