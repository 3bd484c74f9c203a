"""A run from the command line to its files: they are complete, correct and small, and the base does not change."""

import json
import math
import struct
from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from runs import TINY, cache, digest, everything, on_stories, process, rows, stories, summary, train
from safetensors.numpy import load_file, save_file

from lora_exp.cli import main as entry
from lora_exp.config.metrics import METRICS
from lora_exp.models.factory import build_model
from lora_exp.runtime.mesh import flatten
from lora_exp.runtime.saved_config import load_config
from lora_exp.train import pack_training

SHORT = ["train.steps=2", "train.eval_every=0", "train.save_every=0", "train.eval_tokens=300", "train.export=last"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return on_stories(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  """One run with everything on; the frozen arrays as they are at its end are digested anew, beside the files."""
  after = []
  checked = pack_training.check_frozen
  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.setattr(pack_training, "check_frozen",
                      lambda job, before: (after.append(digest(flatten(job.frozen))), checked(job, before)))
  retain = stories(tmp_path_factory.mktemp("retain") / "retain.txt", count=30)
  run_dir = train(tmp_path_factory.mktemp("finished") / "run", "model=minigpt_tiny", *data, "data@retain=text",
                  f"retain.path={retain}", "lora.rank=3", "lora.alpha=5", "train.batch_size=4",
                  "train.steps=24", "train.log_every=4",
                  "train.eval_every=8", "train.save_every=8", "sample.prompts=[Once,'a dog']", "sample.max_tokens=6")
  monkeypatch.undo()
  return run_dir, after


def test_settings_are_printed_once_if_the_run_can_start(data, tmp_path, capfd):
  train(tmp_path / "run", *TINY, *data, *SHORT, "lora.rank=3")
  assert capfd.readouterr().out.count("rank=3") == 1
  train(tmp_path / "bad", *TINY, *data, "lora.targets=nosuch", code=2)
  printed = capfd.readouterr()
  assert "rank=" not in printed.out and printed.err.startswith("error: lora.targets=nosuch")


# ---- what a run leaves


def test_a_run_leaves_all_of_its_files_and_nothing_half_written(finished):
  run_dir, _ = finished
  found = {path.name for path in run_dir.iterdir()}
  assert found == {".hydra", ".lock", "adapter", "checkpoints", "config.yaml", "held_out.npz", "lora_exp.log",
                   "metrics.jsonl", "plots", "samples.jsonl", "summary.json", "wandb"}
  assert not [path for path in everything(run_dir) if "tmp" in path.suffix]
  assert {path.name for path in (run_dir / "checkpoints").iterdir()} <= {"8", "16", "24"}
  assert list((run_dir / "wandb").glob("offline-run-*"))
  width, height = struct.unpack(">II", (run_dir / "plots" / "loss.png").read_bytes()[16:24])  # PNG's header
  assert width > height > 300


def test_the_saved_config_is_whole_and_makes_the_same_run(finished):
  run_dir, _ = finished
  saved = yaml.safe_load((run_dir / "config.yaml").read_text())
  assert saved["lora"]["rank"] == 3 and saved["retain"]["source"] == "text"
  assert load_config(str(run_dir)).lora.alpha == 5


def test_the_curve_has_each_step_once_and_its_tokens_grow(finished):
  run_dir, _ = finished
  assert [row["step"] for row in rows(run_dir, "train")] == [1, 4, 8, 12, 16, 20, 24]
  for split in ("eval", "retain"):
    assert [row["step"] for row in rows(run_dir, split)] == [0, 8, 16, 24]
    for row in rows(run_dir, split):
      metrics = {"loss", "perplexity", "bits_per_byte", "accuracy"}
      halves = {f"{half}_{metric}" for half in ("tuning", "report") for metric in metrics if split == "eval"}
      assert row.keys() - METRICS.keys() == {"step", "tokens", "split", "counted"} | halves
      assert row.keys() >= metrics
  for row in rows(run_dir, "train"):
    assert row.keys() - METRICS.keys() == {"step", "tokens", "split", "lr", "grad_norm", "tokens_per_s"}
    assert row.keys() >= {"loss", "perplexity", "bits_per_byte", "accuracy"}
  for row in rows(run_dir):
    assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
    assert row["loss"] > 0 and 0 <= row["accuracy"] <= 1
  tokens = [row["tokens"] for row in rows(run_dir)]
  assert tokens == sorted(tokens) and tokens[0] == 0
  most = [row["step"] * 4 * 64 for row in rows(run_dir)]  # batch 4 of 64 tokens; padding is not counted
  assert all(0.5 * m <= t <= m for t, m in zip(tokens, most, strict=True))


def test_the_numbers_of_the_summary_are_those_of_the_curve(finished):
  run_dir, _ = finished
  found, held, kept = summary(run_dir), rows(run_dir, "eval"), rows(run_dir, "retain")
  losses = [row["loss"] for row in held]
  best = min(held[1:], key=lambda row: row["loss"])
  [exported] = [row for row in kept if row["step"] == best["step"]]
  assert found["losses"] == {
    "base": losses[0], "first": rows(run_dir, "train")[0]["loss"], "final": losses[-1], "best": best["loss"],
    "best_step": best["step"], "exported_step": best["step"], "retain_base": kept[0]["loss"],
    "retain_final": kept[-1]["loss"], "retain_exported": exported["loss"],
    "forgetting": exported["loss"] - kept[0]["loss"]}
  assert found["status"] == "done" and found["steps"] == 24
  assert found["tokens"] == rows(run_dir)[-1]["tokens"]
  assert found["held_out_tokens"] == held[0]["counted"]
  assert found["perplexity"] == pytest.approx(math.exp(losses[-1]))
  assert found["seconds"]["total"] >= found["seconds"]["train"] > 0
  assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["seconds"]["train"], rel=0.05)
  assert found["process_rss_bytes"] > found["peak_memory_bytes"] > 4 * found["parameters"]["total"]
  # 6 FLOPs a token for each of the 87,681 - 257·64 - 64·64 parameters in products would be full training's.
  assert 2 < found["flops_per_token"] / found["parameters"]["total"] < 6
  assert found["losses"]["final"] < found["losses"]["base"] - 0.1


def test_the_adapter_file_has_the_parameters_of_the_summary(finished):
  run_dir, _ = finished
  config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
  assert (config["peft_type"], config["r"], config["lora_alpha"], config["peft"]) == ("LORA", 3, 5, False)
  tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
  paths = [f"blocks.{i}.{name}" for i in (0, 1)
           for name in ("mha.query", "mha.key", "mha.value", "mha.out", "linear1", "linear2")]
  assert sorted(config["target_modules"]) == sorted(paths) == sorted(row["path"] for row in summary(run_dir)["targets"])
  assert tensors.keys() == {f"base_model.model.{path}.lora_{ab}.weight" for path in paths for ab in "AB"}
  for name, tensor in tensors.items():
    assert tensor.shape == ((3, 64) if "lora_A" in name else (64, 3)) and np.isfinite(tensor).all() and tensor.any()
  counts = summary(run_dir)["parameters"]
  sizes = {ab: sum(x.size for name, x in tensors.items() if f"lora_{ab}" in name) for ab in "AB"}
  assert (counts["lora_a"], counts["lora_b"]) == (sizes["A"], sizes["B"])
  assert counts["trainable"] == sizes["A"] + sizes["B"] == counts["total"] - counts["frozen"]
  assert counts["percent"] == pytest.approx(100 * counts["trainable"] / counts["total"])
  assert all(row["scale"] == pytest.approx(5 / 3) for row in summary(run_dir)["targets"])


def test_samples_are_drawn_before_and_after(finished):
  run_dir, _ = finished
  found = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
  assert [(row["step"], row["prompt"]) for row in found] == [(step, p) for step in (0, 24) for p in ("Once", "a dog")]
  assert all(row["text"] for row in found)


def base_arrays(run_dir) -> dict[str, np.ndarray]:
  cfg = load_config(str(run_dir))
  model = build_model(cfg.model, 257)
  return {name: np.asarray(x) for name, x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()}


def test_every_frozen_array_is_byte_for_byte_that_of_the_base(finished):
  run_dir, after = finished
  base = base_arrays(run_dir)
  assert summary(run_dir)["parameters"]["frozen"] == sum(x.size for x in base.values())
  assert after == [digest(base)] == [summary(run_dir)["fingerprints"]["base"]]


def test_a_changed_base_would_be_seen(data, tmp_path, monkeypatch, capfd):
  checked = pack_training.check_frozen

  def spoiled(job, before):
    checked(replace(job, frozen=jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-6), job.frozen)), before)

  monkeypatch.setattr(pack_training, "check_frozen", spoiled)
  run_dir = train(tmp_path / "run", *TINY, *data, *SHORT, code=1)
  assert "base changed" in capfd.readouterr().err
  assert summary(run_dir)["status"] == "failed" and not (run_dir / "adapter").exists()
  assert not (run_dir / "wandb").exists() and not (run_dir / "samples.jsonl").exists()  # logger=none, sample=none


