"""The default directory of the cache is the system's, unless the old one exists."""

import sys
from pathlib import Path

import pytest

from lora_exp.cli.command_line import check_command_line
from lora_exp.runtime.cache_directory import default_cache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
  monkeypatch.delenv("LORA_EXP_CACHE")
  return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other directories")
def test_the_cache_is_in_the_directory_of_the_system(home):
  assert default_cache() == str(home / "elsewhere" / "lora_exp")
  assert check_command_line(["task=list"]).jobs[0].cache == default_cache()


def test_the_old_directory_is_still_used(home):
  (home / ".cache" / "lora_exp").mkdir(parents=True)
  assert check_command_line(["task=list"]).jobs[0].cache == str(home / ".cache" / "lora_exp")


def test_the_environment_comes_first(home, monkeypatch):
  (home / ".cache" / "lora_exp").mkdir(parents=True)
  monkeypatch.setenv("LORA_EXP_CACHE", str(home / "typed"))
  assert check_command_line(["task=list"]).jobs[0].cache == str(home / "typed")
