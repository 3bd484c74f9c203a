"""Adapters as people have them, made by PEFT: our program computes PEFT's logits from each, and PEFT from ours."""

import json
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers_models import headless, reference, sizes, their_logits, tokens_of

from lora_exp import compose, lora
from lora_exp.config import Config, InputError
from lora_exp.train.base import make_base
from lora_exp.train.compute.program import assemble
from lora_exp.train.loaded_run import LoadedRun, open_run
from lora_exp.train.plan import Plan, make_plan

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = tokens_of(0)[:1, :10]
BASES = {
  "llama": ("Llama", sizes(16, 2, 2, 1, 8, 24)),
  "tied": ("Llama", sizes(16, 2, 2, 1, 8, 24, tie_word_embeddings=True)),
  "qwen2": ("Qwen2", headless(16, 2, 2, 1, 8, 24)),
  "mixtral": ("Mixtral", sizes(16, 2, 2, 1, 8, 24, num_local_experts=4, num_experts_per_tok=2)),
  "qwen3_moe": ("Qwen3Moe", sizes(
    16, 2, 2, 1, 8, 20, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)),
}


@pytest.fixture(autouse=True)
def quick():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@dataclass(frozen=True)
class Base:
  """A random model of transformers, and its directory."""

  model: Any
  directory: Path

  def copy(self):
    return deepcopy(self.model)


@cache
def base_of(name: str) -> Base:
  kind, arguments = BASES[name]
  model, directory = reference(kind, arguments, seed=1), Path(mkdtemp(prefix="lora_exp_others_"))
  model.save_pretrained(directory)
  return Base(model, directory)


def made(base: str, directory: Path, prepare: Callable[[Any], Any] | None = None, **settings: Any) -> np.ndarray:
  """Writes an adapter of PEFT with random values to `directory`; returns PEFT's logits from the written file."""
  model = base_of(base).copy()
  if prepare is not None:
    prepare(model)
  embeddings = settings.pop("save_embedding_layers", "auto")
  settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings))
    draw = torch.Generator().manual_seed(2)
    for x in theirs.parameters():
      if x.requires_grad:
        x.data = x.data + 0.2 * torch.randn(x.shape, generator=draw)
    theirs.save_pretrained(str(directory), save_embedding_layers=embeddings)
    return in_peft(base, directory, prepare)


def in_peft(base: str, directory: Path, prepare: Callable[[Any], Any] | None = None) -> np.ndarray:
  """PEFT's logits from the adapter in `directory`."""
  model = base_of(base).copy()
  if prepare is not None:
    prepare(model)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return their_logits(peft.PeftModel.from_pretrained(model, str(directory)).eval(), TOKENS)


def config_of(base: str, directory: Path) -> Config:
  return compose(["task=evaluate", "model=hf", f"model.weights={base_of(base).directory}", "data=stdlib_code",
                  "model.tokenizer=bytes", f"lora.init_from={directory}"])  # fmt: skip


def planned(base: str, directory: Path) -> Plan:
  return make_plan(config_of(base, directory))


def agrees(base: str, directory: Path, want: np.ndarray) -> LoadedRun:
  """Asserts that we compute `want`, which are not the base's logits, from `directory`."""
  run = open_run(config_of(base, directory))
  params, trial = run.single()
  model = assemble(run.job.program, params, trial, run.frozen, None)
  np.testing.assert_allclose(np.asarray(model(jnp.asarray(TOKENS))), want, atol=1e-4, rtol=0)
  without = their_logits(base_of(base).model, TOKENS)
  assert np.abs(want[..., : without.shape[-1]] - without).max() > 0.05
  return run


def edit_config(directory: Path, **values: Any) -> None:
  file = directory / CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rename(directory: Path, change: Callable[[str], str]) -> None:
  save_file({change(name): x for name, x in load_file(directory / WEIGHTS).items()}, directory / WEIGHTS)


PREFIX = "base_model.model."
NAMES: dict[str, Callable[[str], str]] = {
  "adapter": lambda name: name.replace(".weight", ".default.weight"),
  "compiled": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
  "compiled layers": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
  "doubled": lambda name: PREFIX + name,
  "missing": lambda name: name.removeprefix(PREFIX),
  "without model": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
  "language_model": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
  "former language_model": lambda name: name.replace(PREFIX, f"{PREFIX}language_model."),
  "ddp": lambda name: f"module.{name}",
}


