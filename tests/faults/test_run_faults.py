"""For every user error, a run ends with a clear message and the right exit code, and leaves no partial output."""

import json
import math

import pytest
import yaml
from runs import TINY, cache, everything, on_stories, process, rows, stories, summary, train

from lora_exp.cli import main as entry
from lora_exp.train.records import checkpoint

TEXT = ["data=text", "data.path=stories.txt"]


def pair(prompt: str = "Say one:", response: str = "one", **other: str) -> str:
  return json.dumps({"prompt": prompt, "response": response, **other})


FILES: dict[str, bytes] = {
  "empty.txt": b"",
  "blank.txt": b" \n<|endoftext|>\n\n<|endoftext|>  ",
  "one.txt": b"One single story.",
  "latin.txt": b"A story.\n<|endoftext|>\nAnother\none with a caf\xe9 in it.\n<|endoftext|>\nA third.",
  "broken.jsonl": "\n".join([pair(), pair(), '{"prompt": "Say two:", "resp', pair()]).encode(),
  "list.jsonl": "\n".join([pair(), "[1, 2]"]).encode(),
  "field.jsonl": "\n".join([pair(), json.dumps({"prompt": "x", "respons": "y"})]).encode(),
  "number.jsonl": json.dumps({"prompt": "x", "response": 3}).encode(),
  "latin.jsonl": (pair() + "\n").encode() + b'{"prompt": "caf\xe9", "response": "x"}',
}

FAULTS = [
  (["data=text", "data.path=storys.txt"], ["data.path=", "/storys.txt: no such file", "did you mean stories.txt?"]),
  ([*TEXT, "data@retain=text"], ["retain.path=null", "retain.path=FILE"]),
  ([*TEXT, "data.eval_path=none.txt"], ["data.eval_path=", "/none.txt: no such file"]),
  ([*TEXT, "data.path=/dev/zero"], ["data.path=/dev/zero", "is a device"]),
  ([*TEXT, "model.weights=none.safetensors"], ["model.weights=", "/none.safetensors: no such file"]),
  ([*TEXT, "data.seq_len=65"], ["data.seq_len=65", "at most model.max_len=64"]),
  ([*TEXT, "lora.targets=quary"], ["lora.targets=quary", "blocks.0.mha.query"]),
  ([*TEXT, "lora.targets=[linear1,blocks.7.linear1]"], ["lora.targets=blocks.7.linear1", "blocks.0.linear1"]),
  ([*TEXT, "lora.exclude=[mlp,attention]"], ["leaves no module to adapt"]),
  ([*TEXT, "lora.rank_pattern={output_layer: 2}"], ["rank_pattern", "output_layer", "none of the adapted modules"]),
  ([*TEXT, "model.vocab_size=100"], ["model.vocab_size=100", "257"]),
  ([*TEXT, "mesh.tensor=2"], ["mesh.tensor=2", "device"]),
  ([*TEXT, "cache=/dev/null/cache"], ["/dev/null/cache", "cache="]),
  ([*TEXT, "hydra.run.dir=/dev/null/run"], ["/dev/null", "hydra.run.dir=DIR"]),
  (["data=text", "data.path=empty.txt"], ["empty.txt"]),
  (["data=text", "data.path=blank.txt"], ["blank.txt"]),
  (["data=text", "data.path=one.txt"], ["one.txt"]),
  (["data=text", "data.path=latin.txt"], ["latin.txt, line 4", "not UTF-8"]),
  (
    ["data=jsonl", "data.path=broken.jsonl"],
    ["broken.jsonl, line 3", "not JSON", "Unterminated string starting at column 24"],
  ),
  (["data=jsonl", "data.path=list.jsonl"], ["list.jsonl, line 2", "JSON object"]),
  (["data=jsonl", "data.path=field.jsonl"], ["field.jsonl, line 2", "'response'", "did you mean respons?"]),
  (["data=jsonl", "data.path=number.jsonl"], ["number.jsonl, line 1", "the response", "string"]),
  (["data=jsonl", "data.path=latin.jsonl"], ["latin.jsonl, line 2", "not UTF-8"]),
  (["experiment=jax_tutorial"], ["data.path=FILE", "TinyStories"]),
  (["task=evaluate", "run=.", *TEXT], ["contains no run"]),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  """A cache that only these tests use."""
  monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))


def made() -> set:
  """The rows and bases in the cache."""
  return {path for kind in ("rows", "base") for path in everything(cache() / kind)}


@pytest.mark.parametrize(("argv", "words"), FAULTS, ids=[" ".join(argv) for argv, _ in FAULTS])
def test_a_fault_is_one_screen_with_code_2_and_leaves_nothing(argv, words, in_tmp_path, capfd):
  stories(in_tmp_path / "stories.txt")
  for name, content in FILES.items():
    (in_tmp_path / name).write_bytes(content)
  files, kept = everything(in_tmp_path), made()
  tiny = [] if argv[0].startswith("experiment") else TINY
  capfd.readouterr()
  assert entry.run([*tiny, *argv]) == 2
  said = capfd.readouterr()
  assert all(word in said.err for word in words), said.err
  assert "Traceback" not in said.err + said.out
  assert all(line.startswith("error: ") for line in said.err.splitlines()) and len(said.err.splitlines()) < 5
  assert everything(in_tmp_path) == files
  assert made() == kept


def test_files_that_cannot_be_read_leave_no_rows_in_the_cache(in_tmp_path, capfd):
  for name, content in FILES.items():
    (in_tmp_path / name).write_bytes(content)
  kept = made()
  for name in FILES:
    assert entry.run([*TINY, f"data={name.split('.')[1].replace('txt', 'text')}", f"data.path={name}"]) == 2
  assert made() == kept
  assert sorted(path.name for path in in_tmp_path.iterdir()) == sorted(FILES)


def test_an_indivisible_batch_is_listed_with_all_problems(tmp_path):
  done = process(*TINY, *on_stories(tmp_path), "train.batch_size=6", "lora.targets=quary", cwd=tmp_path, devices=8)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert "train.batch_size=6" in done.stderr and "multiple of 8" in done.stderr and "lora.targets=quary" in done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["lora_exp_test_stories.txt"]


# ---- divergence


def test_a_run_that_diverges_ends_with_5_and_says_what_to_lower(tmp_path, capfd):
  run_dir = train(tmp_path / "run", *TINY, *on_stories(tmp_path), "optim.name=sgd", "optim.lr=1e30", "optim.clip=null",
                  "optim.warmup=0", "train.steps=12", "train.eval_every=0", "train.save_every=1", code=5)
  said = capfd.readouterr()
  assert "optim.lr (now 1e+30)" in said.err and "Traceback" not in said.err + said.out
  found = summary(run_dir)
  assert found["status"] == "diverged" and found["losses"]["final"] == found["losses"]["base"]
  assert math.isfinite(found["losses"]["base"]) and not (run_dir / "adapter").exists()
  lines = rows(run_dir, "train")
  assert lines[-1]["loss"] is None and all(math.isfinite(row["loss"]) for row in lines[:-1])
  assert f"at step {lines[-1]['step']}" in said.err
  assert yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["lr"] == 1e30

  assert entry.run(["task=evaluate", f"run={run_dir}"]) == 2
  assert "no adapter" in capfd.readouterr().err
  assert all(step < lines[-1]["step"] for step in checkpoint.steps(run_dir))
