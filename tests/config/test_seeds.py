"""One word, `seed`, moves adapter init, dropout and the order of rows; explicit seeds win."""

import pytest

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import Config, InputError, to_config


def config(*overrides: str) -> Config:
  return check_command_line(overrides).jobs[0]


@pytest.mark.parametrize(("typed", "expected"), [
  ((), (0, 0, 0)), (("seed=2",), (2, 2, 2)), (("seed=2", "train.seed=5"), (2, 5, 2)),
  (("data.seed=0", "seed=3"), (3, 3, 0)),
])  # fmt: skip
def test_seeds_follow_the_one_word_unless_typed(typed, expected):
  cfg = config(*typed)
  assert (cfg.seed, cfg.train.seed, cfg.data.seed) == expected
  assert (cfg.model.seed, cfg.sample.seed) == (0, 0)
  assert cfg.pretrain_data.seed == cfg.retain.seed == 0


@pytest.mark.parametrize(("typed", "message"), [
  ("sead=1", "did you mean seed"), ("train.sed=1", "did you mean train.seed"), ("seed=x", "seed=x: must be a whole"),
  ("seed=-1", "seed=-1: must be between 0"), ("seed=null", "seed=null: must be a whole"),
])  # fmt: skip
def test_a_bad_seed_is_named(typed, message):
  with pytest.raises(InputError, match=message):
    config(typed)


def test_old_arithmetic_examples_keep_their_seed():
  data = {"source": "arithmetic", "seed": 3}
  assert to_config({"data": data}).data.options == {"examples_seed": 3}
  assert to_config({"seed": 3, "data": data}).data.options == {}
  assert to_config({"data": {"source": "arithmetic", "seed": 0}}).data.options == {}
