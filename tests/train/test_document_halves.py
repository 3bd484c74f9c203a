"""held_out.npz and the two halves of the held-out documents: one chooses the best step, the other is the score."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from runs import QUIET, TINY, resume, rows, story, summary, train

from lora_exp import load
from lora_exp.config.schema import DataConfig
from lora_exp.data.document_rows import first_documents, halves
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.train.compute.program import assemble
from lora_exp.train.compute.step import outputs
from lora_exp.train.records.training_record import TrainingRecord

LENGTH = 64  # T
ARGV = [*TINY, "data=text", f"data.seq_len={LENGTH}", "train.batch_size=4", "train.steps=6", "train.eval_every=3",
        "train.save_every=3", "train.eval_tokens=null"]  # fmt: skip
TEXTS = [story(n)[: 20 + 13 * (n % 11)] for n in range(60)]
HELD_OUT = TEXTS[9::10]


def losses(run_dir: Path) -> dict[str, np.ndarray]:
  """The arrays of held_out.npz."""
  with np.load(run_dir / "held_out.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
  """A finished run whose held-out documents are cut into rows of 64 tokens."""
  directory = tmp_path_factory.mktemp("halves")
  (directory / "texts.txt").write_text("<|endoftext|>".join(TEXTS))
  return train(directory / "run", *ARGV, f"data.path={directory / 'texts.txt'}")


def pieces() -> list[tuple[int, np.ndarray, np.ndarray]]:
  """(document, tokens, targets) of each part of a held-out document that is in one row."""
  tokenizer, found, position = get_tokenizer("bytes", None), [], 0
  for number, text in enumerate(HELD_OUT):
    ids = [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(text), tokenizer.eot]
    for start in range(len(ids) - 1):
      if start == 0 or (position + start) % LENGTH == 0:
        found.append((number, [], []))
      found[-1][1].append(ids[start])
      found[-1][2].append(ids[start + 1])
    position += len(ids) - 1
  return found


def test_a_document_has_the_loss_of_its_parts_alone(run):
  loaded = load(run)
  params, trial = loaded.single()

  @jax.jit
  def nats(tokens, targets, real):
    model = assemble(loaded.job.program, params, trial, loaded.frozen, None)
    batch = {"tokens": tokens, "positions": np.arange(LENGTH)[None], "segments": real}
    return (optax.softmax_cross_entropy_with_integer_labels(outputs(model, batch), targets) * real).sum()

  expected = np.zeros(len(HELD_OUT))
  for number, *ids in pieces():
    tokens, targets = (np.pad(np.array(x), (0, LENGTH - len(x)))[None] for x in ids)
    expected[number] += nats(tokens, targets, (np.arange(LENGTH) < len(ids[0])).astype(int)[None])
  file, exported = losses(run), summary(run)["losses"]["exported_step"]
  np.testing.assert_allclose(file["nats"][file["steps"].tolist().index(exported)], expected, rtol=1e-5)
  assert len(pieces()) > len(HELD_OUT), "no document is cut"


def test_the_halves_add_up_to_all_held_out_documents(run):
  file, evals, result = losses(run), rows(run, "eval"), summary(run)
  assert file["steps"].tolist() == [row["step"] for row in evals] == [0, 3, 6]
  assert {name: x.dtype.name for name, x in file.items()} == {
    "steps": "int64", "nats": "float32", "tokens": "int64", "half": "uint8",
    "sum_correct": "float32",
  }  # fmt: skip
  assert file["tokens"].sum() == evals[0]["counted"] == result["held_out_tokens"]
  for nats, row in zip(file["nats"], evals, strict=True):
    assert nats.sum() / file["tokens"].sum() == pytest.approx(row["loss"], rel=1e-6)
    for half, name in enumerate(("tuning", "report")):
      mine = file["half"] == half
      assert nats[mine].sum() / file["tokens"][mine].sum() == pytest.approx(row[f"{name}_loss"], rel=1e-6)
  best = min(evals[1:], key=lambda row: row["tuning_loss"])
  assert result["losses"]["best_step"] == best["step"] and result["losses"]["best"] == best["loss"]
  for half in ("tuning", "report"):
    assert result["halves"][half]["base"]["loss"] == evals[0][f"{half}_loss"]
    assert result["halves"][half]["exported"]["accuracy"] == best[f"{half}_accuracy"]


def test_resuming_keeps_the_evaluations_before(run, tmp_path):
  argv = [*ARGV, f"data.path={run.parent / 'texts.txt'}"]
  train(tmp_path / "run", *argv, "train.stop_at=3", code=75)
  assert losses(tmp_path / "run")["steps"].tolist() == [0, 3]
  resume(tmp_path / "run")
  for name, x in losses(run).items():
    np.testing.assert_array_equal(losses(tmp_path / "run")[name], x)
  assert summary(tmp_path / "run")["halves"] == summary(run)["halves"]


def test_without_halves_all_documents_choose_and_score(run, tmp_path):
  argv = [*ARGV, f"data.path={run.parent / 'texts.txt'}", "data.split=none"]
  undivided = train(tmp_path / "run", *argv)
  assert "halves" not in summary(undivided) and "tuning_loss" not in json.dumps(rows(undivided))
  assert set(losses(undivided)["half"]) == {1}
  assert [row["loss"] for row in rows(undivided)] == [row["loss"] for row in rows(run)]


def test_each_numeric_example_is_a_document(tmp_path):
  argv = [*QUIET, "model=mlp", "data=xor", "model.mlp.inputs=2", "model.base=random", "train.steps=2"]
  found = train(tmp_path / "run", *argv, "train.batch_size=4")
  file = losses(found)
  assert file["tokens"].tolist() == [1, 1, 1, 1] and sorted(file["half"]) == [0, 0, 1, 1]
  assert file["nats"][0].mean() == pytest.approx(summary(found)["losses"]["base"], rel=1e-6)


# ---- the parts


@pytest.mark.parametrize("tokens", [[5, 9], [3, 3, 3], [100, 1, 50, 2, 49, 98]])
def test_halves_have_about_as_many_tokens(tokens):
  tokens_D = np.array(tokens)
  half_D = halves(tokens_D)
  assert set(half_D) == {0, 1} and (half_D == halves(tokens_D)).all()
  assert abs(int(half_D.sum()) * 2 - len(tokens)) <= 1
  by_length = half_D[np.argsort(-tokens_D, kind="stable")]
  pairs = by_length[: len(tokens) // 2 * 2].reshape(-1, 2)
  assert (pairs.sum(axis=1) == 1).all(), "two documents of like length are in one half"


def test_rows_of_one_document_have_its_number(tmp_path):
  (tmp_path / "long.txt").write_text("<|endoftext|>".join(word * 20 for word in ("abc", "d", "efghijkl", "mn")))
  cfg = DataConfig(source="text", path=str(tmp_path / "long.txt"), eval_fraction=0.5, seq_len=16)
  tokenizer = get_tokenizer("bytes", None)
  made = make_rows(cfg, tokenizer, tmp_path / "cache", progress=False)
  # Held out are the second and the fourth: 20 and 40 pairs, so that the second row holds the end of one.
  assert made.eval_tokens == 60
  assert first_documents(made, cfg, np.arange(4), tokenizer.eot).tolist() == [0, 0, 1, 1]
  assert first_documents(made, cfg, np.array([1, 3]), tokenizer.eot).tolist() == [0, 1]
  padded = replace(cfg, packing="pad")
  assert first_documents(made, padded, np.array([1, 3]), tokenizer.eot).tolist() == [1, 3]


def test_a_single_document_is_halved_by_rows(tmp_path):
  (tmp_path / "long.txt").write_text("<|endoftext|>".join(["short"] * 9 + ["word " * 60]))
  found = train(tmp_path / "run", *ARGV, f"data.path={tmp_path / 'long.txt'}", "train.steps=1")
  assert losses(found)["tokens"].tolist() == [64, 64, 64, 64, 44]
  assert "halves" in summary(found)


def test_the_best_step_is_that_of_the_tuning_half():
  def record_after(record: TrainingRecord, *scores: tuple[float, float]) -> TrainingRecord:
    for step, (loss, tuning) in enumerate(scores):
      by_half = {"tuning": {"loss": tuning}, "report": {"loss": 2 * loss - tuning}}
      record = record.after_evaluation(step, {"loss": loss, "counted": 8}, by_half)
    return record

  record = record_after(TrainingRecord(9, "rows"), (3.0, 3.0), (2.0, 2.5), (2.1, 2.2), (1.9, 2.3))
  assert (record.best_step, record.best, record.best_tuning, record.final) == (2, 2.1, 2.2, 1.9)
  exported = replace(record, exported_step=2).half_scores()
  assert exported["report"] == {"base": {"loss": 3.0}, "exported": {"loss": pytest.approx(2.0)}}
  old = record_after(TrainingRecord(9, "rows", best=2.0, best_step=1), (3.0, 3.0), (2.1, 1.0), (1.9, 4.0))
  assert (old.best_step, old.best, old.best_tuning) == (2, 1.9, None)  # as the run began, on all documents
