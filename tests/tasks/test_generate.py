"""`task=generate` from the command line."""

import io

import pytest
from runs import TINY, everything, on_stories, process, train

from lora_exp.cli import main as entry


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run whose adapter generates other text than its base."""
  directory = tmp_path_factory.mktemp("generate")
  data = on_stories(directory)
  return train(directory / "run", *TINY, *data, "train.steps=12", "optim.lr=0.05", "train.eval_every=0",
               "train.save_every=0", "train.eval_tokens=300", "train.export=last", "train.batch_size=4")


def said(capfd, *argv: str, code: int = 0) -> str:
  """The output of task=generate."""
  capfd.readouterr()
  assert entry.run(["task=generate", "sample.temperature=0", "sample.max_tokens=30", *argv]) == code
  printed = capfd.readouterr()
  return printed.err if code else printed.out


def test_streamed_text_equals_the_text_of_many_prompts(run, capfd, tmp_path, monkeypatch):
  before = everything(run)
  one, other = said(capfd, f"run={run}", "prompt=Once"), said(capfd, f"run={run}", "prompt='a little dog'")
  assert one.startswith("Once") and len(one) > 20 and one.endswith("\n")
  file = tmp_path / "prompts.txt"
  file.write_text("Once\n\na little dog\n")
  assert said(capfd, f"run={run}", f"prompt_file={file}") == f"{one}\n{other}"
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Once\n")))
  assert said(capfd, f"run={run}") == one
  assert everything(run) == before


def test_merged_adapter_gives_the_same_text(run, capfd):
  unmerged = said(capfd, f"run={run}", "prompt=Once")
  assert said(capfd, f"run={run}", "prompt=Once", "sample.merged=true") == unmerged
  base = said(capfd, *TINY, "prompt=Once")
  assert base != unmerged and base.startswith("Once")


@pytest.mark.slow
def test_full_fine_tuning_generates_without_its_base(run, capfd, tmp_path):
  data = on_stories(tmp_path)
  full = train(tmp_path / "full", *TINY, *data, "lora=full", "train.steps=3", "train.eval_every=0",
               "train.save_every=0", "train.eval_tokens=300", "train.export=last", "train.batch_size=4")
  text = said(capfd, f"run={full}", "prompt=Once")
  assert text == said(capfd, *TINY, f"model.weights={full / 'model.safetensors'}", "prompt=Once")


@pytest.mark.parametrize(("argv", "words"), [
  (["prompt=''"], "prompt: is empty"),
  (["prompt=a", "prompt_file=pyproject.toml"], "both are given"),
  (["prompt_file=no_such.txt"], "no such file"),
  ([f"prompt={'word ' * 40}".strip().replace(' ', '_')], "leaves no room"),
  (["prompt=a", "sample.stop=['']"], "sample.stop"),
  (["prompt=a", "sample.chat=maybe"], "choose auto, always, none"),
  (["prompt=a", "sample.chat=always"], "has no chat template"),
  (["prompt=a", "sample.top_p=1.5"], "at most 1"),
])
def test_bad_input_exits_with_2_and_one_sentence(run, argv, words, capfd):
  error = said(capfd, f"run={run}", *argv, code=2)
  assert words in error and error.count("error: ") == 1 and "Traceback" not in error


def test_run_that_did_not_end_says_how_to_resume(run, capfd, tmp_path):
  (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
  assert f"train.resume={tmp_path}" in said(capfd, f"run={tmp_path}", "prompt=a", code=2)
  file = tmp_path / "latin1.txt"
  file.write_bytes("Café".encode("latin1"))
  assert "not UTF-8 text: byte 3" in said(capfd, f"run={run}", f"prompt_file={file}", code=2)


@pytest.mark.slow
def test_eight_devices_give_the_text_of_one(run, capfd, tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("\n".join(["Once", "a little dog", "the", "Tom saw"] * 2))
  argv = ["task=generate", f"run={run}", f"prompt_file={file}", "sample.temperature=0", "sample.max_tokens=30"]
  one = said(capfd, *argv[1:])
  done = process(*argv, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", cwd=tmp_path, devices=8)
  assert done.returncode == 0, done.stderr
  assert done.stdout == one
