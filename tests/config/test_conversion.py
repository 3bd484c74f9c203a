"""Plain values become a typed config exactly, or every problem is reported."""

import math

import pytest

from lora_exp.config import InputError, to_config
from lora_exp.config.setting_names import is_setting, suggestion


def test_all_unknown_keys_and_wrong_types_are_reported():
  values = {"lora": {"rnk": 4, "rank": 1.5}, "train": {"steps": True}, "optim": {"lr": math.nan, "betas": 3},
            "model": 5, "sead": 1, "retain": {"limit": "all"}}
  with pytest.raises(InputError) as caught:
    to_config(values)
  problems = caught.value.problems
  assert "lora.rnk: no such setting; did you mean lora.rank?" in problems
  for start in ("lora.rank=1.5: must be a whole number", "train.steps=true: must be a whole number",
                "optim.lr=nan: must be a finite number", "optim.betas=3: must be [a number", "model=5: must be a group",
                "sead: no such setting; did you mean seed?", "retain.limit=all: must be a whole number"):
    assert any(problem.startswith(start) for problem in problems), (start, problems)
  assert len(problems) == 8


@pytest.mark.parametrize(("value", "expected"), [(3, 3), (3.0, 3), (1e3, 1000), ("1e2", 100)])
def test_an_integer_may_be_written_as_a_float(value, expected):
  steps = to_config({"train": {"steps": value}}).train.steps
  assert steps == expected and type(steps) is int


def test_rope_scaling_takes_any_mapping_of_names():
  scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
  assert to_config({"model": {"arch": {"rope_scaling": scaling}}}).model.arch.rope_scaling == scaling
  with pytest.raises(InputError, match=r"model\.arch\.rope_scaling=linear: must be \{name: a value\}"):
    to_config({"model": {"arch": {"rope_scaling": "linear"}}})


@pytest.mark.parametrize("value", [1.5, "1.5", True, "many", [3], {"a": 1}, math.inf, -math.inf])
def test_what_is_no_integer_is_refused_and_not_rounded(value):
  with pytest.raises(InputError, match=r"train\.steps=.*: must be"):
    to_config({"train": {"steps": value}})


@pytest.mark.parametrize(("path", "meant"), [
  ("rank", "lora.rank"), ("lora.rnk", "lora.rank"), ("lora.lr", "optim.lr"), ("target_modules", "lora.targets"),
  ("optim.learning_rate", "optim.lr"), ("retian", "retain"), ("train.epoch", "train.epochs"), ("lora.r", "lora.rank"),
])
def test_an_unknown_setting_suggests_the_intended_one(path, meant):
  assert not is_setting(path)
  assert f"did you mean {meant}" in suggestion(path)


def test_a_random_base_of_a_published_shape():
  weights = {"model": {"weights": "some/model", "base": "random"}}
  assert to_config(weights).model.base == "random"
  weights["model"]["base"] = "pretrain"
  assert to_config(weights).model.base == "weights"
