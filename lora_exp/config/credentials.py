"""Rejects values that look like credentials, because configs are written to disk, to logs and to wandb."""

import os
import re

CREDENTIALS = {
  "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
  "a wandb key": re.compile(r"^[0-9a-f]{40}$|\bwandb_v1_\w{16,}"),
  "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
  "a GitHub token": re.compile(r"\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"),
  "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{12,}"),
  "a password in a URL": re.compile(r"://[^/\s:@]*:[^/\s@]+@"),
}
SECRET_NAME = r"(?:^|_)(?:(?:API)?KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|CREDENTIALS?)S?(?:$|_(?!FILE|PATH|DIR))"
SECRET_VARIABLE = re.compile(SECRET_NAME, re.IGNORECASE)  # names of environment variables with secrets
LEAST_SECRET = 8  # characters; a shorter value may be part of any text
ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^},]*)")  # OmegaConf's interpolation of a variable
HIDDEN = "[hidden]"


def credential(value: str) -> str | None:
  """The kind of credential that `value` looks like ('an AWS key'), or None."""
  for kind, pattern in CREDENTIALS.items():
    if pattern.search(value):
      return kind
  for name, secret in _secret_variables().items():
    if secret in value:
      return f"the value of the environment variable {name}"
  return None


def credential_problem(path: str, value: str) -> list[str]:
  """The problem with a credential in a config, as a list of at most one line; the value is not repeated."""
  kind = credential(value)
  if kind is None:
    return []
  return [f"{path}: its value looks like {kind}, and configs are written to disk; "
          "remove it here and give it in an environment variable (WANDB_API_KEY, HF_TOKEN)"]


def environment_problem(path: str, value: str) -> list[str]:
  """The problem with a `value` that interpolates a secret environment variable, in the form of `credential_problem`.

  The name of the variable may itself be an interpolation, which is refused.
  """
  for name in ENVIRONMENT.findall(value):
    if "$" in name or SECRET_VARIABLE.search(name.strip(" \"'")):
      return [f"{path}: reads the environment variable {name}, and configs are written to disk; remove it"]
  return []


def without_secrets(text: str) -> str:
  """`text`, such as the message of a library's error, without credentials."""
  for kind, pattern in CREDENTIALS.items():
    if kind == "a password in a URL":
      text = pattern.sub(f"://{HIDDEN}@", text)
    elif not kind.startswith("a wandb"):
      text = pattern.sub(HIDDEN, text)
  for secret in _secret_variables().values():
    text = text.replace(secret, HIDDEN)
  return text


def _secret_variables() -> dict[str, str]:
  """The environment variables whose names say that they are secret, except paths of files with secrets."""
  named = {name: value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)}
  return {name: value for name, value in named.items() if len(value) >= LEAST_SECRET and value[0] not in "/~"}
