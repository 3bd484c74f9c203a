"""The jobs of a sweep are compared and checked, all of them, before the first one starts."""

import pytest

from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config.errors import InputError


def problem(*argv: str) -> str:
  with pytest.raises(InputError) as caught:
    check_command_line(list(argv))
  return str(caught.value)


@pytest.mark.parametrize(("subdir", "argv"), [
  ("x", ["lora.rank=1,2"]), ("r${lora.rank}", ["lora.rank=1,2", "seed=0,1"]), ("${name}", ["optim.lr=1e-3,2e-3"]),
])
def test_two_jobs_with_one_directory_are_refused(subdir, argv):
  said = problem("-m", "task=data", *argv, f"hydra.sweep.subdir={subdir}")
  assert "would both have the directory" in said and "add ${hydra.job.num} to it" in said


@pytest.mark.parametrize("subdir", ["r${lora.rank}", "${hydra.job.override_dirname}", "x/${hydra.job.num}"])
def test_directories_that_differ_are_allowed(subdir):
  argv = ["-m", "task=data", "lora.rank=1,2", f"hydra.sweep.subdir={subdir}"]
  assert len(check_command_line(argv).jobs) == 2


@pytest.mark.parametrize("subdir", ["r${hydra.job.num}", "r${lora.rank}"])
@pytest.mark.parametrize("argv", [["-m", "lora.rank=1,2"], ["sweep=rank", "lora.rank=1,2"]])
def test_training_runs_have_numbered_directories(subdir, argv, in_tmp_path, capfd):
  assert entry.run([*argv, f"hydra.sweep.subdir={subdir}"]) == InputError.code
  assert capfd.readouterr().err.count("the runs of a sweep are read from its directories 0, 1, 2, …; remove it") == 1
  assert list(in_tmp_path.iterdir()) == []


def test_the_default_directories_may_be_typed():
  for subdir in ("${hydra.job.num}", "${hydra:job.num}"):
    assert len(check_command_line(["-m", "lora.rank=1,2", f"hydra.sweep.subdir={subdir}"]).jobs) == 2


@pytest.mark.slow
def test_the_last_of_many_jobs_is_checked():
  values = ",".join([f"{n}e-6" for n in range(1, 280)])
  assert "optim.lr=0.0: must be above 0" in problem("-m", f"optim.lr={values},0")


def test_too_many_jobs_are_refused_before_they_are_composed():
  assert "at most 10,000 jobs" in problem("-m", "lora.rank=range(1,1000000000)")
  assert "the sweep has 90,000 jobs" in problem("-m", "lora.rank=range(0,300)", "seed=range(0,300)")


def test_a_config_of_ones_own_may_be_the_primary_one(tmp_path):
  (tmp_path / "mine.yaml").write_text("defaults:\n- config\n- _self_\nlora:\n  rank: 3\n")
  line = check_command_line(["--config-dir", str(tmp_path), "--config-name", "mine", "logger=none"])
  assert line.jobs[0].lora.rank == 3


@pytest.mark.parametrize(("argv", "words"), [
  (["lora.rank=4 train.steps=3"], "give them one by one: lora.rank=4 train.steps=3"),
  (["--rank", "4"], "did you mean lora.rank"),
])
def test_advice_fits_the_mistake(argv, words):
  assert words in problem(*argv)


def test_a_group_file_without_its_defaults_is_told_so(tmp_path):
  (tmp_path / "lora").mkdir()
  (tmp_path / "lora" / "own.yaml").write_text("rank: 5\n")
  assert "a file of the group lora inherits" in problem("--config-dir", str(tmp_path), "lora=own")
