"""Adapter files are restored bit for bit; damaged or incompatible files raise an error of one sentence."""

import json
import pickle
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import DOWN, FAR, FULL, GPT2, KINDS, LLAMA, SHAPES, Q, adapter
from safetensors.numpy import load_file, save_file

from lora_exp import lora
from lora_exp.config import InputError

CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "lora_exp.json"


def load(directory: Path, kind: str = "lora", naming: Any = LLAMA) -> lora.Adapter:
  return lora.load_adapter(directory, KINDS[kind][1] and naming, SHAPES, FULL)


def same(found: lora.Adapter, wanted: lora.Adapter) -> None:
  """Asserts equality of all bits, except for the norms of the base's kernels, which files do not contain."""
  assert (found.method, found.rows, found.full.keys()) == (wanted.method, wanted.rows, wanted.full.keys())
  for path, own in wanted.leaves.items():
    assert found.leaves[path].keys() == own.keys() - {"kernel_norm2"}
    for name, x in found.leaves[path].items():
      assert x.dtype == own[name].dtype and x.tobytes() == np.ascontiguousarray(own[name]).tobytes(), (path, name)
  for path, x in wanted.full.items():
    assert found.full[path].tobytes() == x.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_from_its_files_bit_for_bit(tmp_path, kind):
  wanted, naming, metadata = KINDS[kind]
  peft = lora.save_adapter(tmp_path / "adapter", wanted, naming, metadata, base="some/base", dropout=0.1)
  assert peft is not kind.startswith("our own")
  assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS, METADATA]
  same(load(tmp_path / "adapter", kind), wanted)
  config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
  metadata = json.loads((tmp_path / "adapter" / METADATA).read_text())
  assert config.get("peft", True) is peft and ("reason" in metadata) is not peft
  assert (config["base_model_name_or_path"], metadata["method"]) == ("some/base", wanted.method)


def test_an_adapter_with_metadata_in_its_config_is_read(tmp_path):
  for kind in ("pissa", "float64", "our own names"):
    wanted, naming, metadata = KINDS[kind]
    lora.save_adapter(tmp_path, wanted, naming, metadata)
    own = json.loads((tmp_path / METADATA).read_text())
    (tmp_path / METADATA).unlink()
    ranks = config_of(tmp_path).get("rank_pattern", {})
    anchored = {f"^{re.escape(name)}" if naming else name: rank for name, rank in ranks.items()}
    rewrite(tmp_path, lora_exp=own, peft=naming is not None, ensure_weight_tying=False, rank_pattern=anchored)
    same(load(tmp_path, kind), wanted)


# The fields of LoraConfig in PEFT 0.10.0; it refuses a file with any other.
FIELDS_0_10 = {
  "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
  "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
  "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
  "megatron_core", "loftq_config", "use_dora", "layer_replication",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "biases and modules", "all biases", "float64"])
def test_the_config_has_fields_of_peft_0_10_only(root, kind):
  config = config_of(saved_in(root, kind))
  assert config.keys() <= FIELDS_0_10
  said = {"fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"}
  assert all(config[name] for name in said & config.keys())


def test_patterns_are_names_as_peft_0_13_compares_them(root):
  # It takes the first key that `.*\\.KEY$` matches, or else the name of the module itself.
  config = config_of(saved_in(root, "lora"))
  assert config["rank_pattern"] == {f"model.{DOWN}": 4}
  assert set(config["alpha_pattern"]) < {f"model.{path}" for path in (Q, DOWN, FAR)}


def test_adalora_is_saved_as_lora_of_the_kept_ranks(tmp_path):
  wanted = adapter("adalora", {Q: 3, DOWN: 1, FAR: 2})
  assert lora.save_adapter(tmp_path, wanted, LLAMA, {})
  found = load(tmp_path)
  assert [(row.path, row.rank, row.scale) for row in found.rows] == [
    (row.path, row.rank - 1, row.scale) for row in wanted.rows if row.path != DOWN
  ]
  for path in (Q, FAR):
    np.testing.assert_allclose(found.update_IO(path), wanted.update_IO(path), atol=1e-5)
  lora.save_adapter(tmp_path / "again", found, LLAMA, {})
  same(load(tmp_path / "again"), found)