def test_names_of_other_tools_are_understood(tmp_path):
  want = made("llama", tmp_path)
  tensors = (tmp_path / WEIGHTS).read_bytes()
  first = agrees("llama", tmp_path, want).plan.start
  for change in NAMES.values():
    (tmp_path / WEIGHTS).write_bytes(tensors)
    rename(tmp_path, change)
    found = planned("llama", tmp_path).start
    assert found.rows == first.rows
    for path, leaves in first.leaves.items():
      assert all((found.leaves[path][name] == x).all() for name, x in leaves.items())


TARGETS = {
  "word": ("all-linear", "all-linear"),
  "pattern": (["q_proj", "v_proj"], r"(?:.*?text.*?attn.*?(?:q|v)_proj.*?)|(?:model\.layers\.\d+\..*?(?:q|v)_proj)"),
  "names": (["q_proj", "v_proj"], "|".join(rf"model\.layers\.{i}\..*\.{x}_proj" for i in range(500) for x in "qv")),
  "others": (["q_proj", "v_proj"], ["q_proj", "v_proj", "query_key_value"]),
  "none": (["q_proj", "v_proj"], None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_modules_are_those_with_tensors(tmp_path, name):
  targets, written = TARGETS[name]
  want = made("llama", tmp_path, target_modules=targets)
  edit_config(tmp_path, target_modules=written)
  agrees("llama", tmp_path, want)
  edit_config(tmp_path, target_modules=["k_proj"])
  with pytest.raises(InputError, match="does not name .* modules whose tensors are in the file"):
    planned("llama", tmp_path)


def widen(model) -> None:
  torch.manual_seed(3)
  model.resize_token_embeddings(270, mean_resizing=False)


BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
  "tied, both saved": ("tied", {"modules_to_save": BOTH}),
  "tied, head saved": ("tied", {"modules_to_save": ["lm_head"]}),
  "tied, table saved": ("tied", {"modules_to_save": ["embed_tokens"]}),
  "tied, head adapted": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
  "tied, table adapted": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
  "tied, both adapted": ("tied", {"target_modules": ["q_proj", *BOTH]}),
  "untied, both saved": ("llama", {"modules_to_save": BOTH}),
  "untied, both adapted": ("llama", {"target_modules": ["q_proj", *BOTH]}),
  "saved beside": ("llama", {"save_embedding_layers": True}),
  "wider": ("llama", {"prepare": widen, "save_embedding_layers": True}),
  "wider, tied": ("tied", {"prepare": widen, "save_embedding_layers": True}),
  "wider, adapted": ("llama", {"prepare": widen, "target_modules": ["q_proj", *BOTH]}),
  "wider, saved": ("llama", {"prepare": widen, "modules_to_save": BOTH}),
  "tokens": ("llama", {"trainable_token_indices": [40, 7]}),
  "tokens of a tied table": ("tied", {"trainable_token_indices": {"embed_tokens": [40, 7]}}),
  "parameters": ("llama", {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}),
  "output biases": ("llama", {"lora_bias": True, "target_modules": ["q_proj", "down_proj", "lm_head"]}),
  "output biases beside others": ("qwen2", {"lora_bias": True, "lora_alpha": 4, "use_rslora": True}),
  "mixed": ("qwen2", {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 4},
                      "alpha_pattern": {"layers.0.self_attn.v_proj": 9}}),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_of_peft_computes_the_same_both_ways(tmp_path, name):
  base, settings = KINDS[name]
  want = made(base, tmp_path / "theirs", **settings)
  run = agrees(base, tmp_path / "theirs", want)
  adapter = run.plan.start
  assert lora.save_adapter(tmp_path / "ours", adapter, run.plan.naming(), {})
  np.testing.assert_allclose(in_peft(base, tmp_path / "ours", settings.get("prepare")), want, atol=1e-4, rtol=0)
  again = planned(base, tmp_path / "ours")
  assert (again.start.rows, again.start.base.untied) == (adapter.rows, adapter.base.untied)
  assert (again.start.full.keys(), again.vocab_size) == (adapter.full.keys(), run.plan.vocab_size)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_part_that_peft_subtracts_is_computed_from_the_base(tmp_path, init):
  want = made("llama", tmp_path, init_lora_weights=init, use_rslora=init == "pissa", rank_pattern={"v_proj": 2})
  run = agrees("llama", tmp_path, want)
  assert run.plan.cfg.lora.method == init


@pytest.mark.parametrize("pruned", [False, True])
def test_adalora_of_peft_is_read_as_lora(tmp_path, pruned):
  """PEFT divides by the rank before pruning, also for modules that lost ranks, or all of them."""
  model = base_of("qwen2").copy()
  settings = {"init_r": 4, "target_r": 2, "lora_alpha": 5, "total_step": 10, "target_modules": ["q_proj", "down_proj"]}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.get_peft_model(model, peft.AdaLoraConfig(task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(2)
    for x in theirs.parameters():
      if x.requires_grad:
        x.data = 0.5 * torch.randn(x.shape, generator=draw)
    if pruned:
      names = [name for name, _ in theirs.base_model.model.named_parameters() if "lora_E" in name]
      masks = [[True, False, True, False], [False] * 4, [True] * 4, [False, False, False, True]]
      theirs.peft_config["default"].rank_pattern = dict(zip(names, masks, strict=True))
    theirs.save_pretrained(str(tmp_path))
  run = agrees("qwen2", tmp_path, in_peft("qwen2", tmp_path))
  assert run.plan.start.method == "lora"
  assert sorted(row.rank for row in run.plan.table) == ([1, 2, 4] if pruned else [4] * 4)


@pytest.mark.parametrize(("base", "targets"), [("llama", None), ("tied", ["embed_tokens"])])
def test_trainable_tokens_of_peft_are_read(tmp_path, base, targets):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tokens = [int(TOKENS[0, 3]), 7]
    settings = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=tokens, target_modules=targets)
    theirs = peft.get_peft_model(base_of(base).copy(), settings)
    for x in theirs.parameters():
      if x.requires_grad:
        x.data = x.data + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    theirs.save_pretrained(str(tmp_path))
  run = agrees(base, tmp_path, in_peft(base, tmp_path))
  assert not run.plan.table and list(run.plan.start.base.token_rows) == ["embed_tokens"]
  with pytest.raises(InputError, match="it has no trained module, so there is nothing to train further"):
    make_plan(replace(config_of(base, tmp_path), task="train"))


@pytest.mark.parametrize(("name", "said"), [
  ("tokens", "2 token rows of embed_tokens (32 values) are used as the file has them, and are not trained further"),
  ("output biases", "5 output biases (327 values) are used"),
  ("saved beside", "2 parameters of the base (embed_tokens.embedding, …; 8,416 values) are used"),
])  # fmt: skip
def test_what_further_training_leaves_out_is_said(tmp_path, capfd, name, said):
  base, settings = KINDS[name]
  made(base, tmp_path, **settings)
  edit_config(tmp_path, base_model_name_or_path="another/base")
  cfg = replace(config_of(base, tmp_path), task="train")
  make_base(make_plan(replace(cfg, lora=replace(cfg.lora, bias="all", layers=[0]))))
  output = capfd.readouterr()
  shown = " ".join((output.out + output.err).split())
  assert f"it was trained on another/base, and is applied to {base_of(base).directory}" in shown
  assert said in shown and "lora.layers=[0], lora.bias=all has no effect" in shown


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def single_experts(directory: Path, modules: tuple[str, str, str], count: int, **config: Any) -> None:
  """Rewrites the adapter of attention in `directory` with random factors for each module of every expert."""
  rng, tensors = np.random.default_rng(5), load_file(directory / WEIGHTS)
  sizes = {modules[0]: (16, 24), modules[1]: (16, 24), modules[2]: (24, 16)}
  for layer in range(2):
    for expert in range(count):
      for module, (fan_in, fan_out) in sizes.items():
        name = f"{PREFIX}model.layers.{layer}.{module.format(expert)}"
        tensors[f"{name}.lora_A.weight"] = np.float32(0.3 * rng.normal(size=(3, fan_in)))
        tensors[f"{name}.lora_B.weight"] = np.float32(0.3 * rng.normal(size=(fan_out, 3)))
  save_file(tensors, directory / WEIGHTS)
  edit_config(directory, target_modules=["q_proj", "v_proj", *(x.rpartition(".")[2] for x in modules)], **config)


def exchanged(directory: Path, count: int) -> None:
  """Rewrites the factors of experts as PEFT 0.18 stored them: with the outputs of A and the inputs of B."""
  tensors = load_file(directory / WEIGHTS)
  for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
    other = name.replace("lora_A", "lora_B")
    a, b = tensors[name], tensors[other]
    a_ERi, b_oRE = a.reshape(count, -1, a.shape[1]), b.reshape(len(b), -1, count)
    tensors[name] = np.ascontiguousarray(b_oRE.transpose(2, 1, 0).reshape(-1, len(b)))
    tensors[other] = np.ascontiguousarray(a_ERi.transpose(2, 1, 0).reshape(a.shape[1], -1))
  save_file(tensors, directory / WEIGHTS)
  edit_config(directory, peft_version="0.18.1")


@pytest.mark.parametrize("base", ["mixtral", "qwen3_moe"])
def test_experts_of_every_release_of_peft_are_read(tmp_path, base):
  want = made(base, tmp_path, target_parameters=EXPERTS)
  run = agrees(base, tmp_path, want)
  assert lora.save_adapter(tmp_path / "ours", run.plan.start, run.plan.naming(), {}, dropout=0.1)
  np.testing.assert_allclose(in_peft(base, tmp_path / "ours"), want, atol=1e-4, rtol=0)
  again = planned(base, tmp_path / "ours").start
  assert again.rows == run.plan.start.rows
  for path, leaves in run.plan.start.leaves.items():
    assert all((again.leaves[path][name] == x).all() for name, x in leaves.items())
  exchanged(tmp_path, 4)
  agrees(base, tmp_path, want)
  tensors = load_file(tmp_path / "ours" / WEIGHTS)
  tensors[next(name for name in tensors if ".experts." in name)][3, 5] = np.inf
  save_file(tensors, tmp_path / "ours" / WEIGHTS)
  with pytest.raises(InputError, match="experts.* has values that are not finite"):
    planned(base, tmp_path / "ours")
  edit_config(tmp_path, target_parameters=EXPERTS[:1])
  with pytest.raises(InputError, match="the factors of 2 parameters, but target_parameters of the config names gate_"):
    planned(base, tmp_path)
  assert {row.path for row in run.plan.table} >= {f"layers.{i}.{name}" for i in range(2) for name in EXPERTS}


def test_experts_with_a_module_each_are_read(tmp_path):
  made("mixtral", tmp_path)
  single_experts(tmp_path, ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3",
                             "block_sparse_moe.experts.{}.w2"), 4)  # fmt: skip
  run = agrees("mixtral", tmp_path, in_peft("mixtral", tmp_path))
  assert {row.rank for row in run.plan.table if "gate_up" in row.path} == {6}
  some = [row for row in run.plan.start.rows if "down_proj" in row.path or "v_proj" in row.path]
  part = replace(run.plan.start, rows=tuple(some), leaves={row.path: run.plan.start.leaves[row.path] for row in some})
  assert lora.save_adapter(tmp_path / "ours", part, run.plan.naming(), {})
  agrees("mixtral", tmp_path / "ours", in_peft("mixtral", tmp_path / "ours"))
  tensors = load_file(tmp_path / WEIGHTS)
  save_file({name: x for name, x in tensors.items() if "experts.3.w2" not in name}, tmp_path / WEIGHTS)
  with pytest.raises(InputError, match="3 of 4 experts have tensors, although target_modules names 4"):
    planned("mixtral", tmp_path)


def test_single_experts_are_read_and_written(tmp_path):
  """PEFT has tensors of all experts, which are zero for those that are not adapted."""
  made("mixtral", tmp_path)
  single_experts(tmp_path, ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3",
                             "block_sparse_moe.experts.{}.w2"), 4)  # fmt: skip
  tensors = load_file(tmp_path / WEIGHTS)
  others = [name for name in tensors if re.search(r"experts\.[02]\.", name)]
  save_file(tensors | {name: np.zeros_like(tensors[name]) for name in others}, tmp_path / WEIGHTS)
  want = in_peft("mixtral", tmp_path)
  save_file({name: x for name, x in tensors.items() if name not in others}, tmp_path / WEIGHTS)
  edit_config(tmp_path, target_modules=r".*(q_proj|v_proj|experts\.[13]\.w[123])")
  run = agrees("mixtral", tmp_path, want)
  assert {row.kernels for row in run.plan.table} == {None, (1, 3)}
  down = [row for row in run.plan.start.rows if "gate_up" not in row.path]
  part = replace(run.plan.start, rows=tuple(down), leaves={row.path: run.plan.start.leaves[row.path] for row in down})
  assert lora.save_adapter(tmp_path / "ours", part, run.plan.naming(), {})
  again = agrees("mixtral", tmp_path / "ours", in_peft("mixtral", tmp_path / "ours"))
  assert set(again.plan.table) == set(down)
