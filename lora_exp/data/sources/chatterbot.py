"""Questions and answers of the package chatterbot-corpus (BSD). Its files are read without importing it."""

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_exp.config.errors import InputError
from lora_exp.data.documents import Document
from lora_exp.data.sources.source import TextSource

INSTALL = "pip install chatterbot-corpus==1.3.3"


@dataclass(frozen=True)
class Chatterbot(TextSource):
  """Every sentence of a conversation except the last is a question, and the next sentence is its answer.

  Many questions have several answers, which are adjacent and are held out together.
  """

  name = "chatterbot"
  unit = "questions"
  label = "chatterbot-corpus"
  prompt_separator = "\n"

  @property
  def size(self) -> int:
    return sum(path.stat().st_size for path in english_files())

  def check_inputs(self) -> Iterator[str]:
    if not english_files():
      yield f"data.source={self.name}: the package chatterbot-corpus is not installed: {INSTALL}"

  def digest(self) -> str:
    """SHA-256 (hex) of the package's English files."""
    sha = hashlib.sha256()
    for path in english_files():
      sha.update(path.read_bytes())
    return sha.hexdigest()

  def documents(self) -> Iterator[Document]:
    answers: dict[str, list[str]] = {}
    for path in english_files():
      for question, answer in question_answers(path):
        answers.setdefault(question, []).append(answer)
    for key, (question, texts) in enumerate(answers.items()):
      for text in texts:
        yield Document(key, text, question, read=self.size)


def english_files() -> list[Path]:
  """The package's English files by name; empty if it is not installed."""
  spec = importlib.util.find_spec("chatterbot_corpus")
  if spec is None or spec.origin is None:
    return []
  return sorted(Path(spec.origin).parent.glob("data/english/*.yml"))


def question_answers(path: Path) -> list[tuple[str, str]]:
  """(question, answer) pairs of one file, in order. Raises InputError if the file is not one of the package."""
  try:
    conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    stripped = [[str(sentence).strip() for sentence in conversation] for conversation in conversations]
  except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
    raise InputError(f"{path} contains no conversations: {INSTALL} --force-reinstall") from error
  return [pair for sentences in stripped for pair in zip(sentences, sentences[1:], strict=False)]
