"""Every file of conf/ composes, passes the checks, and has every setting of its group."""

import dataclasses
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from lora_exp.cli.command_line import check_command_line
from lora_exp.cli.compose import composer, conf_directory
from lora_exp.cli.job_config import job_config
from lora_exp.config import Config, check
from lora_exp.config.override_grammar import parse
from lora_exp.data.sources import NumericSource, registry
from lora_exp.data.sources.file_source import FileSource

CONF = conf_directory()
GROUPS = ("model", "data", "mesh", "lora", "optim", "train", "sample", "logger")


def config(*overrides: str) -> Config:
  """The checked config of one command line."""
  return check_command_line(overrides).jobs[0]


def files(group: str) -> list[Path]:
  choices = [path for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_")]
  return sorted(path for path in choices if (group, path.stem) != ("data", "none"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
  path = tmp_path / "stories.txt"
  path.write_text("One.<|endoftext|>Two.")
  return path


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_of_a_group_has_every_setting(group):
  section = next(f for f in dataclasses.fields(Config) if f.name == group).default_factory
  with composer(CONF) as composing:
    for path in files(group):  # a file may inherit its keys, such as gpt2_xl from gpt2
      keys = yaml.safe_load(path.read_text()).keys()
      if "defaults" in keys:
        keys = composing.compose([f"{group}={path.stem}"])[group].keys()
      assert list(keys) == [field.name for field in dataclasses.fields(section)], path


@pytest.mark.parametrize("group", [*GROUPS, "task"])
def test_every_choice_composes_and_passes_the_checks(group, text_file, tmp_path):
  """Sources need their file or model, model=hf a checkpoint (test_weights.py), four tasks a run (test_export.py,
  test_dashboard.py, test_inspect.py) or an adapter, SmolLM2 its package (below); no more is missing."""
  needs = {"mlp": ["data@retain=none", "data=xor"]}
  lines = tmp_path / "lines.jsonl"
  lines.write_text('{"prompt": "a", "response": "b"}\n')
  for source in registry().values() if group == "data" else ():
    if issubclass(source, FileSource):
      needs[source.name] = [f"data.path={lines if '.jsonl' in source.suffixes else text_file}"]
    elif issubclass(source, NumericSource):
      sizes = [f"model.mlp.inputs={source.inputs}", f"model.mlp.outputs={source.outputs}"]
      needs[source.name] = ["data@retain=none", "model=mlp", *sizes]
  others = ("hf", "smollm2_135m", "merge", "export", "verify", "dashboard", "inspect", "compare")
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
def test_every_sweep_passes_the_checks_and_has_several_runs(name):
  line = check_command_line([f"sweep={name}"])
  assert line.multirun and len(line.jobs) > 1
  assert len({yaml.safe_dump(asdict(job)) for job in line.jobs}) == len(line.jobs), "two runs of the sweep are equal"


@pytest.mark.parametrize("texts", [
  ["lora.rank=4", "optim.lr=1e-3", "lora.targets=[query,mlp]"], ["lora=dora", "lora.rank=4", "data.seq_len=64"],
  ["+lora.rank_pattern.query=3", "lora.rank=2"], ["data=chatterbot", "sample.prompts=[a,'b c']", "name='x y'"],
  ["optim.clip=null", "lora.rank=8", "optim.clip=2.0"],
])  # fmt: skip
def test_reused_config_files_compose_the_same_job(texts):
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
def test_composed_configs_equal_the_goldens(name, overrides, golden, monkeypatch):
  monkeypatch.setenv("LORA_EXP_CACHE", "/cache")
  with composer(CONF) as composing:
    cfg = job_config(composing.compose(overrides), parse(overrides, None)[0])
  golden(f"config/{name}.yaml", yaml.safe_dump(asdict(cfg), sort_keys=False))


def test_three_data_sources_are_set_independently():
  cfg = config("data@pretrain_data=stdlib_docs", "pretrain_data.limit=3", "data@retain=stdlib_docs", "retain.seed=7",
               "data=stdlib_code")
  assert (cfg.data.view, cfg.data.limit, cfg.data.seed) == ("code", None, 0)
  assert cfg.pretrain_data is not None and (cfg.pretrain_data.view, cfg.pretrain_data.limit) == ("docs", 3)
  assert cfg.retain is not None and (cfg.retain.view, cfg.retain.seed) == ("docs", 7)


@pytest.mark.parametrize("off", ["data@retain=none", "~data@retain"])
def test_retain_can_be_switched_off(off):
  assert config(off).retain is None


def test_seq_len_follows_a_smaller_model():
  cfg = config("model.max_len=32")
  assert cfg.data.seq_len == 32 and cfg.retain is not None and cfg.retain.seq_len == 32
