"""Promises of the settings: every file of conf/ fits, every bad value is named, nothing is converted in silence."""

import dataclasses
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_exp.cli.command_line import check_command_line
from lora_exp.cli.compose import composer, conf_directory
from lora_exp.cli.job_config import job_config
from lora_exp.config import Config, InputError, check, to_config
from lora_exp.config.credentials import credential
from lora_exp.config.override_grammar import parse, quoted, quoting_advice
from lora_exp.config.setting_names import is_setting, suggestion
from lora_exp.runtime.saved_config import save_config

CONF = conf_directory()
GROUPS = ("model", "data", "mesh", "lora", "optim", "train", "sample", "logger")


def config(*overrides: str) -> Config:
  """The config of one command line, checked."""
  return check_command_line(overrides).jobs[0]


def files(group: str) -> list[Path]:
  choices = (path for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
  return sorted(path for path in choices if (group, path.stem) != ("data", "none"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
  path = tmp_path / "stories.txt"
  path.write_text("One.<|endoftext|>Two.")
  return path


# ---- conf/


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_of_a_group_has_every_setting_so_that_any_override_fits_any_choice(group):
  section = next(f for f in dataclasses.fields(Config) if f.name == group).default_factory
  with composer(CONF) as composing:
    for path in files(group):  # a file may take its keys from another, as gpt2_xl from gpt2
      keys = yaml.safe_load(path.read_text()).keys()
      if "defaults" in keys:
        keys = composing.compose([f"{group}={path.stem}"])[group].keys()
      assert list(keys) == [field.name for field in dataclasses.fields(section)], path


@pytest.mark.parametrize("group", [*GROUPS, "task"])
def test_every_choice_composes_and_passes_the_checks(group, text_file):
  """Sources need their file, numbers their model, model=hf a checkpoint (test_weights.py), three tasks a run
  (test_export.py, test_dashboard.py, test_inspect.py), SmolLM2 its package (below); no more is missing."""
  numbers = ["data@retain=none", "model=mlp"]
  sizes = ["model.mlp.inputs=16", "model.mlp.outputs=10"]
  needs = {"text": [f"data.path={text_file}"], "jsonl": [f"data.path={text_file}"], "xor": numbers,
           "regression": [*numbers, *sizes], "mlp": ["data@retain=none", "data=xor"]}
  others = ("hf", "smollm2_135m", "merge", "export", "dashboard", "inspect")
  for path in (path for path in files(group) if path.stem not in others):
    assert check(config(f"{group}={path.stem}", *needs.get(path.stem, ()))) == [], path


def test_smollm2_composes_and_passes_the_checks(smollm2_package):
  assert check(config("model=smollm2_135m")) == []


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "experiment").glob("*.yaml")])
def test_every_experiment_passes_the_checks(name, text_file, request):
  if name not in ("jax_tutorial", "blox_mlp", "penzai_xor"):
    request.getfixturevalue("smollm2_package")  # what they run on here
  typed = [f"data.path={text_file}"] if name == "jax_tutorial" else []
  assert check(config(f"experiment={name}", *typed)) == []


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "sweep").glob("*.yaml")])
def test_every_sweep_passes_the_checks_and_is_more_than_one_run(name):
  line = check_command_line([f"sweep={name}"])
  assert line.multirun and len(line.jobs) > 1
  assert len({yaml.safe_dump(asdict(job)) for job in line.jobs}) == len(line.jobs), "two runs of the sweep are equal"


@pytest.mark.parametrize("texts", [
  ["lora.rank=4", "optim.lr=1e-3", "lora.targets=[query,mlp]"], ["lora=dora", "lora.rank=4", "data.seq_len=64"],
  ["+lora.rank_pattern.query=3", "lora.rank=2"], ["data=chatterbot", "sample.prompts=[a,'b c']", "name='x y'"],
  ["optim.clip=null", "lora.rank=8", "optim.clip=2.0"],
])  # fmt: skip
def test_a_job_whose_files_were_read_for_another_is_what_it_is_alone(texts):
  with composer(CONF) as composing:
    whole = lambda cfg: {key: x for key, x in OmegaConf.to_container(cfg).items() if key != "hydra"}
    before = whole(composing.compose_job([], parse(["lora.rank=99", "optim.lr=9.0"], composing.loader)[0]))
    jobs = [whole(composing.compose_job([], parse(texts, composing.loader)[0])) for _ in range(2)]
    assert jobs == [whole(composing.compose(texts))] * 2 and jobs[0] != before


