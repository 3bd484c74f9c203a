"""Sources without files: their documents, the tokens with loss, and that held-out data is not trained on."""

import importlib.machinery
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from lora_exp.cli.command_line import check_command_line
from lora_exp.cli.compose import composer, conf_directory
from lora_exp.config import Config, InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows, make_rows
from lora_exp.data.sources import chatterbot, open_source
from lora_exp.data.sources.arithmetic import Arithmetic
from lora_exp.data.sources.chatterbot import Chatterbot, english_files
from lora_exp.data.sources.sentences import Sentences
from lora_exp.data.tokenization import get_tokenizer

BYTES = get_tokenizer("bytes")


def of_conf(name: str, **changes) -> DataConfig:
  """The settings of conf/data/NAME.yaml."""
  with composer(conf_directory()) as composing:
    settings = OmegaConf.to_container(composing.compose([f"data={name}"]).data, resolve=True)
  return DataConfig(**{**settings, "seq_len": 64, **changes})


def batch_of(rows: Rows, split: str) -> dict[str, np.ndarray]:
  """All rows of a split."""
  if split == "eval":
    return next(eval_batches(rows, rows.eval_rows, None))
  return next(train_batches(rows, DataConfig(shuffle=False), rows.train_rows))


def texts_of(batch: dict[str, np.ndarray], tokenizer=BYTES) -> list[str]:
  """The text of each row that holds one document."""
  return [tokenizer.decode([i for i in row[real > 0] if i != tokenizer.eot])
          for row, real in zip(batch["tokens"], batch["segments"], strict=True)]


# chatterbot


@pytest.fixture
def corpus(request: pytest.FixtureRequest) -> Chatterbot:
  """The installed package."""
  source = Chatterbot()
  for problem in source.check_inputs():
    pytest.skip(problem)
  return source


def test_chatterbot_holds_the_packages_pairs(corpus):
  documents = list(corpus.documents())
  assert len(documents) == 2393
  files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in english_files()]
  said = Counter(sentence.strip() for file in files for talk in file["conversations"] for sentence in talk[1:])
  assert Counter(document.text for document in documents) == said
  assert (documents[0].prompt, corpus.prompt_separator) == ("What is AI?", "\n")
  assert documents[0].text.startswith("Artificial Intelligence is the branch of engineering")


def test_answers_to_one_question_are_held_out_together(corpus):
  keys: dict[str, set[int]] = {}
  for document in corpus.documents():
    keys.setdefault(document.prompt, set()).add(document.key)
  assert all(len(found) == 1 for found in keys.values())
  assert sorted(key for found in keys.values() for key in found) == list(range(len(keys)))


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2_4096", "gpt2"])
def test_only_chatterbots_answers_are_learned(corpus, tokenizer, tmp_path):
  ids = get_tokenizer(tokenizer)
  rows = make_rows(of_conf("chatterbot", limit=40, eval_fraction=0.1, seq_len=1024), ids, tmp_path)
  learned = batch_of(rows, "train")
  answers = [d.text for d in corpus.documents() if d.key < 40 and d.key % 10 != 9]
  spelt = ids.decode(learned["targets"][learned["weights"] > 0].tolist())
  assert rows.not_learned == () and sorted(spelt.split("<|endoftext|>")) == sorted([*answers, ""])


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"is not installed: pip install chatterbot-corpus==1\.3\.3$"):
    open_source(DataConfig(source="chatterbot"))


def test_files_without_conversations_are_named(monkeypatch, tmp_path):
  folder = tmp_path / "chatterbot_corpus" / "data" / "english"
  folder.mkdir(parents=True)
  spec = importlib.machinery.ModuleSpec("chatterbot_corpus", None, origin=str(folder.parents[1] / "__init__.py"))
  monkeypatch.setattr(chatterbot.importlib.util, "find_spec", lambda name: spec)
  for bad in ("conversations: 3", "- list", "{", "conversations: !!python/object/apply:os.getcwd []"):
    (folder / "ai.yml").write_text(bad)
    with pytest.raises(InputError, match=r"ai\.yml contains no conversations: pip install .* --force-reinstall"):
      list(Chatterbot().documents())
  (folder / "ai.yml").write_text("conversations:\n- - One?\n  - Two.\n  - Three.\n- - One?\n  - ' 4 '\n")
  found = [(d.key, d.prompt, d.text) for d in Chatterbot().documents()]
  assert found == [(0, "One?", "Two."), (0, "One?", "4"), (1, "Two.", "Three.")]


