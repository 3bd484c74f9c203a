"""Models that are not language models, in the same training loop: blox's regression and penzai's XOR."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from runs import curve, process, resume, rows, summary, train
from safetensors.numpy import load_file

from lora_exp import lora
from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import InputError, MlpConfig, ModelConfig
from lora_exp.config.metrics import METRICS
from lora_exp.data.encoding.examples import decode, encode
from lora_exp.data.sources import registry
from lora_exp.data.sources.regression import Regression
from lora_exp.data.sources.xor import Xor
from lora_exp.lora.kernels import shape as kernel_shape
from lora_exp.models.factory import build_model
from lora_exp.models.modules.multilayer_perceptron import MultilayerPerceptron
from lora_exp.train.compute.loss import example_loss

QUIET = ["logger=none"]
BLOX = ["experiment=blox_mlp", *QUIET]
XOR = ["experiment=penzai_xor", *QUIET]
FREE = "expectations=null"  # of a run that is not the experiment's


@pytest.fixture(scope="module")
def blox(tmp_path_factory):
  return train(tmp_path_factory.mktemp("blox") / "run", *BLOX)


def mlp() -> MultilayerPerceptron:
  """The base of blox_mlp."""
  sizes = MlpConfig(inputs=16, hidden=[64, 32], outputs=10)
  return build_model(ModelConfig(family="mlp", dropout=0.0, mlp=sizes), 0)


def adapted(run_dir) -> MultilayerPerceptron:
  """The base of blox_mlp with the adapter of a run on it."""
  model = mlp()
  shapes = {path: kernel_shape(module) for path, module in lora.modules(model).items()}
  lora.attach(model, lora.load_adapter(run_dir / "adapter", None, shapes), compute="factored")
  return model


# ---- experiment=blox_mlp: patch an existing MLP


def test_the_loss_falls_with_only_hidden_layers_adapted(blox):
  found = summary(blox)
  assert found["status"] == "done" and found["losses"]["final"] < 0.8 * found["losses"]["base"]
  assert [row["path"] for row in found["targets"]] == ["layers.0", "layers.1"]
  assert {(row["rank"], row["alpha"], row["scale"]) for row in found["targets"]} == {(4, 8, 2)}
  assert found["parameters"]["trainable"] == 4 * (16 + 64) + 4 * (64 + 32)


def test_normal_init_has_a_deviation_of_one_over_root_rank():
  row, shape = lora.AdaptedModule("layers.1", 4096, 64, 4, 8, 2), jax.ShapeDtypeStruct((4096, 64), jnp.float32)
  drawn = lora.draw([row], {row.path: 4096}, {row.path: shape}, jax.random.key(0), init="normal")
  a = drawn[row.path]["lora_a"]
  assert np.std(a) == pytest.approx(0.5, rel=0.02) and abs(np.mean(a)) < 0.02


def test_disabling_the_adapter_restores_the_base(blox):
  x, _ = Regression().examples()
  base, model = mlp(), adapted(blox)
  trained = model(x)
  assert not np.allclose(trained, base(x), atol=0.05)
  with lora.disabled(model):
    np.testing.assert_array_equal(model(x), base(x))
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(model, x), jax.jit(lambda m, x: m(x))(base, x))
  np.testing.assert_array_equal(model(x), trained)


def test_merging_keeps_outputs_and_unmerging_keeps_bytes(blox):
  x, _ = Regression().examples()
  model = adapted(blox)
  before, kernel = model(x), np.array(model.layers[0].kernel[...])
  with pytest.raises(KeyError), lora.merged(model):
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    assert not isinstance(model.layers[0], lora.AdapterLayer)
    assert (model.layers[0].kernel[...] != kernel).any()
    raise KeyError  # whatever ends it, the base comes back
  np.testing.assert_array_equal(model.layers[0].kernel[...], kernel)
  np.testing.assert_array_equal(model(x), before)


class Aware(nnx.Module):
  """The same MLP, written with adapters from the start: blox's second design."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden0 = lora.LoRALinear(16, 64, rank=4, alpha=8, init="normal", rngs=rngs)
    self.hidden1 = lora.LoRALinear(64, 32, rank=4, alpha=8, init="normal", rngs=rngs)
    self.output = nnx.Linear(32, 10, rngs=rngs)

  def __call__(self, x):
    return self.output(nnx.relu(self.hidden1(nnx.relu(self.hidden0(x)))))


