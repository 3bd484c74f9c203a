"""A mistake on the command line is reported in plain words, ends with 2, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.cli import main as entry
from lora_exp.config import InputError

ROOT = Path(__file__).resolve().parents[2]


def process(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run([sys.executable, "-m", "lora_exp", *argv], cwd=cwd, text=True, capture_output=True,
                        env={**os.environ, "PYTHONPATH": str(ROOT), **env}, timeout=60)


MISTAKES = [
  (["lora.rnk=8"], "lora.rnk", "did you mean lora.rank?"),
  (["rank=8"], "rank", "did you mean lora.rank?"),
  (["+lora.foo=1"], "lora.foo", "no such setting"),
  (["++lora.rnk=8"], "lora.rnk", "did you mean lora.rank?"),
  (["+lora.rank=8"], "lora.rank", "without +: lora.rank=8"),
  (["~lora.rank"], "~lora.rank", "give it a value"),
  (["~lora"], "~lora", "choose another"),
  (["lora={rnk: 8}"], "lora.rnk", "did you mean lora.rank?"),
  (["lora.rank", "8"], "lora.rank", "lora.rank=8"),
  (["--lora.rank=8"], "--lora.rank=8", "settings are written without dashes: lora.rank=8"),
  (["--mutirun"], "--mutirun", "did you mean --multirun?"),
  (["model=minigtp"], "model=minigtp", "did you mean minigpt"),
  (["modle=minigpt"], "modle", "did you mean model?"),
  (["experimnt=jax_tutorial"], "experimnt", "did you mean experiment?"),
  (["experiment=jax_tutorail"], "experiment=jax_tutorail", "did you mean jax_tutorial?"),
  (["data@retian=none"], "@retian", "data@retain"),
  (["data@retain=null"], "data@retain=null", "did you mean none?"),
  (["model=null"], "model=null", "choose gemma2_2b"),
  (["models/x=1"], "models/x", "no such group"),
  (["task=trian"], "task=trian", "did you mean train?"),
  (["lora.rank=1.5"], "lora.rank=1.5", "whole number"),
  (["model.arch.options.logit_softcp=3"], "model.arch.options.logit_softcp", "did you mean model.arch.logit_softcap?"),
  (["lora.rank=eight"], "lora.rank=eight", "whole number"),
  (["lora.rank="], "lora.rank=", "whole number"),
  (["optim.lr=nan"], "optim.lr=nan", "finite"),
  (["optim.lr=${nowhere}"], "optim.lr", "not found"),
  (["lora.targets=re:(q|v)_proj"], "lora.targets", "'lora.targets=\"re:(q|v)_proj\"'"),
  (["lora.targets=[query,value"], "lora.targets", "a list ends with ]"),
  (["prompt=Hello, world"], "prompt=Hello, world", "'prompt=\"Hello, world\"'"),
  (["lora.rank=1,2"], "lora.rank=1,2", "need -m"),
  (["-m", "lora.rank=4,0"], "lora.rank=0", "at least 1"),
  (["-m", "lora=lora,rslorra"], "lora=rslorra", "did you mean rslora?"),
  (["-m", "lora.rank=interval(1,2)"], "lora.rank", "takes lists"),
  (["lora=ia3", "lora.options.feedforwrd=[q]"], "lora.options.feedforwrd", "did you mean feedforward?"),
  (["lora=ia3", "+lora.options.feedforwrd=[q]"], "lora.options.feedforwrd", "did you mean feedforward?"),
  (["data.options.colunm=x"], "data.options.colunm", "no such option of the source stdlib"),
  (["data=text"], "data.path=null", "data.path=FILE"),
  (["data=text", "data.path=/no/such.txt"], "data.path=/no/such.txt", "no such file"),
  (["task=generate", "prompt=''"], "prompt", "is empty"),
  (["sample.stop=['']"], "sample.stop", "empty string"),
  (["task=generate", "run=/no/such"], "run=/no/such", "no such directory"),
  (["run=/tmp"], "run=/tmp", "train.resume=/tmp"),
  (["train.resume=/"], "train.resume=/", "contains no run"),
  (["-m", "train.resume=/", "lora.rank=1,2"], "train.resume=/", "contains no run"),
  (["name=../escape"], "name=../escape", "plain file name"),
  (["hydra.run.dir=/proc/none/x"], "/proc/none", "hydra.run.dir=DIR"),
  (["-m", "lora.rank=1,2", "hydra.run.dir=x"], "hydra.run.dir", "the directory of a sweep is hydra.sweep.dir"),
  (["sweep=seeds", "++hydra.run.dir=x"], "hydra.run.dir", "the directory of a sweep is hydra.sweep.dir"),
  (["hydra.sweep.dir=x"], "hydra.sweep.dir", "the directory of a single run is hydra.run.dir"),
  (["-m", "lora.rank=1,2", "hydra.launcher=packed"], "hydra.launcher=packed", "write hydra/launcher=packed"),
  (["-m", "lora.rank=1,2", "hydra.sweeper=study"], "hydra.sweeper=study", "write hydra/sweeper=study"),
  (["-m", "lora.rank=1,2", "hydra.launcher=null"], "hydra.launcher=null", "write hydra/launcher=NAME"),
  (["-m", "hydra.sweeper.params=[1]"], "hydra.sweeper.params=[1]", "give a mapping such as {lora.rank: '1,2'}"),
  (["-m", "hydra.sweeper.params=abc"], "hydra.sweeper.params=abc", "give a mapping such as {lora.rank: '1,2'}"),
  (["-m", "hydra.sweeper.extra={lora: frozen}"], "hydra.sweeper.extra", "a list of mappings such as [{lora: frozen}]"),
  (["-m", "hydra.sweeper.extra=[frozen]"], "hydra.sweeper.extra", "give a list of mappings such as [{lora: frozen}]"),
  (["-m", "hydra.sweeper.zip={lora.rank: '1,2'}"], "hydra.sweeper.zip", "give a list of mappings such as [{lora.rank"),
  (["sweep=rank", "hydra.sweeper.decide=3"], "hydra.sweeper.decide=3", "give a mapping such as {looks: [3, 5]}"),
  (["sweep=rank", "hydra.sweeper.budget=3"], "hydra.sweeper.budget=3", "give a mapping such as {steps: 20000}"),
  (["sweep=rank", "hydra.sweeper.tune=optim.lr"], "hydra.sweeper.tune", "give a mapping such as {setting: optim.lr}"),
  (["sweep=study", "hydra.sweeper.params=3"], "hydra.sweeper.params=3", "give a mapping such as {lora.rank: '1,2'}"),
  (["hydra.foo=1"], "hydra.foo", "no such setting"),
  (["+hydra.callbacks.x._target_=os.abort"], "hydra.callbacks", "cannot be set"),
  (["hydra/job_logging=stdout"], "hydra/job_logging", "cannot be set"),
  (["+lora._target_=os.abort"], "_target_", "choose a config by name"),
  (["--experimental-rerun", "x.pickle"], "--experimental-rerun", "train.resume=DIR"),
  (["--config-dir", "/no/such"], "--config-dir=/no/such", "no such directory"),
  (["--config-name", "other"], "other", "Cannot find primary config"),
  (["--cfg", "jobs"], "--cfg", "'job', 'hydra', 'all'"),
  (["--resolve"], "--resolve", "--cfg job --resolve"),
]


@pytest.mark.parametrize(("argv", "named", "remedy"), MISTAKES, ids=[" ".join(argv) for argv, _, _ in MISTAKES])
def test_a_mistake_ends_with_2_and_names_setting_and_remedy(argv, named, remedy, in_tmp_path,
                                                                                   capfd):
  assert entry.run(argv) == InputError.code
  output = capfd.readouterr()
  assert named in output.err and remedy in output.err
  assert "Traceback" not in output.err + output.out and len(output.err.splitlines()) < 25
  assert list(in_tmp_path.iterdir()) == []


def test_a_hundred_mistakes_fit_on_one_screen(in_tmp_path, capfd):
  assert entry.run([f"lora.x{i}=1" for i in range(100)]) == 2
  output = capfd.readouterr().err
  assert len(output.splitlines()) < 25 and "and 80 more" in output


@pytest.mark.parametrize("argv", [["lora.rnk=8"], ["-m", "lora.rank=4,0"], ["experiment=jax_tutorial"]])
def test_a_process_reports_mistakes_on_standard_error(argv, tmp_path):
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
  assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_hydra_full_error_shows_the_traceback(tmp_path):
  done = process("lora.rnk=8", cwd=tmp_path, HYDRA_FULL_ERROR="1")
  assert done.returncode == 2 and "Traceback" in done.stderr and "did you mean lora.rank?" in done.stderr



@pytest.mark.parametrize(("argv", "words"), [
  (["--help"], ["lora-exp -m sweep=rank", "adalora, bitfit", "loraplus", "75 stopped"]),
  (["--cfg", "job", "lora.rank=5"], ["rank: 5"]),
  (["--cfg", "job", "--resolve", "--package", "data"], ["seq_len: 128"]),
  (["--info", "defaults"], ["stdlib_docs"]),
  (["--version"], ["lora_exp 0."]),
])
def test_flags_that_print_something_run_nothing(argv, words, tmp_path):
  done = process(*argv, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert all(word in done.stdout for word in words)
  assert list(tmp_path.iterdir()) == []


def test_help_lists_no_file_that_others_inherit(tmp_path):
  assert "_base" not in process("--help", cwd=tmp_path).stdout


def test_a_bad_config_is_refused_without_jax():
  code = "import sys, lora_exp.cli.main as m; assert m.run(['lora.rank=0']) == 2; print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
  assert done.stdout.strip() == "False", done.stderr


def test_a_launcher_that_a_file_names_with_a_dot_is_refused(in_tmp_path, capfd):
  (in_tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nhydra: {launcher: packed}\n")
  assert entry.run(["--config-dir", ".", "--config-name", "mine", "-m", "lora.rank=1,2"]) == InputError.code
  assert "hydra.launcher=packed: is not a mapping; choose a file with hydra/launcher=NAME" in capfd.readouterr().err
