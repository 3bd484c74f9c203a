"""A bad value is reported in one line, with its setting and what is allowed, before anything is created."""

from pathlib import Path

import pytest

from lora_exp.cli.command_line import check_command_line
from lora_exp.config import Config, InputError
from lora_exp.lora import methods


def config(*overrides: str) -> Config:
  """The checked config of one command line."""
  return check_command_line(overrides).jobs[0]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
  path = tmp_path / "stories.txt"
  path.write_text("One.<|endoftext|>Two.")
  return path


def test_setting_weights_sets_the_base(tmp_path):
  (tmp_path / "model.safetensors").touch()
  weights = f"model.weights={tmp_path}"
  for model in ("minigpt", "minigpt_tiny"):  # whose bases are pretrained and random
    assert config(f"model={model}", weights).model.base == "weights"
  with pytest.raises(InputError, match="remove one of them"):
    config(weights, "model.base=random")


def test_a_published_model_with_random_weights():
  cfg = config("model=smollm2_135m", "model.base=random", "model.tokenizer=bytes")
  assert cfg.model.base == "random" and cfg.model.weights is not None


def test_an_unknown_method_is_refused_with_the_methods_there_are():
  with pytest.raises(InputError) as caught:
    config("lora.method=lorra")
  assert str(caught.value) == f"lora.method=lorra: choose {', '.join(methods.names())}; did you mean lora?"


def test_relative_paths_become_absolute(in_tmp_path):
  (in_tmp_path / "a.txt").write_text("One.")
  assert config("data=text", "data.path=a.txt").data.path == str(in_tmp_path / "a.txt")
  assert config('cache="~/c"').cache == str(Path.home() / "c")


@pytest.mark.parametrize(("override", "words"), [
  ("model.heads=7", "must divide model.width"),
  ("model.dropout=1", "below 1"),
  ("model.dtype=float16", "choose float32, bfloat16"),
  ("model.base=weights", "model.weights=null: model.base=weights needs"),
  ("model.weights=/no/such", "no such file"),
  ("data.path=stories.txt", "the source stdlib does not read a file; add data="),
  ("model.pretrain.warmup=99999", "at most model.pretrain.steps"),
  ("data@pretrain_data=none", "data@pretrain_data=stdlib_code"),
  ("data.seq_len=9999", "at most model.max_len"),
  ("retain.seq_len=9999", "retain.seq_len=9999: must be at most"),
  ("pretrain_data.seq_len=9999", "pretrain_data.seq_len=9999: must be at most"),
  ("data.view=null", "choose code, docs"),
  ("data.view=doc", "did you mean docs?"),
  ("data.eval_fraction=1", "between 0 and 1"),
  ("data.pad_in_loss=true", "needs data.packing=pad"),
  ("data.limit=0", "at least 1"),
  ("mesh.data=0", "at least 1, or -1"),
  ("mesh.trial=2", "must be 1"),
  ("lora.rank=0", "at least 1"),
  ("lora.alpha=-1", "above 0"),
  ("lora.targets=3", "must be a pattern"),
  ("lora.targets=[]", "at least one module"),
  ('lora.targets="re:(q"', "not a regular expression"),
  ('lora.exclude="re:*"', "not a regular expression"),
  ("lora.layers=1", "must be a list"),
  ("lora.layers=[99]", "numbers of blocks from 0 to"),
  ("lora.rank_pattern={query: 0}", "lora.rank_pattern.query=0: must be at least 1"),
  ("lora.alpha_pattern={query: 0}", "must be above 0"),
  ("lora.init=normall", "did you mean normal?"),
  ("optim.lr=0", "above 0"),
  ("optim.betas=[0.9]", "two numbers"),
  ("optim.betas=[0.9,1.0]", "below 1"),
  ("optim.eps=0", "above 0"),
  ("optim.accumulate=3", "must divide train.batch_size"),
  ("optim.clip=0", "above 0"),
  ("train.steps=null", "give train.steps or train.epochs"),
  ("train.epochs=1", "add train.steps=null"),
  ("train.seed=-1", "between 0 and"),
  ("sample.top_p=0", "above 0 and at most 1"),
  ('sample.prompts=[""]', "empty prompt"),
  ("logger.mode=on", "choose auto, online, offline"),
  ("model.width=1000000000", "at most 1,048,576"),
  ("model.layers=100000000", "at most 256"),
  ("model.ff=1000000000000", "at most 4,194,304"),
  ("train.batch_size=12345678901234567890", "at most 1,048,576"),
  ("lora.rank=1000000000", "at most 1,048,576"),
  ("lora.rank_pattern={query: 1000000000}", "at most 1,048,576"),
  ("sample.max_tokens=1000000000", "at most 16,777,216"),
  ("train.eval_tokens=1e30", "at most 1,000,000,000,000,000"),
  ("train.steps=1e12", "at most 2,147,483,647"),
  ("train.steps=1e300", "at most 2,147,483,647"),
  ("train.steps=1.5", "a whole number"),
  ("train.batch_size=-8", "at least 1"),
  ("train.save_every=1e300", "at most 2,147,483,647"),
  ("data.limit=0.5", "a whole number"),
  ("data.limit=1e300", "at most 1,000,000,000,000,000"),
  ("model.pretrain.steps=1e300", "at most 2,147,483,647"),
  ("optim.lr=1e300", "at most 3e+38"),
  ("optim.lr=inf", "a finite number"),
  ("optim.eps=1e-300", "above 0 (at least 1e-37)"),
  ("name=a/b", "plain file name"),
  ("name=..", "plain file name"),
  ("logger.project=hf_abcdefghijklmnopqrstuvwx", "looks like a Hugging Face token"),
])
def test_a_bad_value_is_one_line_with_setting_and_remedy(override, words):
  with pytest.raises(InputError) as caught:
    check_command_line([override])
  assert len(caught.value.problems) == 1, caught.value.problems
  assert words in caught.value.problems[0]
  assert "\n" not in caught.value.problems[0]


