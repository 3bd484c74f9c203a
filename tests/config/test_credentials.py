"""Values that look like credentials are refused."""


import pytest

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError
from lora_exp.config.credentials import credential


@pytest.mark.parametrize("value", [
  "hf_" + "a1" * 17, "0123456789abcdef" * 2 + "01234567", "sk-" + "x" * 30, "ghp_" + "Z9" * 18, "AKIA" + "A" * 16,
  "https://me:secret@example.org/x",
])
def test_a_credential_is_refused_and_not_repeated(value):
  assert credential(value)
  with pytest.raises(InputError) as caught:
    check_command_line([f'logger.group="{value}"'])
  assert value not in str(caught.value) and "environment variable" in str(caught.value)


@pytest.mark.parametrize("value", ["hf_models/gpt2", "models/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e/x",
                                   "https://example.org:80/a", "task-force", "run"])
def test_ordinary_words_and_paths_are_no_credentials(value):
  assert credential(value) is None
