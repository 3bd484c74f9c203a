"""Questions and answers of the package chatterbot-corpus (BSD): data alone, found and never imported."""

import hashlib
import importlib.util
from collections.abc import Generator
from pathlib import Path

import yaml

from lora_exp.config.errors import InputError
from lora_exp.data.documents import Document

INSTALL = "pip install chatterbot-corpus==1.3.3"


class Chatterbot:
  """Each sentence of a conversation but the last is a question, and the next one its answer.

  All answers to a question stand together and are held out together: many questions have several.
  """

  name, unit = "chatterbot-corpus", "questions"

  def __init__(self) -> None:
    self.paths = english_files()
    self.size = sum(path.stat().st_size for path in self.paths)

  def digest(self) -> str:
    sha = hashlib.sha256()
    for path in self.paths:
      sha.update(path.read_bytes())
    return sha.hexdigest()

  def documents(self) -> Generator[Document, None, None]:
    answers: dict[str, list[str]] = {}
    for path in self.paths:
      for question, answer in pairs(path):
        answers.setdefault(question, []).append(answer)
    for key, (question, texts) in enumerate(answers.items()):
      for text in texts:
        yield Document(key, text, question, between="\n", read=self.size)


def pairs(path: Path) -> list[tuple[str, str]]:
  """(question, answer) of one file, in order. Raises InputError for a file that is not the package's."""
  try:
    conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    spoken = [[str(sentence).strip() for sentence in conversation] for conversation in conversations]
  except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
    raise InputError(f"{path} holds no conversations: {INSTALL} --force-reinstall") from error
  return [pair for sentences in spoken for pair in zip(sentences, sentences[1:], strict=False)]


def english_files() -> list[Path]:
  """The package's English files by name. InputError where it is not installed."""
  spec = importlib.util.find_spec("chatterbot_corpus")
  found = Path(spec.origin).parent.glob("data/english/*.yml") if spec is not None and spec.origin else []
  if not (paths := sorted(found)):
    raise InputError(f"data.source=chatterbot reads the package chatterbot-corpus, which is not here: {INSTALL}")
  return paths