@pytest.mark.parametrize(("name", "overrides"), [
  ("default", []),
  ("jax_tutorial", ["experiment=jax_tutorial", "data.path=/stories.txt"]),
  ("tiny", ["model=minigpt_tiny", "train=quick", "data@retain=none"]),
])
def test_composed_config_is_the_golden_one(name, overrides, golden, monkeypatch):
  monkeypatch.setenv("LORA_EXP_CACHE", "/cache")
  with composer(CONF) as composing:
    cfg = job_config(composing.compose(overrides), parse(overrides, None)[0])
  golden(f"config/{name}.yaml", yaml.safe_dump(asdict(cfg), sort_keys=False))


def test_the_data_group_fills_three_places_each_on_its_own():
  cfg = config("data@pretrain_data=stdlib_docs", "pretrain_data.limit=3", "data@retain=stdlib_docs", "retain.seed=7",
               "data=stdlib_code")
  assert (cfg.data.view, cfg.data.limit, cfg.data.seed) == ("code", None, 0)
  assert cfg.pretrain_data is not None and (cfg.pretrain_data.view, cfg.pretrain_data.limit) == ("docs", 3)
  assert cfg.retain is not None and (cfg.retain.view, cfg.retain.seed) == ("docs", 7)


@pytest.mark.parametrize("off", ["data@retain=none", "~data@retain"])
def test_retain_can_be_switched_off(off):
  assert config(off).retain is None


def test_a_smaller_model_takes_shorter_rows_without_more_typing():
  cfg = config("model.max_len=32")
  assert cfg.data.seq_len == 32 and cfg.retain is not None and cfg.retain.seq_len == 32


# ---- to_config


def test_every_unknown_key_and_wrong_type_is_named_at_once():
  values = {"lora": {"rnk": 4, "rank": 1.5}, "train": {"steps": True}, "optim": {"lr": math.nan, "betas": 3},
            "model": 5, "seed": 1, "retain": {"limit": "all"}}
  with pytest.raises(InputError) as caught:
    to_config(values)
  problems = caught.value.problems
  assert "lora.rnk: no such setting; did you mean lora.rank?" in problems
  for start in ("lora.rank=1.5: must be a whole number", "train.steps=true: must be a whole number",
                "optim.lr=nan: must be a finite number", "optim.betas=3: must be [a number", "model=5: must be a group",
                "seed: no such setting; did you mean model.seed", "retain.limit=all: must be a whole number"):
    assert any(problem.startswith(start) for problem in problems), (start, problems)
  assert len(problems) == 8


@pytest.mark.parametrize(("value", "expected"), [(3, 3), (3.0, 3), (1e3, 1000), ("1e2", 100)])
def test_a_whole_number_may_be_spelt_as_a_float_and_stays_an_int(value, expected):
  steps = to_config({"train": {"steps": value}}).train.steps
  assert steps == expected and type(steps) is int


def test_scaled_rotary_frequencies_are_names_with_any_value():
  scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
  assert to_config({"model": {"arch": {"rope_scaling": scaling}}}).model.arch.rope_scaling == scaling
  with pytest.raises(InputError, match=r"model\.arch\.rope_scaling=linear: must be \{name: a value\}"):
    to_config({"model": {"arch": {"rope_scaling": "linear"}}})


@pytest.mark.parametrize("value", [1.5, "1.5", True, "many", [3], {"a": 1}, math.inf, -math.inf])
def test_what_is_no_whole_number_is_refused_not_rounded(value):
  with pytest.raises(InputError, match=r"train\.steps=.*: must be"):
    to_config({"train": {"steps": value}})


@pytest.mark.parametrize(("path", "meant"), [
  ("rank", "lora.rank"), ("lora.rnk", "lora.rank"), ("lora.lr", "optim.lr"), ("target_modules", "lora.targets"),
  ("optim.learning_rate", "optim.lr"), ("retian", "retain"), ("train.epoch", "train.epochs"), ("lora.r", "lora.rank"),
])
def test_an_unknown_setting_is_answered_with_the_one_that_was_meant(path, meant):
  assert not is_setting(path)
  assert f"did you mean {meant}" in suggestion(path)


def test_weights_mean_that_the_base_is_weights(tmp_path):
  (tmp_path / "model.safetensors").touch()
  cfg = config(f"model.weights={tmp_path}", "model.base=random")
  assert cfg.model.base == "weights"


def test_paths_are_kept_from_the_root_so_that_a_run_is_found_from_anywhere(in_tmp_path):
  (in_tmp_path / "a.txt").write_text("One.")
  assert config("data=text", "data.path=a.txt").data.path == str(in_tmp_path / "a.txt")
  assert config('cache="~/c"').cache == str(Path.home() / "c")


