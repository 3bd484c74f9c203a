"""Settings of the data and of a teacher."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TeacherConfig:
  """A teacher: the base plus a random update of known rank. Students learn its next-token distribution.

  The dropout layers of the students' base are disabled, like those of the teacher.
  """

  rank: int = 4  # rank of each kernel's update; its singular values are equal
  targets: Any = "attention"  # as lora.targets, without the head
  strength: float = 0.3  # Frobenius norm of the update divided by that of the kernel
  seed: int = 0  # for the directions of the update


@dataclass
class DataConfig:
  """A data source and its conversion to rows: rows of tokens for text, rows of examples for numeric data."""

  source: str = "stdlib"  # the name of a file in lora_exp/data/sources
  view: str | None = None  # for stdlib: code (without docstrings and comments) | docs (docstrings only)
  path: Any = None  # for files and text: a file, a pattern, a directory, a list of them, or hub:OWNER/NAME
  eval_path: Any = None  # for files and text: held-out files; null: documents of `path` are held out
  format: str | None = None  # for files: format of the file or its columns (csv, alpaca, …); null: detected
  columns: dict[str, str] | None = None  # for files: {prompt: NAME, response: NAME}; null: found by name
  train_split: str | None = None  # for files: the split to train on; null: train, or the only one
  eval_split: str | None = None  # for files: a held-out split; null: documents of `train_split` are held out
  eval_fraction: float = 0.1  # fraction of documents (stdlib: files) that is held out
  split: str = "halves"  # held-out documents: halves (one for best step and tuning, one for the report) | none
  seq_len: int = 128  # T, tokens in a row
  packing: str = "pack"  # pack: rows of several whole documents; an answer is not split from its prompt | pad: one
  # document per row | stream: rows are cut from the stream of all documents
  pad_in_loss: bool = False  # with packing=pad: include padding in the loss, as in the JAX tutorial
  prompt_in_loss: bool = False  # include prompts in the loss
  loss: str = "assistant"  # learned turns: assistant (every assistant turn) | last (the last one) | all (prompts too)
  limit: int | None = None  # maximum number of documents (stdlib: files, chatterbot: questions)
  prompt_field: str = "prompt"  # for files: the column with the prompt
  response_field: str = "response"  # for files: the column with the response
  chat: str = "auto"  # prompt format: auto (the tokenizer's chat template, if it has one) | none (plain text)
  sentences: list[str] = field(default_factory=list)  # for sentences: the texts
  repeat: int = 1  # for sentences: the number of copies of each text
  shuffle: bool = True  # use a new order of the rows in each epoch
  seed: int = 0  # for the order of rows; in `data`, null: `seed`
  prompts: list[str] = field(default_factory=list)  # default of sample.prompts
  steps: int = 32  # default of train.steps
  teacher: TeacherConfig | None = None  # learn the teacher's next-token distribution instead of the text
  options: dict[str, Any] = field(default_factory=dict)  # settings of the source, see lora_exp/data/sources