def test_patched_and_lora_aware_models_train_alike(tmp_path):
  """A plain loop of optax and `nnx.split` over the aware model, from the numbers that the run started with."""
  run_dir = train(tmp_path / "run", *BLOX, FREE, "train.steps=30", "train.export=last", "train.eval_every=0")
  start = train(tmp_path / "start", *BLOX, FREE, "train.steps=1", "optim.lr=1e-30")
  base, patched, model = mlp(), adapted(start), Aware(rngs=nnx.Rngs(7))
  for ours, layer in ((model.hidden0, patched.layers[0]), (model.hidden1, patched.layers[1])):
    assert ours.lora_a.shape == layer.lora_a.shape and not ours.lora_b[...].any()
    ours.lora_a[...], ours.kernel[...] = layer.lora_a[...], layer.kernel[...]
  model.output.kernel[...] = base.output.kernel[...]
  x, y = Regression().examples()
  graph, params, frozen = nnx.split(model, nnx.LoRAParam, ...)

  @jax.jit
  def step(params):
    loss = lambda params: jnp.mean((nnx.merge(graph, params, frozen)(x) - y) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    return optax.apply_updates(params, jax.tree.map(lambda g: -0.01 * g, grads)), value

  losses = []
  for _ in range(30):
    params, value = step(params)
    losses.append(float(value))
  np.testing.assert_allclose([row["loss"] for row in rows(run_dir, "train")], losses, rtol=2e-5)


# ---- experiment=penzai_xor


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
  return train(tmp_path_factory.mktemp("xor") / "run", *XOR)


def test_xor_is_solved_in_20_steps(solved):
  x, y = Xor().examples()
  assert (y == (x[:, 0] != x[:, 1])).all()
  last = rows(solved, "eval")[-1]
  assert (last["step"], last["accuracy"], last["counted"]) == (20, 1.0, 4) and last["loss"] < 0.1
  assert [row["path"] for row in summary(solved)["targets"]] == ["layers.0", "layers.1", "output"]


def test_a_base_can_be_pretrained_on_numbers(tmp_path):
  making = ["model.pretrain.steps=40", "model.pretrain.warmup=0"]
  argv = ["model=mlp", *making, "data=xor", "data@retain=none", "data@pretrain_data=xor", "model.base=pretrain", *QUIET]
  run_dir = train(tmp_path / "run", *argv, "train.steps=2", "train.eval_every=0", "lora=frozen")
  assert summary(run_dir)["base"]["kind"] == "pretrain"
  facts, losses = summary(run_dir)["base"], summary(run_dir)["losses"]
  assert losses["base"] == pytest.approx(facts["loss"], rel=1e-5) and losses["base"] < 0.5
  assert facts["bigram_loss"] is None and facts["nats_per_byte"] is None


# ---- the loop is that of text


def test_each_experiment_checks_its_expectations(blox, solved):
  for run_dir, names in ((blox, ["trainable", "loss_falls", "base_changed", "merged_differs", "off_differs"]),
                         (solved, ["trainable", "accuracy", "base_changed"])):
    assert list(summary(run_dir)["expectations"]) == names
    assert all(result["holds"] for result in summary(run_dir)["expectations"].values())


def test_a_run_that_learns_too_little_fails_its_expectation(tmp_path, capfd):
  train(tmp_path / "run", *BLOX, "train.steps=2", "train.eval_every=0", code=1)
  assert "1 of 5 expectations do not hold: loss_falls" in capfd.readouterr().err


def test_evaluating_a_run_finds_what_the_run_found(blox, solved, capfd):
  for run_dir, words in ((blox, []), (solved, ["accuracy"])):
    assert entry.run(["task=evaluate", f"run={run_dir}"]) == 0
    base, trained = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert trained["loss"] == pytest.approx(summary(run_dir)["losses"]["final"], rel=1e-5)
    assert base["loss"] == pytest.approx(summary(run_dir)["losses"]["base"], rel=1e-5)
    assert [k for k in ("perplexity", "accuracy", "bits_per_byte") if trained[k] is not None] == words
  assert "nats below" not in capfd.readouterr().out


def test_metrics_without_a_meaning_are_left_out(blox, solved, capfd):
  text_only = {"perplexity", "bits_per_byte", "exact"}
  for run, expected in ((solved, {"loss", "accuracy"}), (blox, {"loss"})):
    train_row, eval_row = rows(run, "train")[0], rows(run, "eval")[0]
    assert train_row.keys() - METRICS.keys() == {"step", "tokens", "split", "grad_norm", "lr", "tokens_per_s"}
    halves = {f"{half}_{metric}" for half in ("tuning", "report") for metric in expected}
    assert eval_row.keys() - METRICS.keys() == {"step", "tokens", "split", "counted"} | halves
    for row in (train_row, eval_row):
      assert row.keys() & {"loss", "accuracy", *text_only} == expected
  assert summary(blox)["perplexity"] is None and rows(blox, "train")[-1]["tokens"] == 100 * 32


def test_the_console_counts_examples(tmp_path, capfd):
  train(tmp_path / "run", *XOR, FREE, "train.steps=1")
  printed = capfd.readouterr().out
  assert "over 4 examples" in printed and "task=evaluate run=" in printed
  result = printed.split("Result")[1]
  assert not [word for word in ("perplexity", "nats", "tokens", "held-out", "task=generate") if word in result]


def test_the_adapter_file_says_that_peft_cannot_load_it(blox):
  assert json.loads((blox / "adapter" / "adapter_config.json").read_text())["peft"] is False
  tensors = load_file(blox / "adapter" / "adapter_model.safetensors")
  assert tensors["base_model.model.layers.0.lora_A.weight"].shape == (4, 16)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
  settings = [*XOR, FREE, "data.shuffle=true", "train.batch_size=3",
              "train.steps=8", "train.eval_every=4", "optim.accumulate=3"]
  whole = train(tmp_path / "whole", *settings)
  stopped = train(tmp_path / "stopped", *settings, "train.stop_at=5", code=75)
  shutil.copytree(stopped, tmp_path / "copy")
  resume(tmp_path / "copy")
  assert curve(tmp_path / "copy") == curve(whole)


def test_full_training_works_too(tmp_path):
  run_dir = train(tmp_path / "run", *XOR, FREE, "lora=full", "optim.lr=0.05")
  assert rows(run_dir, "eval")[-1]["accuracy"] == 1
  assert (run_dir / "model.safetensors").is_file()


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path):
  few = [FREE, "train.steps=5", "train.eval_every=0"]
  one = train(tmp_path / "one", *BLOX, *few)
  argv = [*BLOX, *few, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", f"hydra.run.dir={tmp_path / 'eight'}"]
  done = process(*argv, cwd=tmp_path, devices=8)
  assert done.returncode == 0, done.stderr
  losses = [[row["loss"] for row in rows(run_dir)] for run_dir in (one, tmp_path / "eight")]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_plan_counts_the_products_as_by_hand(in_tmp_path, capfd):
  assert entry.run([*BLOX, "task=plan"]) == 0
  M, R = 32, 4
  layer = lambda i, o: 2 * M * (i * o + i * R + R * o + o * R + R * o + i * R)  # x·W, x·A, ·B; dy·Bᵀ, dB, dA
  dx, output = 2 * M * (32 * 64 + 4 * 64), 2 * 2 * M * 32 * 10  # no dx below the first adapter
  assert f"{layer(16, 64) + layer(64, 32) + dx + output:,}" in capfd.readouterr().out


# ---- losses and rows


@pytest.mark.parametrize("classes", [True, False])
def test_losses_equal_numpy_and_skip_padding(classes):
  rng = np.random.default_rng(0)
  z, weights = rng.normal(size=(6, 3)), np.array([1, 1, 0, 1, 1, 0.0])
  y = rng.integers(0, 3, 6).astype(np.int32) if classes else rng.normal(size=(6, 3)).astype(np.float32)
  if classes:
    each = np.log(np.exp(z).sum(1)) - z[np.arange(6), y]
  else:
    each = ((z - y) ** 2).mean(1)
  sums = example_loss(jnp.asarray(z, jnp.float32), jnp.asarray(y), jnp.asarray(weights, jnp.float32))
  assert float(sums.loss) == pytest.approx((each * weights).sum(), rel=1e-6)
  assert (sums.correct is None) if not classes else float(sums.correct) == ((z.argmax(1) == y) * weights).sum()


@pytest.mark.parametrize("table", [Xor().examples, Regression().examples])
def test_rows_keep_every_bit(table):
  x, y = table()
  records = encode(x, y)
  batch = decode([*records, bytes(len(records[0]))], x.shape[1], y.ndim == 1)
  np.testing.assert_array_equal(batch["x"][:-1], x)
  np.testing.assert_array_equal(batch["y"][:-1], y)
  assert batch["y"].dtype == y.dtype and batch["weights"].tolist() == [1.0] * len(x) + [0.0]


# ---- what does not go together


@pytest.mark.parametrize(("argv", "problems"), [
  (["model=mlp", "data@retain=none"],
   ["data.source=stdlib: is text, but model.family=mlp reads numbers; add {data}"]),
  (["model=mlp", "data=xor"],
   ["retain.source=stdlib: is text, but model.family=mlp reads numbers; add {data@retain} or data@retain=none"]),
  (["data=xor"], ["data.source=xor: is numeric, but model.family=minigpt reads text; add model=mlp"]),
  (["model=mlp", "data=regression", "data@retain=none"],
   ["model.mlp.inputs=2: must be 16 with data.source=regression",
    "model.mlp.outputs=2: must be 10 with data.source=regression"]),
  (["experiment=penzai_xor", "model.mlp.activation=rleu"],
   ["model.mlp.activation=rleu: choose gelu, gelu_tanh, relu, silu; did you mean relu?"]),
  (["experiment=penzai_xor", "model.mlp.hidden=[4,0]"], ["model.mlp.hidden=[4, 0]: each must be at least 1"]),
  (["experiment=penzai_xor", "data.seq_len=4"], ["data.seq_len=4: must be 1, because each row of xor is one example"]),
  (["experiment=penzai_xor", "model.mlp=null"], ["model.mlp=null: model.family=mlp needs its sizes; add model=mlp"]),
  (["experiment=penzai_xor", "task=generate"],
   ["task=generate: model.family=mlp generates no text; use task=evaluate"]),
  (["experiment=penzai_xor", "lora.layers=[2]"],
   ["lora.layers=[2]: must be numbers of blocks from 0 to 1, or null for all"]),
])
def test_settings_that_contradict_each_other_are_refused(argv, problems):
  with pytest.raises(InputError) as error:
    check_command_line(argv)
  numeric = [name for name, source in registry().items() if source.numeric]
  choices = {f"{{{group}}}": " or ".join(f"{group}={name}" for name in numeric) for group in ("data", "data@retain")}
  for placeholder, text in choices.items():
    problems = [problem.replace(placeholder, text) for problem in problems]
  assert error.value.problems == problems