def test_float32_scales_round_trip_exactly(tmp_path):
  wanted = adapter("lora", {Q: 3, DOWN: 7})
  scale = float(np.float32(5 / 7))
  wanted = replace(wanted, rows=tuple(replace(row, scale=scale, alpha=0.3) for row in wanted.rows))
  lora.save_adapter(tmp_path, wanted, LLAMA, {"scaling": "rslora"})
  same(load(tmp_path), wanted)


def test_stacked_kernels_come_back_with_their_leading_axes(tmp_path):
  rng = np.random.default_rng(0)
  leaves = {Q: {"lora_a": np.float32(rng.normal(size=(5, 14, 3))), "lora_b": np.float32(rng.normal(size=(5, 3, 22)))}}
  wanted = lora.Adapter("lora", (lora.AdaptedModule(Q, 14, 22, 3, 6.0, 2.0, 5 * 3 * 36),), leaves)
  assert lora.save_adapter(tmp_path, wanted, LLAMA, {}) is False
  same(load(tmp_path), wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
  wanted = KINDS["lora"][0]
  lora.save_adapter(tmp_path, wanted, LLAMA, {})
  save_file({name: x.astype(dtype) for name, x in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
  found = load(tmp_path).leaves[Q]["lora_a"]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, wanted.leaves[Q]["lora_a"].astype(dtype).astype(np.float32))


# Damage: each takes (rng, directory) and spoils what lies there


def edit_config(change: Callable[[np.random.Generator, dict], Any]):
  def damage(rng, directory):
    config = json.loads((directory / CONFIG).read_text())
    changed = change(rng, config)
    (directory / CONFIG).write_text(json.dumps(config if changed is None else changed))

  return damage


def put(*values: Any, **keys: list):
  """One of the values for one of the keys, by their names; `put("x", r=[0, 1])`."""

  def change(rng, config):
    name = list(keys)[rng.integers(len(keys))]
    config[name] = keys[name][rng.integers(len(keys[name]))]

  return edit_config(change)


def edit_tensors(change: Callable[[np.random.Generator, dict, str], Any], axes: int = 0):
  """Changes a tensor at random, of `axes` axes that differ in size."""

  def damage(rng, directory):
    tensors = load_file(directory / WEIGHTS)
    names = [n for n, x in sorted(tensors.items()) if not axes or x.ndim == axes and x.shape[0] != x.shape[1]]
    change(rng, tensors, names[rng.integers(len(names))])
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, directory / WEIGHTS)

  return damage


def set_at(value: float):
  def change(rng, tensors, name):
    x = tensors[name] = tensors[name].copy()
    x.flat[rng.integers(x.size)] = value

  return edit_tensors(change)


def edit_bytes(change: Callable[[np.random.Generator, bytes], bytes], file: str = WEIGHTS):
  return lambda rng, directory: (directory / file).write_bytes(change(rng, (directory / file).read_bytes()))


def edit_header(change: Callable[[np.random.Generator, dict, str], Any]):
  """Changes the header, of which `change` may return the new text."""

  def damage(rng, whole):
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__")
    text = change(rng, header, names[rng.integers(len(names))])
    data = (json.dumps(header) if text is None else text).encode()
    return len(data).to_bytes(8, "little") + data + whole[8 + length :]

  return edit_bytes(damage)


def drop_module(rng, tensors, name):
  module = name.rsplit(".lora", 1)[0].rsplit(".vera", 1)[0]
  for other in [n for n in tensors if n.startswith(module)]:
    del tensors[other]


def whole(rng, directory):
  (directory / WEIGHTS).unlink()


def only_a_pickle(rng, directory):
  (directory / WEIGHTS).rename(directory / "adapter_model.bin")


def rename_to(*names: str):
  return lambda rng, tensors, name: tensors.__setitem__(names[rng.integers(len(names))], tensors.pop(name))


def transposed(rng, tensors, name):
  tensors[name] = tensors[name].T


class Loud:
  """An object whose unpickling is detected."""

  def __reduce__(self):
    return (pytest.fail, ("a pickle was run",))


FEATURES = {
  "use_qalora": True, "layer_replication": [[0, 1]], "lora_bias": True, "alora_invocation_tokens": [1, 2],
  "megatron_config": {"a": 1}, "trainable_token_indices": [1], "use_bdlora": {"a": 1},
  "kasa_config": {"beta": 1}, "monteclora_config": {"a": 1}, "velora_config": {"a": 1}, "arrow_config": {"k": 2},
  "loftq_config": {"bits": 4}, "corda_config": {"a": 1}, "something_new": 1, "nested": {"a": {"b": [1]}},
}  # fmt: skip
INVALID = ["(", "[", "a{99999999999}", "*", "(?P<x>", "x" * 3_000_000]
SLOW = ["(.|.)" * 40 + "x", "(.*.*.*.*)*x.*(.|.)" * 9]
LORAS = ("lora", "rslora", "dora", "pissa", "tied table", "biases and modules", "our own names")
DAMAGES: dict[str, tuple[Callable, tuple[str, ...]]] = {
  "a tensor is missing": (edit_tensors(lambda rng, t, name: t.pop(name)), tuple(KINDS)),
  "a module is missing": (edit_tensors(drop_module), ("lora", "rslora", "dora", "pissa")),
  "a tensor is doubled": (edit_tensors(lambda rng, t, name: t.update({name + ".x": t[name] * 1})), tuple(KINDS)),
  "a tensor is renamed": (edit_tensors(rename_to("a", "base_model.model.x.lora_A.weight", "lora_A")), tuple(KINDS)),
  "a tensor has a path for a name": (edit_tensors(rename_to("../../x", "/etc/passwd", "")), tuple(KINDS)),
  "a tensor is transposed": (edit_tensors(transposed, axes=2), LORAS),
  "a tensor is shorter": (edit_tensors(lambda rng, t, name: t.update({name: t[name][:-1]})), tuple(KINDS)),
  "a tensor has an axis more": (edit_tensors(lambda rng, t, name: t.update({name: t[name][None]})), tuple(KINDS)),
  "a tensor is of integers": (edit_tensors(lambda rng, t, name: t.update({name: t[name].astype(np.int32)})), LORAS),
  "NaN": (set_at(np.nan), tuple(KINDS)),
  "infinity": (set_at(-np.inf), tuple(KINDS)),
  "cut short": (edit_bytes(lambda rng, x: x[: rng.integers(len(x))]), tuple(KINDS)),
  "longer": (edit_bytes(lambda rng, x: x + b"\0" * int(rng.integers(1, 99))), tuple(KINDS)),
  "empty": (edit_bytes(lambda rng, x: b""), LORAS),
  "no tensors at all": (edit_bytes(lambda rng, x: b"\2" + bytes(7) + b"{}"), LORAS),
  "a pickle": (edit_bytes(lambda rng, x: pickle.dumps(Loud())), LORAS),
  "a header of 1 GB": (edit_bytes(lambda rng, x: (2**30).to_bytes(8, "little") + x[8:]), LORAS),
  "a header of 16 EB": (edit_bytes(lambda rng, x: b"\xff" * 8 + x[8:]), LORAS),
  "a header that is no JSON": (edit_header(lambda rng, h, name: json.dumps(h)[:-1]), LORAS),
  "a header that is a list": (edit_header(lambda rng, h, name: json.dumps([h])), LORAS),
  "a header of nested lists": (edit_header(lambda rng, h, name: "[" * 200_000), LORAS),
  "a name twice": (edit_header(lambda rng, h, name: f'{json.dumps(h)[:-1]}, "{name}": {json.dumps(h[name])}}}'), LORAS),
  "an entry without a shape": (edit_header(lambda rng, h, name: h[name].pop("shape") and None), LORAS),
  "an entry that is a number": (edit_header(lambda rng, h, name: h.update({name: 7})), LORAS),
  "a shape of words": (edit_header(lambda rng, h, name: h[name].update(shape=["3", True])), LORAS),
  "a negative offset": (edit_header(lambda rng, h, name: h[name].update(data_offsets=[-4, 0])), LORAS),
  "three offsets": (edit_header(lambda rng, h, name: h[name].update(data_offsets=[0, 4, 8])), LORAS),
  "tensors that overlap": (edit_header(lambda rng, h, name: [h[n].update(data_offsets=h[name]["data_offsets"]) for n in
                                                           h if n != "__metadata__"] and None), LORAS),
  "a huge shape": (edit_header(lambda rng, h, name: h[name].update(shape=[2**62, 2**62])), LORAS),
  "an odd dtype": (edit_header(lambda rng, h, name: h[name].update(dtype="F8_E4M3")), LORAS),
  "no weights": (whole, LORAS),
  "only a pickle": (only_a_pickle, LORAS),
  "no config": (lambda rng, d: (d / CONFIG).unlink(), LORAS),
  "a config that is no JSON": (edit_bytes(lambda rng, x: x[: rng.integers(len(x) - 2)], CONFIG), tuple(KINDS)),
  "a config that is no text": (edit_bytes(lambda rng, x: b"\xff\xfe" + x, CONFIG), LORAS),
  "a config that is a list": (edit_config(lambda rng, c: [[c], "x", 3][rng.integers(3)]), LORAS),
  "a config of nested lists": (edit_bytes(lambda rng, x: b"[" * 200_000, CONFIG), LORAS),
  "a huge config": (edit_bytes(lambda rng, x: x + b" " * 2**24, CONFIG), ("lora",)),
  "a huge number": (edit_bytes(lambda rng, x: b'{"r": ' + b"9" * 9999 + b"}", CONFIG), ("lora",)),
  "a key twice": (edit_bytes(lambda rng, x: x.replace(b'"r":', b'"r": 3, "r":'), CONFIG), LORAS),
  "a peft_type unknown": (put(peft_type=["LOHA", "IA3", None, "lora", ["LORA"], 3]), LORAS),
  "a rank that is none": (put(r=[0, -1, None, "3", True, 2.0, 10**9, [3]]), tuple(KINDS)),
  "another rank": (put(r=[17, 1]), ("lora", "dora", "vera")),
  "another rank by a pattern": (put(rank_pattern=[{"q_proj": 17}, {"^.*$": 17}]), ("lora", "dora", "pissa")),
  "rank_pattern that is none": (put(rank_pattern=[[1], "x", {"q_proj": "3"}, {"q_proj": 0}]), LORAS),
  "alpha that is none": (put(lora_alpha=[None, 0, -1, "8", True, float("nan"), float("inf"), 1e31, [8]]), LORAS),
  "alpha missing": (edit_config(lambda rng, c: c.pop("lora_alpha") and None), LORAS),
  "alpha_pattern that is none": (put(alpha_pattern=[[1], {"q": None}, {"q": 0}, {"q": float("nan")}]), LORAS),
  "a pattern that is none": (put(rank_pattern=[{x: 3} for x in INVALID], alpha_pattern=[{x: 3} for x in INVALID],
                                 exclude_modules=INVALID, target_modules=INVALID), ("lora", "dora")),
  "targets that never end": (put(target_modules=[*SLOW, "(a+)+$", ".*.*.*.*.*.*x"]), ("lora", "dora", "vera")),
  "targets that are none": (put(target_modules=[0, False, [], ["x"], [3], {"a": 1}, "x", "../..", ["../q_proj"],
                                                "all-linear"]), ("lora", "dora", "vera")),
  "a target too many": (edit_config(lambda rng, c: c["target_modules"].append("11.mlp.down_proj")), ("lora", "vera")),
  "a target too few": (edit_config(lambda rng, c: c["target_modules"].pop() and None), ("lora", "vera", "dora")),
  "layers that are none": (put(layers_to_transform=["x", [True]], exclude_modules=[["q_proj"], 3, [3]]), ("dora",)),
  "a feature that we have not": (put(**{name: [value] for name, value in FEATURES.items()}), LORAS),
  "a base that was rewritten": (put(init_lora_weights=["pissa_niter_x", "loftq", "corda", "lora_ga", 3, []]), LORAS),
  "biases that are not there": (put(bias=["all", "lora_only", "some", None, 3]), ("lora", "dora", "pissa")),
  "modules that are not there": (put(modules_to_save=[["norm"], ["nrom"], "norm", [3], {"a": 1}, ["../norm"]]),
                                 ("lora", "dora")),
  "another method": (edit_config(lambda rng, c: c.update(use_dora=not c.get("use_dora"))), ("lora", "dora", "pissa")),
  "flags of words": (put(use_dora=["yes", 1], use_rslora=["no", 0], peft=["x", 1], lora_exp=[[], "x"]), LORAS),
  "VeRA's pair not saved": (put(save_projection=[False, None, 1]), ("vera",)),
  "our part is changed": (put(lora_exp=[{"start": "x"}, {"exact": {Q: [1, 9]}}, {"exact": {Q: 3}}, {"leads": [3]},
                                        {"exact": {Q: [None, None]}}, {"leads": {Q: [-1]}}]),
                          ("lora", "rslora", "dora")),
  "a start of odd rank": (put(lora_exp=[{"start": True}]), ("lora",)),
}  # fmt: skip


@cache
def saved_in(root: Path, kind: str) -> Path:
  wanted, naming, metadata = KINDS[kind]
  lora.save_adapter(root / kind, wanted, naming, metadata)
  return root / kind


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_error_names_its_file(root, tmp_path, name):
  damage, kinds = DAMAGES[name]
  rng = np.random.default_rng(len(name))
  for i in range(4):
    kind = kinds[rng.integers(len(kinds))]
    directory = shutil.copytree(saved_in(root, kind), tmp_path / str(i))
    same(load(directory, kind), KINDS[kind][0])
    damage(rng, directory)
    begun = time.monotonic()
    with pytest.raises(InputError) as error:
      load(directory, kind)
    assert time.monotonic() - begun < 5
    assert len(error.value.problems) <= 21
    for problem in error.value.problems:
      assert str(directory) in problem or problem.startswith("… and "), problem
      assert len(problem) < 1000 and "\n" not in problem and "Error(" not in problem


def test_at_least_two_hundred_damaged_adapters_are_tried():
  assert 4 * len(DAMAGES) >= 200


# What a refusal says, and what is no damage


def refusal(directory: Path, **more) -> list[str]:
  with pytest.raises(InputError) as error:
    load(directory, **more)
  return error.value.problems


@pytest.fixture
def directory(root, tmp_path) -> Path:
  return shutil.copytree(saved_in(root, "lora"), tmp_path / "adapter")


def config_of(directory: Path) -> dict[str, Any]:
  return json.loads((directory / CONFIG).read_text())


def rewrite(directory: Path, **keys: Any) -> None:
  (directory / CONFIG).write_text(json.dumps(config_of(directory) | keys))


def test_all_mismatches_are_listed_up_to_twenty(directory):
  tensors = load_file(directory / WEIGHTS)
  name = f"base_model.model.model.{Q}.lora_A.weight"
  tensors[name.replace("lora_A", "lora_a")] = tensors.pop(name)
  tensors[f"base_model.model.model.{DOWN}.lora_B.weight"] = np.zeros((14, 9), np.float32)
  save_file(tensors, directory / WEIGHTS)
  problems = refusal(directory)
  assert len(problems) == 3
  assert any(f"{name} is missing" in p for p in problems)
  assert any(f"did you mean {name}?" in p for p in problems)
  assert any("is (14, 9), expected (14, 4) (r is 4 in " in p for p in problems)
  tensors = {f"base_model.model.model.{Q}.lora_A.x{i}.y": np.zeros(1, np.float32) for i in range(70)}
  save_file(tensors, directory / WEIGHTS)
  [problem] = refusal(directory)
  assert "70 tensors belong to no module of this llama model, such as base_model" in problem


def test_what_all_layers_lack_is_one_problem(directory):
  tensors = load_file(directory / WEIGHTS)
  wide = {name: np.zeros((len(x), 99), np.float32) if f"{Q[9:]}.lora_A" in name else x for name, x in tensors.items()}
  assert sum(x.shape == (3, 99) for x in wide.values()) == 2
  save_file(wide, directory / WEIGHTS)
  [problem] = refusal(directory)
  assert "is (3, 99), expected (3, 14) (r is 3 in" in problem and problem.endswith("(and so in 1 other layer)")


def test_problems_of_both_files_are_named_together(directory):
  rewrite(directory, r=0, lora_alpha=None)
  (directory / WEIGHTS).write_bytes(b"")
  problems = refusal(directory)
  assert all(any(words in p for p in problems) for words in ("r=0", "lora_alpha=null", "complete safetensors file"))
  assert len(problems) == 3


def test_an_adapter_of_another_family_names_nearest_paths(root, tmp_path):
  shapes = {"wte": (31, 14), "h.1.attn.c_attn": (14, 42), "h.1.attn.c_proj": (14, 14)}
  with pytest.raises(InputError, match="6 tensors belong to no module of this gpt2 model.*another model"):
    lora.load_adapter(saved_in(root, "lora"), GPT2, shapes)
  directory = shutil.copytree(saved_in(root, "lora"), tmp_path / "adapter")
  rewrite(directory, target_modules=["k_proj"])
  [problem] = refusal(directory)
  assert "target_modules=k_proj does not name 3 modules whose tensors are in the file" in problem
  assert "did you mean q_proj?" in problem
  rewrite(directory, target_modules=["q_proj"], layers_to_transform=[99])
  [problem] = refusal(directory)
  assert "target_modules=q_proj within layers_to_transform=[99] does not name 3 modules" in problem
  assert "did you mean" not in problem  # q_proj is a module


def test_layer_1_is_not_layer_11_in_either_direction(tmp_path):
  wanted = adapter("lora", {Q: 3, FAR: 5})
  lora.save_adapter(tmp_path, wanted, LLAMA, {})
  config = config_of(tmp_path)
  assert config["target_modules"] == [f"model.{Q}", f"model.{FAR}"]
  same(load(tmp_path), wanted)
  lora.save_adapter(tmp_path, adapter("lora", {FAR: 5}), replace(LLAMA, prefix=""), {})
  assert "11" in json.loads((tmp_path / CONFIG).read_text())["target_modules"]  # a pattern: there are no whole names
  same(load(tmp_path, naming=replace(LLAMA, prefix="")), adapter("lora", {FAR: 5}))


def test_a_head_with_other_values_than_its_table_is_untied(root, tmp_path):
  directory = shutil.copytree(saved_in(root, "tied table"), tmp_path / "adapter")
  rewrite(directory, ensure_weight_tying=False)
  same(load(directory), KINDS["tied table"][0])
  tensors = load_file(directory / WEIGHTS)
  tensors["base_model.model.lm_head.lora_A.weight"][0, 0] += 1
  save_file(tensors, directory / WEIGHTS)
  found = load(directory)
  assert found.base.untied and [row.path for row in found.rows] == ["embed_tokens", Q, "lm_head"]
  assert (found.rows[-1].fan_in, found.rows[-1].fan_out, found.leaves["lm_head"]["lora_a"].shape) == (14, 31, (14, 2))
  rewrite(directory, ensure_weight_tying=True)
  [problem] = refusal(directory)
  assert "lm_head.lora_A.weight differs from the tensor of the embedding" in problem
  without_head = {name: x for name, x in tensors.items() if "lm_head" not in name}
  save_file(without_head, directory / WEIGHTS)
  rewrite(directory, ensure_weight_tying=False, target_modules=["embed_tokens", f"model.{Q}"])
  found = load(directory)
  assert found.base.untied and [row.path for row in found.rows] == ["embed_tokens", Q]


def test_a_saved_embedding_table_must_have_the_models_size(root, tmp_path):
  directory = shutil.copytree(saved_in(root, "tied table"), tmp_path / "adapter")
  tensors, name = load_file(directory / WEIGHTS), "base_model.model.model.embed_tokens.base_layer.weight"
  save_file(tensors | {name: np.ones((31, 14), np.float32)}, directory / WEIGHTS)
  found = load(directory)
  same(found, KINDS["tied table"][0])
  np.testing.assert_array_equal(found.base.parameters["embed_tokens.embedding"], np.ones((31, 14)))
  save_file(tensors | {name: np.zeros((32, 14), np.float32)}, directory / WEIGHTS)
  [problem] = refusal(directory)
  assert "embed_tokens.base_layer.weight has 32 tokens, and model.embed_tokens.lora_embedding_A has 31" in problem


def test_harmless_keys_symlinks_and_a_new_alpha_are_no_damage(directory, tmp_path):
  rewrite(directory, auto_mapping=None, use_qalora=False, loftq_config={}, something_new=None, peft_version="9.9",
          base_model_name_or_path="/home/of/another", lora_dropout=0.3, megatron_core="megatron.core")  # fmt: skip
  (tmp_path / "elsewhere").mkdir()
  for name in (CONFIG, WEIGHTS):
    (tmp_path / "elsewhere" / name).symlink_to(directory / name)
  same(load(tmp_path / "elsewhere"), KINDS["lora"][0])
  rewrite(directory, lora_alpha=12, alpha_pattern={})
  assert {(row.alpha, row.scale) for row in load(directory).rows} == {(12.0, 4.0), (12.0, 3.0)}


def test_a_directory_without_an_adapter_is_refused(tmp_path):
  for path in (tmp_path, tmp_path / "absent"):
    [problem] = refusal(path)
    assert f"{path} contains no adapter: {WEIGHTS} is missing" in problem