# ---- check


@pytest.mark.parametrize(("override", "words"), [
  ("model.heads=7", "must divide model.width"),
  ("model.dropout=1", "below 1"),
  ("model.dtype=float16", "choose float32, bfloat16"),
  ("model.base=weights", "model.weights=null: model.base=weights needs"),
  ("model.weights=/no/such", "no such file"),
  ("data.path=stories.txt", "add data=text"),
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
  ("name=a/b", "plain file name"),
  ("name=..", "plain file name"),
  ("logger.project=hf_abcdefghijklmnopqrstuvwx", "looks like a Hugging Face token"),
])
def test_a_bad_value_is_one_line_that_names_the_setting_and_what_is_allowed(override, words):
  with pytest.raises(InputError) as caught:
    check_command_line([override])
  assert len(caught.value.problems) == 1, caught.value.problems
  assert words in caught.value.problems[0]
  assert "\n" not in caught.value.problems[0]


def test_all_problems_of_a_config_come_together():
  with pytest.raises(InputError) as caught:
    check_command_line(["lora.rank=0", "optim.lr=-1", "train.batch_size=0", "data=text", "name=a/b"])
  assert sorted(p.split(":")[0] for p in caught.value.problems) == \
    ["data.path=null", "lora.rank=0", "name=a/b", "optim.lr=-1.0", "train.batch_size=0"]


def test_a_missing_file_is_named_with_the_one_beside_it(text_file):
  typed = f"data.path={text_file.parent}/storys.txt"
  with pytest.raises(InputError, match=rf"{typed}: no such file; did you mean stories.txt"):
    check_command_line(["data=text", typed])
  with pytest.raises(InputError, match="is a directory; give a file"):
    check_command_line(["data=text", f"data.path={text_file.parent}"])


def test_the_tutorial_asks_for_its_file_by_name():
  with pytest.raises(InputError, match=r"data\.path=FILE.*TinyStories.*<\|endoftext\|>"):
    check_command_line(["experiment=jax_tutorial"])


@pytest.mark.parametrize("value", [
  "hf_" + "a1" * 17, "0123456789abcdef" * 2 + "01234567", "sk-" + "x" * 30, "ghp_" + "Z9" * 18, "AKIA" + "A" * 16,
  "https://me:secret@example.org/x",
])
def test_what_looks_like_a_credential_is_refused_and_not_repeated(value):
  assert credential(value)
  with pytest.raises(InputError) as caught:
    check_command_line([f'logger.group="{value}"'])
  assert value not in str(caught.value) and "environment variable" in str(caught.value)


@pytest.mark.parametrize("value", ["hf_models/gpt2", "models/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e/x",
                                   "https://example.org:80/a", "task-force", "run"])
def test_ordinary_words_and_paths_are_no_credentials(value):
  assert credential(value) is None


# ---- the grammar


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_quoting(text):
  if "$" not in text:  # ${…} stays an interpolation, as in any value
    assert OverridesParser.create().parse_override(f"prompt={quoted(text)}").value() == text


@pytest.mark.parametrize(("typed", "advice"), [
  ("lora.targets=re:(q|v)_proj", """'lora.targets="re:(q|v)_proj"'"""),
  ("lora.targets=[re:(q|v),mlp]", """'lora.targets=["re:(q|v)",mlp]'"""),
  ("prompt=Hello, world", """'prompt="Hello, world"'"""),
  ('prompt=say "hi", you', r"""'prompt="say \"hi\", you"'"""),
  ("lora.rank_pattern={re:(a|b): 4}", r"""'lora.rank_pattern={re\:\(a|b\): 4}'"""),
])
def test_an_override_that_the_grammar_refuses_is_shown_as_the_shell_needs_it(typed, advice):
  assert quoting_advice(typed).endswith(advice)


# ---- run=DIR and train.resume=DIR


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
  cfg = config("model=minigpt_tiny", "lora.rank=3", "train.steps=40", "train.stop_at=5", "data@retain=none",
               "optim.schedule=constant", "sample.top_k=9")
  directory = tmp_path / "run"
  directory.mkdir()
  save_config(cfg, directory)
  return directory


def test_a_saved_config_is_read_back_equal(run_dir):
  values = yaml.safe_load((run_dir / "config.yaml").read_text())
  assert asdict(to_config(values)) == values