# arithmetic


def test_arithmetic_is_penzais_task(tmp_path):
  cfg = of_conf("arithmetic", limit=200)
  rows = make_rows(cfg, BYTES, tmp_path)
  assert (rows.train_rows, rows.eval_rows, rows.eval_examples, rows.truncated) == (160, 40, 40, 0)
  train, held = texts_of(batch_of(rows, "train")), texts_of(batch_of(rows, "eval"))
  for text in train + held:
    a, b, c = map(int, re.fullmatch(r">>> mystery_function\((\d{1,3}), (\d{1,3})\)\n(\d+)", text).groups())
    assert c == a + b
  assert not set(train) & set(held)
  assert len(set(train + held)) == 200


def test_all_of_an_example_is_learned_and_its_answer_marked(tmp_path):
  rows = make_rows(of_conf("arithmetic", limit=20), BYTES, tmp_path)
  held = batch_of(rows, "eval")
  for n, text in enumerate(texts_of(held)):
    target = [*text.encode()[1:], BYTES.eot]
    assert held["targets"][n][held["weights"][n] > 0].tolist() == target
    answer = text.split("\n")[1]
    assert held["targets"][n][held["answers"][n]].tolist() == [*answer.encode(), BYTES.eot]
  assert "answers" not in batch_of(rows, "train")


def test_the_default_fills_the_tutorials_200_batches_of_16():
  cfg = of_conf("arithmetic")
  assert cfg.limit * (1 - cfg.eval_fraction) == 200 * 16


def test_arithmetic_follows_its_seed_and_a_limit_adds_to_it():
  pairs = lambda seed, limit: Arithmetic(seed, limit).arguments().tolist()
  assert pairs(0, 50) == pairs(0, 50) == pairs(0, 80)[:50] != pairs(1, 50)
  assert Arithmetic(0, 50).digest() != Arithmetic(1, 50).digest()
  every = Arithmetic(0, None).arguments()
  assert len(np.unique(every, axis=0)) == 10**6 and every.min() == 0 and every.max() == 999


# sentences


def test_sentences_are_repeated_and_held_out_every_time(tmp_path):
  cfg = of_conf("sentences")
  rows = make_rows(cfg, BYTES, tmp_path)
  assert rows.truncated == 0
  train, held = (Counter(texts_of(batch_of(rows, split))) for split in ("train", "eval"))
  assert set(train.values()) == set(held.values()) == {10}
  assert sorted([*train, *held]) == sorted(cfg.sentences)
  assert list(held) == cfg.sentences[4::5]


def test_sentences_are_what_the_cache_knows_them_by():
  digests = {Sentences(texts, repeat).digest() for texts in (["a", "b"], ["ab", ""], ["b", "a"]) for repeat in (1, 2)}
  assert len(digests) == 6


# settings


def config(*overrides: str) -> Config:
  return check_command_line(overrides).jobs[0]


@pytest.mark.parametrize(("overrides", "words"), [
  (["data=sentences", "data.sentences=[]"], "data.sentences: must contain at least two different texts"),
  (["data=sentences", "data.sentences=[a,a]"], "two different texts"),
  (["data=sentences", "data.sentences=[a,' ']"], "none of them blank"),
  (["data=sentences", "data.repeat=0"], "data.repeat=0: must be at least 1"),
  (["data=chatterbot", "data.path=a.txt"], "the source chatterbot does not read a file; add data="),
  (["data.source=chatter"], "did you mean chatterbot?"),
])
def test_settings_that_do_not_fit_are_named(overrides, words):
  with pytest.raises(InputError) as error:
    config(*overrides)
  assert words in str(error.value)


def test_prompts_of_pairs_are_learned_if_asked_for(tmp_path: Path):
  path = tmp_path / "pairs.jsonl"
  path.write_text('{"prompt": "1+1=", "response": "2"}\n{"prompt": "2+2=", "response": "4"}\n')
  for packing in ("pack", "pad"):
    cfg = DataConfig(source="jsonl", path=str(path), eval_fraction=0.5, seq_len=8, packing=packing, prompt_in_loss=True)
    batch = batch_of(make_rows(cfg, BYTES, tmp_path), "eval")
    assert batch["targets"][batch["weights"] > 0].tolist() == [*b"+2=4", BYTES.eot]
    assert ("answers" in batch) == (packing == "pad")
