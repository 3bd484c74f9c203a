"""Rejects values that look like credentials, because configs are written to disk, to logs and to wandb."""

import re

CREDENTIALS = {
  "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
  "a wandb key": re.compile(r"^[0-9a-f]{40}$|\bwandb_v1_\w{16,}"),
  "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
  "a GitHub token": re.compile(r"\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"),
  "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{12,}"),
  "a password in a URL": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
}


def credential(value: str) -> str | None:
  """The kind of credential that `value` looks like ('an AWS key'), or None."""
  for kind, pattern in CREDENTIALS.items():
    if pattern.search(value):
      return kind
  return None


def credential_problem(path: str, value: str) -> list[str]:
  """The problem with a credential in a config, as a list of at most one line; the value is not repeated."""
  kind = credential(value)
  if kind is None:
    return []
  return [f"{path}: its value looks like {kind}, and configs are written to disk; "
          "remove it here and give it in an environment variable (WANDB_API_KEY, HF_TOKEN)"]