def test_evaluating_a_run_gives_the_losses_of_its_summary(finished, capfd):
  run_dir, _ = finished
  before = everything(run_dir)
  assert entry.run(["task=evaluate", f"run={run_dir}"]) == 0
  said = capfd.readouterr().out
  losses = summary(run_dir)["losses"]
  for loss in (losses["base"], losses["best"], losses["retain_base"]):
    assert f"{loss:.4g}" in said
  assert everything(run_dir) - before == {run_dir / "evaluations.jsonl"}


# ---- which modules, at which rank


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "ranks"), [
  (["lora.rank=128"], dict.fromkeys(["mha.query", "mha.key", "mha.value", "mha.out", "linear1", "linear2"], 128)),
  (["lora.targets=[blocks.*.mha.query,blocks.*.mha.value]", "lora.layers=[0]"], {"mha.query": 8, "mha.value": 8}),
  ([r"lora.targets='re:blocks\.[01]\.linear1'", "lora=rslora"], {"linear1": 8}),
  (["lora.targets=all_linear", "lora.exclude=[attention]", "+lora.rank_pattern={linear2: 5}"],
   {"linear1": 8, "linear2": 5}),
  (["lora.targets=[embeddings,head]", "lora.rank=2"], {"token_emb": 2, "pos_emb": 2, "output_layer": 2}),
])
def test_targets_choose_what_is_adapted(settings, ranks, data, tmp_path):
  run_dir = train(tmp_path / "run", *TINY, *data, *SHORT, *[s.removeprefix("+") for s in settings])
  tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
  found = {name.removeprefix("base_model.model.").removeprefix("blocks.0.").removesuffix(".lora_A.weight"): len(x)
           for name, x in tensors.items() if "lora_A" in name}
  assert found == ranks
  rank = max(ranks.values())
  for row in summary(run_dir)["targets"]:
    divisor = math.sqrt(row["rank"]) if "lora=rslora" in settings else row["rank"]
    assert row["scale"] == pytest.approx(16 / divisor)
  assert json.loads((run_dir / "adapter" / "adapter_config.json").read_text())["r"] == rank


