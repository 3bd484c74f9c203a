"""Advice is printed with its command, is the same each time, and finds what a teacher planted."""

import json
import math
import shlex

import jax
import pytest
from packs import job_of, quickly, rows, small, trial
from runs import QUIET, TINY, everything, on_stories

import lora_exp
from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.step import gradient
from lora_exp.train.probing.advice import best_rate, fewest_parameters, smallest_rank, width_rule
from lora_exp.train.probing.kernel_gradients import kernel_gradients

SHORT = ["task=advise", *TINY, "train.steps=6", "train.batch_size=4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("advise")


@pytest.fixture(scope="module")
def advised(directory) -> dict:
  """advice.json of a short run through the command line."""
  text = on_stories(directory)
  before = everything(directory)
  with pytest.MonkeyPatch.context() as patch, quickly():
    patch.chdir(directory)
    assert entry.run([*SHORT, *text, "out=advice"]) == 0
  out = directory / "advice"
  assert everything(directory) - before == {out, out / "advice.json"}
  return json.loads((out / "advice.json").read_text())


@pytest.mark.slow
def test_the_commands_train_and_sweep_the_advice(advised):
  advice, commands = advised["advice"], {name: shlex.split(text) for name, text in advised["commands"].items()}
  assert all(words[:3] == ["python", "-m", "lora_exp"] for words in commands.values())
  cfg = lora_exp.compose(commands["train"][3:])
  assert (cfg.task, cfg.train.steps, cfg.model.width) == ("train", 6, 32)
  found = (cfg.optim.lr, cfg.lora.targets, cfg.lora.rank, cfg.lora.alpha)
  assert found == (advice["lr"], advice["targets"], advice["rank"], advice["alpha"])
  sweep = check_command_line(commands["sweep"][3:])
  assert sweep.multirun and len(sweep.jobs) == 3 * 3 * len({job.lora.rank for job in sweep.jobs})
  assert sorted({job.optim.lr for job in sweep.jobs})[1] == advice["lr"]
  assert advice["rank"] in {job.lora.rank for job in sweep.jobs}


def test_the_advice_follows_from_the_gains_it_shows(advised):
  gains = {name: list(kind.values()) for name, kind in advised["gains"].items()}
  assert advised["steps"] == 6 and advised["base_loss"] > max(gains["optim.lr"]) > 0
  assert set(advised["gains"]["lora.targets"]) == {"all_linear", "attention", "qv", "mlp"}
  targets = advised["gains"]["lora.targets"]
  assert targets[advised["advice"]["targets"]] >= 0.95 * max(targets.values())
  ranks = {int(rank): gain for rank, gain in advised["gains"]["lora.rank"].items()}
  assert [rank for rank in ranks if ranks[rank] >= 0.9 * ranks[32]][0] == advised["advice"]["rank"]
  assert len(advised["modules"]) == 6 and all(module["energy"] > 0 for module in advised["modules"])


def test_the_same_command_gives_the_same_advice(advised, directory):
  with quickly():
    advice = lora_exp.run([*SHORT, *on_stories(directory), f"out={directory / 'again'}"])
  again = json.loads((directory / "again" / "advice.json").read_text())
  assert vars(advice) == advised["advice"]
  assert {**again, "commands": None} == {**advised, "commands": None}


@pytest.mark.slow
def test_planted_rank_and_targets_are_found(tmp_path):
  with quickly():
    advice = lora_exp.run([
      "task=advise", "model=minigpt_tiny", "data=planted", "data.seq_len=32", "train.steps=48", *QUIET,
      "data.teacher.rank=2", "data.teacher.targets=qv", "data.teacher.seed=3", f"out={tmp_path}",
    ])  # fmt: skip
  assert advice.targets == "qv" and advice.rank in (1, 2, 4)
  written = json.loads((tmp_path / "advice.json").read_text())
  modules = {module["module"]: module["directions"] for module in written["modules"]}
  planted = [n for name, n in modules.items() if name.endswith(("query", "value"))]
  fed_forward = [n for name, n in modules.items() if "linear" in name]
  assert max(planted) < min(fed_forward)  # the teacher's update has few directions, and noise has many


BAD = {
  "a run": (["run=somewhere"], "run="),
  "no adapter": (["lora=full"], "predicts a rank"),
  "no rank": (["lora=bitfit"], "predicts a rank"),
  "a shared rank": (["lora=vera"], "predicts a rank"),
  "a given number of parameters": (["lora.parameters=0.1"], "lora.parameters=0.1"),
  "no module": (["lora.targets=nothing_like_it"], "matches no module"),
  "no layers": (["model=mlp", "data=xor", "data@pretrain_data=none", "model.mlp.hidden=[]"], "matches no module"),
  "no text": (["data=text"], "data.path"),
  "no file": (["data=text", "data.path=missing.txt"], "missing.txt"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_advised_is_refused(bad, tmp_path, monkeypatch, capsys):
  typed, words = BAD[bad]
  monkeypatch.chdir(tmp_path)
  assert entry.run(["task=advise", "model=minigpt_tiny", *QUIET, *typed]) == 2
  said = capsys.readouterr().err
  assert words in said and "Traceback" not in said
  assert not any(tmp_path.iterdir())


def test_rate_is_the_maximum_of_the_parabola():
  rates = [0.25, 0.5, 1.0, 2.0, 4.0]
  gains = [10 - (math.log2(rate) - 0.4) ** 2 for rate in rates]
  assert best_rate(rates, gains, configured=0.25) == pytest.approx(2**0.4, rel=0.02)
  assert best_rate(rates, gains, configured=1.0) == 1.0  # as good as the best
  assert best_rate(rates, [1, 2, 3, 4, 5], configured=1.0) == 4.0
  assert best_rate(rates, [1, 2, 5, -math.inf, -math.inf], configured=0.5) == 1.0


def test_fewest_parameters_and_smallest_rank():
  gains = {"all_linear": 1.0, "attention": 0.96, "qv": 0.94}
  assert fewest_parameters(gains, {"all_linear": 6, "attention": 4, "qv": 2}) == "attention"
  assert smallest_rank([1, 2, 4, 8], [0.5, 0.85, 0.91, 1.0]) == 4


def test_the_width_rule_gives_the_published_rates():
  assert width_rule("llama", 4096) == pytest.approx(2.86e-4, rel=0.01)
  assert width_rule("qwen3", 4096) == pytest.approx(4.73e-4, rel=0.01)


def test_energy_is_that_of_the_full_gradient():
  job = job_of(small(model__dropout=0.0, lora__method="full"))
  base, numbers = trial(job.state.params, 0), trial(job.trials, 0)
  full_gradient = jax.jit(lambda batch: gradient(job.program, base, numbers, job.frozen, batch, job.keys[0])[0])
  with quickly():
    found = kernel_gradients(small(model__dropout=0.0), base, [rows(), rows(1)], 2)
    grads = [flatten(full_gradient(job.put(rows(seed)))) for seed in (0, 1)]
  assert len(found) == 12
  for kernel in found:
    name = f"{kernel.module}.kernel"
    expected = max(0.0, float((grads[0][name] * grads[1][name]).sum()))
    assert kernel.energy == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert kernel.parameters == grads[0][name].size
