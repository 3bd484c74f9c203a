"""A sweep says what it will take on disk before it starts."""

import re
import shutil
from collections import namedtuple

import pytest
import runs

from lora_exp.cli.command_line import check_command_line
from lora_exp.cli.main import run
from lora_exp.config.errors import DONE
from lora_exp.runtime.byte_sizes import parse_size, size_of
from lora_exp.sweep.disk_use import show_disk_use, trial_sizes

SHORT = ["train.steps=4", "train.eval_every=2", "train.save_every=1", "train.eval_tokens=128", "model.base=random"]


def sizes(*overrides: str) -> list[int]:
  return trial_sizes(check_command_line([*runs.TINY, "model.base=random", *overrides]).jobs)


@pytest.mark.slow
def test_the_estimate_is_near_what_the_sweep_takes(tmp_path, capsys):
  wide = ["model.width=128", "model.ff=512", "lora.rank=16,64", "hydra/launcher=packed"]
  argv = ["-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *runs.TINY, *SHORT, *wide, *runs.on_stories(tmp_path)]
  assert run(argv) == DONE
  [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Disk:")]
  stated = re.match(r"Disk: up to (.+?) for 2 trials, up to (.+?) each; .+ free\.$", line)
  taken = [size_of(tmp_path / "sweep" / str(number)) for number in (0, 1)]
  assert 0.4 * parse_size(stated[1]) < sum(taken) < parse_size(stated[1])
  assert 0.4 * parse_size(stated[2]) < max(taken) < parse_size(stated[2])


def test_sizes_follow_rank_method_and_optimizer():
  low, high = sizes("-m", "lora.rank=8,64")
  assert 4 * low < high + 10**7 and low < high
  assert sizes("optim=sgd")[0] < sizes()[0] < sizes("lora=full")[0]
  assert sizes("-m", "lora.rank=8", "seed=0,1") == [low, low]


def test_a_sweep_that_does_not_fit_gives_a_warning(tmp_path, monkeypatch, capsys):
  usage = namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
  show_disk_use(check_command_line([*runs.TINY, "model.base=random"]).jobs, tmp_path)
  assert "only 1 bytes is free" in capsys.readouterr().err