def test_run_takes_the_saved_settings_and_only_what_is_typed_on_top(run_dir):
  cfg = config("task=evaluate", f"run={run_dir}", "train.batch_size=2", "mesh=tutorial", "data@retain=stdlib_docs")
  assert (cfg.task, cfg.run) == ("evaluate", str(run_dir))
  assert (cfg.lora.rank, cfg.model.width, cfg.sample.top_k) == (3, 64, 9), "saved, not the defaults"
  assert cfg.train.batch_size == 2 and cfg.mesh.tensor == 2
  assert cfg.retain is not None and cfg.retain.view == "docs"
  assert cfg.train.stop_at is None


def test_resuming_goes_on_with_the_saved_config_without_its_stop(run_dir):
  line = check_command_line([f"train.resume={run_dir}"])
  assert line.jobs[0].lora.rank == 3 and line.jobs[0].train.stop_at is None
  assert line.directory is None and line.claim() is None
  argv = line.hydra_argv(None)
  assert f'hydra.run.dir="{run_dir}"' in argv and "hydra.output_subdir=null" in argv


@pytest.mark.parametrize("override", ["train.stop_at=20", "train.steps=60", "train.save_every=7", "logger=none",
                                      "sample.every=3", "mesh.data=2", "lora.rank=3", "cache=/c"])
def test_resuming_takes_what_does_not_change_the_run(override, run_dir):
  assert config(f"train.resume={run_dir}", override).train.resume == str(run_dir)


@pytest.mark.parametrize(("override", "named"), [
  ("lora.rank=4", "lora.rank=4: the run"), ("optim.lr=1", "optim.lr=1.0"), ("lora=full", "lora.method=full"),
  ("data=stdlib_code", "data.view=code"), ("train.steps=30", "must be at least the run's 40"),
  ("train.batch_size=16", "train.batch_size=16"), ("data@retain=stdlib_code", "retain"), ("name=other", "name=other"),
  ("experiment=jax_tutorial", "cannot be laid over"), ("hydra.run.dir=x", "stays in its directory"),
  ("task=evaluate", "task=evaluate"),
])
def test_resuming_refuses_what_changes_the_run_and_names_it(override, named, run_dir):
  with pytest.raises(InputError) as caught:
    check_command_line([f"train.resume={run_dir}", override])
  assert named in str(caught.value)


def test_a_planned_schedule_cannot_be_made_longer(run_dir):
  file = run_dir / "config.yaml"
  file.write_text(file.read_text().replace("schedule: constant", "schedule: cosine"))
  with pytest.raises(InputError, match=r"cosine schedule was planned for 40 steps; only .*optim\.schedule=constant"):
    check_command_line([f"train.resume={run_dir}", "train.steps=60"])


@pytest.mark.parametrize(("text", "words"), [
  ("lora: {rnk: 3}", "config.yaml: lora.rnk: no such setting; did you mean lora.rank"),
  ("lora: [1", "cannot be read"), ("- 1", "holds no settings"), ("", "holds no settings"),
  ("lora: !!python/object/apply:os.getcwd []", "cannot be read"),
])
def test_a_damaged_saved_config_is_named(text, words, run_dir):
  (run_dir / "config.yaml").write_text(text)
  with pytest.raises(InputError) as caught:
    check_command_line(["task=evaluate", f"run={run_dir}"])
  assert words in str(caught.value) and str(run_dir) in str(caught.value)


# ---- config files of others


@pytest.mark.parametrize(("text", "words"), [
  ("lora: {rnk: 3}", "theirs.yaml: lora.rnk: no such setting; did you mean lora.rank?"),
  ("lora: [1", "theirs.yaml"),
  ("hydra: {callbacks: {x: {_target_: os.abort}}}", "callbacks"),
  ("hydra: {launcher: {_target_: os.abort}}", "hydra.launcher._target_=os.abort"),
  ("hydra: {job_logging: {handlers: {file: {class: os.abort}}}}", "names a class to load"),
  ("hydra: {job: {chdir: true}}", "hydra.job.chdir"),
  ("optim: {_target_: os.abort}", "optim._target_: no such setting"),
])
def test_a_config_file_of_others_cannot_bring_code_or_unknown_settings(text, words, tmp_path):
  (tmp_path / "experiment").mkdir()
  (tmp_path / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
  with pytest.raises(InputError) as caught:
    check_command_line(["--config-dir", str(tmp_path), "experiment=theirs"])
  assert words in str(caught.value)


def test_a_config_file_of_ones_own_is_used(tmp_path):
  (tmp_path / "experiment").mkdir()
  (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nlora: {rank: 5}\n")
  line = check_command_line(["--config-dir", str(tmp_path), "experiment=mine"])
  assert line.jobs[0].lora.rank == 5 and line.flags == ["--config-dir", str(tmp_path)]