# ---- the two reference lines, and weights in and out


@pytest.fixture(scope="module")
def full(data, tmp_path_factory):
  return train(tmp_path_factory.mktemp("full") / "run", *TINY, *data, *SHORT, "lora=full", "train.steps=6")


def test_what_full_training_wrote_is_the_base_of_the_next_run(full, data, tmp_path):
  found, weights = summary(full), full / "model.safetensors"
  assert not (full / "adapter").exists()
  size = sum(x.size for x in load_file(weights).values())
  assert found["parameters"]["trainable"] == found["parameters"]["total"] == size
  assert found["losses"]["final"] < found["losses"]["base"]
  frozen = train(tmp_path / "run", *TINY, *data, *SHORT, "lora=frozen", f"model.weights={weights}")
  losses = summary(frozen)["losses"]
  assert losses["base"] == losses["final"] == found["losses"]["final"]
  assert summary(frozen)["parameters"]["trainable"] == summary(frozen)["steps"] == 0
  assert not (frozen / "adapter").exists() and not (frozen / "model.safetensors").exists()
  assert summary(frozen)["fingerprints"]["base"] == digest(load_file(weights))


def test_weights_that_do_not_fit_are_listed_at_once(full, data, in_tmp_path, capfd):
  tensors = load_file(full / "model.safetensors")
  tensors["blocks.9.linear1.kernel"] = tensors.pop("blocks.0.linear1.kernel")
  tensors["pos_emb.embedding"] = tensors["pos_emb.embedding"][:7].copy()
  save_file(tensors, in_tmp_path / "odd.safetensors")
  assert entry.run([*TINY, *data, "model.weights=odd.safetensors"]) == 2
  said = capfd.readouterr().err
  for words in ("blocks.0.linear1.kernel is missing", "blocks.9.linear1.kernel is not in the model",
                "pos_emb.embedding is (7, 32)"):
    assert words in said
  (in_tmp_path / "odd.safetensors").write_bytes(b"no tensors")
  assert entry.run([*TINY, *data, "model.weights=odd.safetensors"]) == 2
  assert "not a complete safetensors file" in capfd.readouterr().err
  assert [path.name for path in in_tmp_path.iterdir()] == ["odd.safetensors"]


# ---- sources


def test_of_json_lines_only_the_responses_are_learned(tmp_path, capfd):
  pairs = [(f"Say number {i}:", "It is " + "one " * (i % 5 + 1)) for i in range(40)]
  file = tmp_path / "pairs.jsonl"
  rows_of_file = [{"question": p, "answer": r, "id": n} for n, (p, r) in enumerate(pairs)]
  file.write_text("".join(json.dumps(row) + "\n" for row in [*rows_of_file, {"question": "Unanswered"}]))
  settings = ["data=jsonl", f"data.path={file}", "data.prompt_field=question", "data.response_field=answer"]
  run_dir = train(tmp_path / "run", *TINY, *settings, "train.steps=null", "train.epochs=1", "train.eval_every=0",
                  "train.eval_tokens=null", "train.batch_size=1", "train.save_every=0")
  counted = [len(response) + 1 for _, response in pairs]  # bytes, and the end of the document
  held = counted[9::10]  # each tenth document
  assert rows(run_dir, "eval")[0]["counted"] == sum(held)
  assert summary(run_dir)["tokens"] == sum(counted) - sum(held)
  counts = {count["reason"].split(";")[0]: count["count"] for count in summary(run_dir)["not_learned"]}
  assert counts == {"the column 'id' is not read": 40, "there is no column 'answer'": 1}
  assert summary(run_dir)["data_notes"] == []
  capfd.readouterr()
  assert entry.run(["task=evaluate", f"run={run_dir}"]) == 0
  assert f"{summary(run_dir)['losses']['best']:.4g}" in capfd.readouterr().out