@pytest.mark.parametrize("method", ["vera", "ia3"])
def test_a_method_without_alpha_accepts_null_or_the_default(method):
  assert [config(f"lora={method}", f"lora.alpha={text}").lora.alpha for text in ("null", "16")] == [None, 16.0]
  with pytest.raises(InputError, match="lora.alpha=8.0: .* has no alpha"):
    config(f"lora={method}", "lora.alpha=8")


@pytest.mark.parametrize(("epochs", "words"), [
  ("1e9", "at most 1,000,000"), ("1e300", "at most 1,000,000"), ("inf", "a finite number"), ("nan", "a finite number"),
  ("-0.5", "above 0"), ("0", "above 0"), ("many", "a number"),
])  # fmt: skip
def test_epochs_without_sense_are_refused(epochs, words):
  with pytest.raises(InputError, match=words) as caught:
    check_command_line(["train.steps=null", f"train.epochs={epochs}"])
  assert "train.epochs=" in str(caught.value)


def test_all_problems_of_a_config_come_together():
  with pytest.raises(InputError) as caught:
    check_command_line(["lora.rank=0", "optim.lr=-1", "train.batch_size=0", "data=text", "name=a/b"])
  assert sorted(p.split(":")[0] for p in caught.value.problems) == \
    ["data.path=null", "lora.rank=0", "name=a/b", "optim.lr=-1.0", "train.batch_size=0"]


def test_a_missing_file_suggests_a_file_beside_it(text_file):
  typed = f"data.path={text_file.parent}/storys.txt"
  with pytest.raises(InputError, match=rf"{typed}: no such file; did you mean stories.txt"):
    check_command_line(["data=text", typed])
  with pytest.raises(InputError, match="is a device; write its content to a file"):
    check_command_line(["data=text", "data.path=/dev/zero"])


def test_the_tutorial_asks_for_its_file_by_name():
  with pytest.raises(InputError, match=r"data\.path=FILE.*TinyStories.*<\|endoftext\|>"):
    check_command_line(["experiment=jax_tutorial"])


def test_an_adapter_to_start_from_must_exist(tmp_path):
  with pytest.raises(InputError, match="lora.init_from=/no/such: no such directory"):
    check_command_line(["lora.init_from=/no/such"])
  (tmp_path / "adapter").mkdir()
  with pytest.raises(InputError, match=r"contains no adapter_config.json \(a run's adapter is in RUN/adapter\)"):
    check_command_line([f"lora.init_from={tmp_path}"])
  (tmp_path / "adapter").rename(tmp_path / "default")
  (tmp_path / "default" / "adapter_config.json").write_text("{}")
  with pytest.raises(InputError, match=r"contains no adapter_config.json; the subdirectory default contains one"):
    check_command_line([f"lora.init_from={tmp_path}"])
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(InputError, match="it contains a complete model, which model.weights reads"):
    check_command_line([f"lora.init_from={tmp_path}"])
  with pytest.raises(InputError, match="is a file; give its directory"):
    check_command_line([f"lora.init_from={tmp_path / 'config.json'}"])
  with pytest.raises(InputError, match="no such directory.*hf download some/adapter --local-dir DIR"):
    check_command_line(["lora.init_from=some/adapter"])


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_key_that_no_file_has_is_set_below_a_mapping(sign):
  assert config("lora=ia3", f"{sign}lora.options.feedforward=[mlp]").lora.options == {"feedforward": ["mlp"]}
  assert config(f"{sign}lora.rank_pattern.query=3").lora.rank_pattern == {"query": 3}


def test_a_key_that_no_file_has_is_swept():
  line = check_command_line(["-m", "lora=ia3", "lora.options.feedforward=[mlp],[]", "logger=none"])
  assert [cfg.lora.options for cfg in line.jobs] == [{"feedforward": ["mlp"]}, {"feedforward": []}]


@pytest.mark.parametrize(("text", "words"), [
  (b"def score(prediction, reference, prompt)\n  return 1\n", "line 1: expected ':'"),
  (b"score = 1\0", "null byte"),
  (b"def scores(prediction, reference, prompt):\n  return 1\n", "has no function score"),
  (b"x = " + b"(" * 5000, "metric.py"),
])  # fmt: skip
def test_a_metric_file_is_parsed_before_anything_is_made(text, words, tmp_path):
  file = tmp_path / "metric.py"
  file.write_bytes(text)
  with pytest.raises(InputError, match=words):
    config(f"eval.metric_file={file}")
