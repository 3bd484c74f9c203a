"""Adapter files as other tools write them: their names, changed bases, and what is said of those that do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import DOWN, FULL, KINDS, LLAMA, SHAPES, Q, adapter
from safetensors.numpy import load_file, save_file

from lora_exp import lora
from lora_exp.config import InputError
from lora_exp.lora.peft_files.names import PREFIX

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TABLE = f"{PREFIX}model.embed_tokens.weight"
UNTIED = replace(LLAMA, tied=None)
HEAD = {"lm_head": (14, 31)}


def load(directory: Path, naming: Any = LLAMA, **more: tuple[int, ...]) -> lora.Adapter:
  full = FULL | {f"{path}.kernel": shape for path, shape in more.items()}
  return lora.load_adapter(directory, naming, SHAPES | more, full)


def problems_of(directory: Path, naming: Any = LLAMA, **more: tuple[int, ...]) -> list[str]:
  with pytest.raises(InputError) as error:
    load(directory, naming, **more)
  return error.value.problems


@pytest.fixture
def directory(tmp_path) -> Path:
  lora.save_adapter(tmp_path, KINDS["lora"][0], LLAMA, {})
  return tmp_path


def add(directory: Path, **tensors: np.ndarray) -> None:
  save_file(load_file(directory / WEIGHTS) | tensors, directory / WEIGHTS)


def configure(directory: Path, **values: Any) -> None:
  config = json.loads((directory / CONFIG).read_text())
  (directory / CONFIG).write_text(json.dumps(config | values))


def test_two_adapters_in_one_file_are_refused(directory):
  tensors = load_file(directory / WEIGHTS)
  names = {name.replace(".weight", f".{x}.weight"): y for name, y in tensors.items() for x in ("default", "other")}
  save_file(names, directory / WEIGHTS)
  [problem] = problems_of(directory)
  assert "holds several adapters (default, other)" in problem


def test_a_tensor_under_two_names_is_refused(directory):
  name = f"{PREFIX}model.{Q}.lora_A.weight"
  add(directory, **{name.replace(PREFIX, f"{PREFIX}_orig_mod."): load_file(directory / WEIGHTS)[name]})
  [problem] = problems_of(directory)
  assert "both name the tensor base_model" in problem


def test_tensors_of_a_vision_tower_are_one_problem(directory):
  vision = f"{PREFIX}model.vision_tower.encoder.layers"
  add(directory, **{f"{vision}.{i}.self_attn.q_proj.lora_A.weight": np.zeros((3, 14), np.float32) for i in range(9)})
  [problem] = problems_of(directory)
  assert "9 tensors adapt the part of the model that reads images or sound, such as" in problem


def test_an_adapter_of_a_larger_model_is_one_problem(tmp_path):
  lora.save_adapter(tmp_path, KINDS["lora"][0], LLAMA, {})
  shapes = {path: (2 * a, 2 * b) for path, (a, b) in SHAPES.items()}
  with pytest.raises(InputError) as error:
    lora.load_adapter(tmp_path, LLAMA, shapes, {})
  assert len(error.value.problems) <= 4 and all("layers.11" not in x or "alike" in x for x in error.value.problems)


def test_a_module_that_the_config_omits_is_named(directory):
  configure(directory, target_modules=["q_proj"])
  [problem] = problems_of(directory)
  assert f"target_modules=q_proj does not name 1 module whose tensors are in the file, such as {DOWN}" in problem
  configure(directory, target_modules=["q_proj", "down_proj"])
  [problem] = problems_of(directory)
  assert "the tensors of 1 module are missing, such as layers.11.mlp.down_proj" in problem


def test_saved_embeddings_replace_the_base_without_training(directory):
  table = np.random.default_rng(0).normal(size=(31, 14)).astype(np.float32)
  add(directory, **{TABLE: table})
  found = load(directory)
  assert not found.full and found.base.parameters["embed_tokens.embedding"].tobytes() == table.tobytes()
  lora.save_adapter(directory / "again", found, LLAMA, {})
  again = load(directory / "again")
  assert again.base.parameters["embed_tokens.embedding"].tobytes() == table.tobytes()
  with pytest.raises(InputError, match="also changes its base"):
    lora.combine_adapters([found, found], [1, 1])


@pytest.mark.parametrize(("rows", "said"), [
  (33, "and the file lacks the new rows of lm_head; enlarge the base"), (29, "it was trained on another base"),
])  # fmt: skip
def test_another_vocabulary_is_said_in_one_sentence(directory, rows, said):
  add(directory, **{TABLE: np.zeros((rows, 14), np.float32)})
  [problem] = problems_of(directory, UNTIED, **HEAD)
  assert f"embed_tokens.weight has {rows} tokens, the model's vocabulary has 31" in problem and said in problem


def test_a_larger_vocabulary_enlarges_the_model(directory):
  tables = {name: np.ones((33, 14), np.float32) for name in (TABLE, f"{PREFIX}lm_head.weight")}
  add(directory, **tables)
  found = load(directory, UNTIED, **HEAD)
  assert found.base.vocab_size == 33 and found.base.parameters["lm_head.kernel"].shape == (14, 33)
  assert load(directory).base.parameters.keys() == {"embed_tokens.embedding"}  # a tied model
  tables[TABLE] = np.ones((34, 14), np.float32)
  add(directory, **tables)
  [problem] = problems_of(directory, UNTIED, **HEAD)
  assert "has 34 tokens, and lm_head.weight has 33" in problem


def test_rows_of_tokens_need_their_ids(directory):
  name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
  add(directory, **{name: np.ones((2, 14), np.float32)})
  assert any("trainable_tokens_delta is not part of the adapter" in x for x in problems_of(directory))
  configure(directory, trainable_token_indices=[3, 31])
  [problem] = problems_of(directory)
  assert "has token 31; the model has 31 tokens" in problem
  configure(directory, trainable_token_indices={"embed_tokens": [3, 30]})
  ids, rows = load(directory).base.token_rows["embed_tokens"]
  assert ids.tolist() == [3, 30] and (rows == 1).all()
  configure(directory, trainable_token_indices=[3, 3])
  [problem] = problems_of(directory)
  assert "must be a list of token ids" in problem


def test_changes_are_applied_to_the_arrays_of_a_base():
  base = {"embed_tokens.embedding": np.zeros((5, 2), np.float32), "q.bias": np.ones(3, np.float32)}
  table = {"embed_tokens": (np.array([4, 1]), np.array([[1, 2], [3, 4]]))}
  changes = lora.BaseChanges(token_rows=table, biases={"q": np.array([1.0, 2, 3])})
  found = changes.apply(base)
  np.testing.assert_array_equal(found["embed_tokens.embedding"], [[0, 0], [3, 4], [0, 0], [0, 0], [1, 2]])
  np.testing.assert_array_equal(found["q.bias"], [2, 3, 4])
  assert base["embed_tokens.embedding"].sum() == 0 and not lora.BaseChanges()


@pytest.mark.parametrize(("init", "method"), [("pissa", "pissa"), ("pissa_niter_4", "pissa"), ("olora", "olora")])
def test_what_was_subtracted_is_computed_from_the_kernel(tmp_path, init, method, capfd):
  lora.save_adapter(tmp_path, adapter("lora", {Q: 3}), LLAMA, {})
  configure(tmp_path, init_lora_weights=init)
  found, w = load(tmp_path), np.random.default_rng(1).normal(size=SHAPES[Q]).astype(np.float32)
  said = " ".join(capfd.readouterr().err.split())
  assert found.method == method and ("random numbers" in said) == ("niter" in init)
  leaves = lora.completed(found, {Q: w})[Q]
  a, b = np.asarray(leaves["start_a"]), np.asarray(leaves["start_b"])
  if method == "pissa":
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(found.rows[0].scale * a @ b, u[:, :3] * s[:3] @ vt[:3], atol=1e-5)
  else:
    q, r = np.linalg.qr(w.T)
    np.testing.assert_allclose(a @ b, (q[:, :3] @ r[:3]).T, atol=1e-5)


def test_no_advice_needs_a_session_that_is_over(directory):
  for init in ("loftq", "corda", "lora_ga"):
    configure(directory, init_lora_weights=init)
    [problem] = problems_of(directory)
    assert f"init_lora_weights={init}: PEFT changes the base" in problem and "path_initial_model" not in problem


def test_patterns_that_name_no_adapted_module_are_said(directory, capfd):
  patterns = {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"layers.2.self_attn.q_proj": 9, "down_proj": 4}}
  config = json.loads((directory / CONFIG).read_text())
  configure(directory, **{name: config[name] | more for name, more in patterns.items()})
  load(directory)
  shown = " ".join(capfd.readouterr().err.split())
  assert "rank_pattern names no adapted module with k_proj; this has no effect, as in PEFT" in shown
  assert "alpha_pattern names no adapted module with layers.2.self_attn.q_proj; this has" in shown