@pytest.mark.slow
def test_the_jax_tutorial_runs_on_a_small_file_of_stories(tmp_path, capfd):
  run_dir = train(tmp_path / "run", "experiment=jax_tutorial", *on_stories(tmp_path)[1:], "train.batch_size=8",
                  "train.epochs=null", "train.steps=2", "logger=none", "sample.max_tokens=4", "train.eval_tokens=500")
  found = summary(run_dir)
  paths = [*(f"blocks.{i}.{name}" for i in range(4) for name in ("linear1", "linear2")), "output_layer"]
  assert [row["path"] for row in found["targets"]] == paths
  assert {row["scale"] for row in found["targets"]} == {1} and {row["rank"] for row in found["targets"]} == {128}
  assert found["tokens"] == 2 * 8 * 256  # pads are in the loss
  a, b = 4 * 2 * 256 + 256, 4 * 2 * 256 + 50257
  assert (found["parameters"]["lora_a"], found["parameters"]["lora_b"]) == (128 * a, 128 * b)
  tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
  assert all(x.any() for name, x in tensors.items() if "lora_B" in name)  # B left its zeros, as A did
  assert {row["step"] for row in map(json.loads, (run_dir / "samples.jsonl").open())} == {0, 2}


# ---- meshes


@pytest.mark.slow
def test_eight_devices_train_as_one_does(data, tmp_path):
  settings = [*TINY, *data, "train.steps=4", "train.batch_size=8", "train.eval_tokens=300", "train.save_every=0"]
  done = process(*settings, "mesh.data=4", "mesh.tensor=2", "hydra.run.dir=eight", cwd=tmp_path, devices=8)
  assert done.returncode == 0, done.stderr
  assert "Sharding over data 4 × tensor 2" in done.stdout and "blocks.*.linear1.kernel" in done.stdout
  assert summary(tmp_path / "eight")["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2, "trial": 1}
  one = train(tmp_path / "one", *settings)
  losses = lambda run_dir: [row["loss"] for row in rows(run_dir)]
  assert losses(tmp_path / "eight") == pytest.approx(losses(one), rel=1e-5)


# ---- several runs


@pytest.mark.slow
def test_a_multirun_continues_after_a_failed_run(data, in_tmp_path, capfd):
  assert entry.run(["-m", *TINY, *data, *SHORT, "lora.targets=qv,nosuch,mlp"]) == 1
  said = capfd.readouterr()
  assert "nosuch matches no module" in said.err and "Traceback" not in said.err
  sweep, = in_tmp_path.glob("outputs/sweeps/*/*")
  done = [path.parent for path in sorted(sweep.glob("*/summary.json"))]
  assert [path.name for path in done] == ["0", "2"]
  for run_dir, names in zip(done, ({"query", "value"}, {"linear1", "linear2"}), strict=True):
    assert summary(run_dir)["status"] == "done" and (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert {row["path"].split(".")[-1] for row in summary(run_dir)["targets"]} == names
  assert summary(done[0])["fingerprints"] == summary(done[1])["fingerprints"]


# ---- the first command of all


@pytest.mark.slow
def test_the_default_run_improves_its_base_which_is_made_once(tmp_path):
  first = process("hydra.run.dir=first", cwd=tmp_path)
  assert first.returncode == 0, first.stderr
  found = summary(tmp_path / "first")
  assert found["base"]["kind"] == "pretrain"
  assert found["base"]["loss"] <= found["base"]["bigram_loss"] - 0.3
  assert found["losses"]["base"] - found["losses"]["best"] >= 0.15 and found["held_out_tokens"] >= 20_000
  assert "pretrain" in first.stdout and "below the base" in first.stdout
  loss = f'"loss": {found["base"]["loss"]}'
  base, = (path for path in everything(cache()) if path.name == "base.json" and loss in path.read_text())
  before = base.stat().st_mtime_ns
  second = process("hydra.run.dir=second", cwd=tmp_path)
  assert second.returncode == 0, second.stderr
  assert base.stat().st_mtime_ns == before and "pretrained once" not in second.stdout
  again = summary(tmp_path / "second")
  assert (again["fingerprints"], again["losses"]) == (found["fingerprints"], found["losses"])
