"""Config files from --config-dir are used, and cannot load code."""


import pytest

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError


@pytest.mark.parametrize(("text", "words"), [
  ("lora: {rnk: 3}", "theirs.yaml: lora.rnk: no such setting; did you mean lora.rank?"),
  ("lora: [1", "theirs.yaml"),
  ("hydra: {callbacks: {x: {_target_: os.abort}}}", "callbacks"),
  ("hydra: {launcher: {_target_: os.abort}}", "hydra.launcher._target_=os.abort"),
  ("hydra: {job_logging: {handlers: {file: {class: os.abort}}}}", "names a class to load"),
  ("hydra: {job: {chdir: true}}", "hydra.job.chdir"),
  ("optim: {_target_: os.abort}", "optim._target_: no such setting"),
])
def test_foreign_config_files_cannot_load_code(text, words, tmp_path):
  (tmp_path / "experiment").mkdir()
  (tmp_path / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
  with pytest.raises(InputError) as caught:
    check_command_line(["--config-dir", str(tmp_path), "experiment=theirs"])
  assert words in str(caught.value)


def test_a_config_file_of_the_user_is_used(tmp_path):
  (tmp_path / "experiment").mkdir()
  (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nlora: {rank: 5}\n")
  line = check_command_line(["--config-dir", str(tmp_path), "experiment=mine"])
  assert line.jobs[0].lora.rank == 5 and line.flags == ["--config-dir", str(tmp_path)]
