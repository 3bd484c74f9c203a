"""lm-eval gives the same for a run as for its merged model in transformers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from packs import quickly
from runs import QUIET, train

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

MODEL = ["model=gpt2", "model.base=random", "model.weights=null", "model.layers=2", "model.width=32", "model.heads=4",
         "model.ff=48", "model.max_len=64", "model.dropout=0", "train.steps=4", "optim.lr=0.05",
         "data=arithmetic", "data.limit=100", "data.seq_len=48", "train.eval_every=0", "train.save_every=0",
         "optim.warmup=0", "model.arch.head_dim=8", "model.arch.kv_heads=4", "lora.targets=all_linear"]
ANIMALS = ("cat", "dog", "horse", "small black bird")
CHOICE = """task: local_animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SUMS = """task: local_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "7"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A directory with two tasks of lm-eval and their data."""
  folder = tmp_path_factory.mktemp("tasks")
  animals = [{"question": f"The {ANIMALS[n % 4]} and the {ANIMALS[(n + 1) % 4]} saw the", "choices": list(ANIMALS),
              "answer": n % 4} for n in range(12)]
  sums = [{"question": f">>> mystery_function({n}, {7 * n})\n", "answer": str(8 * n)} for n in range(6)]
  for name, text, rows in (("animals", CHOICE, animals), ("sums", SUMS, sums)):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(text.format(data=data))
  return folder


@pytest.mark.slow
def test_harness_scores_equal_those_of_transformers(tmp_path, tasks, monkeypatch, capsys):
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
  with quickly():
    run = train(tmp_path / "run", *QUIET, *MODEL)
    train(run, "task=merge", f"run={run}", f"out={tmp_path / 'merged'}")
    train(run, "task=evaluate", f"run={run}", "harness=local_animals,local_sums", f"harness_tasks={tasks}")
  assert "local_sums" in capsys.readouterr().out
  lines = [json.loads(line) for line in (run / "harness.jsonl").read_text().splitlines()]
  ours = {(line["task"], line["metric"]): line for line in lines if line["model"] == "lora"}
  assert {line["model"] for line in lines} == {"base", "lora"} and all("difference_error" in x for x in ours.values())

  theirs = _reference(tmp_path / "merged")
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager

  expected = simple_evaluate(
    model=theirs, tasks=["local_animals", "local_sums"], task_manager=TaskManager(include_path=str(tasks)))["results"]
  for (task, metric), line in ours.items():
    assert line["value"] == pytest.approx(expected[task][f"{metric},{line['filter']}"], abs=1e-3)
    assert line["standard_error"] == pytest.approx(expected[task][f"{metric}_stderr,{line['filter']}"], abs=1e-3)
  with quickly():
    _check_requests(_model(run), theirs)


def _reference(directory: Path):
  from lm_eval.models.huggingface import HFLM

  return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4, max_length=64)


def _model(run: Path):
  """The trained run as a model of lm-eval."""
  import lora_exp
  from lora_exp.train.eval_harness.harness_model import HarnessModel

  loaded = lora_exp.load(run)
  return HarnessModel(loaded.plan, loaded.job, (loaded.params, loaded.job.trials, loaded.frozen))


def _check_requests(ours, theirs) -> None:
  """The three kinds of requests, with empty contexts, texts longer than a row, and stop texts."""
  words = " ".join(ANIMALS)
  pairs = [SimpleNamespace(args=args) for args in (
    ("", words), ("One day ", "the cat"), (words * 9, " ran"), (">>> mystery_function(1, 2)\n", "3"))]
  for (value, greedy), (expected, is_greedy) in zip(
    ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):  # fmt: skip
    assert value == pytest.approx(expected, abs=1e-3) and greedy == is_greedy
  texts = [SimpleNamespace(args=(text,)) for text in (words * 9, "The dog.")]
  assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
  asked = [SimpleNamespace(args=(text, settings)) for text, settings in (
    (words * 9, {"max_gen_toks": 20}), ("One day", {"until": ["e"], "max_gen_toks": 20}), ("a", {"max_gen_toks": 5}))]
  answers = ours.generate_until(asked)
  assert answers == theirs.generate_until(asked) and any(answers) and "e" not in answers[1]
