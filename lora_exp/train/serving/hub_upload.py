"""Upload of exported files to the Hugging Face Hub (`push=OWNER/NAME`).

The token is that of `hf auth login` or HF_TOKEN; the library reads it, and it is not written or printed here.
"""

from pathlib import Path

from lora_exp.config import InputError, LoraExpError
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import display_path


def upload(directory: Path, repository: str) -> None:
  """Uploads the files in `directory` to `repository`, which is made private if it does not exist.

  Raises InputError without huggingface_hub or without permission, and LoraExpError if the hub cannot be reached. The
  files stay where they are.
  """
  try:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub
  except ImportError:
    raise InputError("push= needs huggingface_hub: pip install 'lora_exp[hub]'") from None
  kept = f"the files are in {display_path(directory)}"
  try:
    api = HfApi()
    url = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, folder_path=directory, commit_message="Upload by lora_exp")
  except hub.OfflineModeIsEnabled:
    raise InputError(f"push={repository}: HF_HUB_OFFLINE is set; unset it; {kept}") from None
  except hub.LocalTokenNotFoundError:
    raise InputError(f"push={repository}: log in with `hf auth login`; {kept}") from None
  except hub.HfHubHTTPError as error:
    status = error.response.status_code
    if status in (401, 403):
      raise InputError(f"push={repository}: the hub refuses it (HTTP {status}); log in with `hf auth login` with a "
                       f"token that may write there; {kept}") from None
    raise LoraExpError(f"push={repository}: the hub answers with HTTP {status}; {kept}") from None
  except httpx.HTTPError as error:
    raise LoraExpError(f"push={repository}: the hub cannot be reached ({type(error).__name__}); {kept}") from None
  console.show(f"Uploaded to {url}")
