"""The held-out prompts and answers of a run, found in its held-out rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_exp.config import DataConfig
from lora_exp.data.encoding.records import Batch
from lora_exp.data.tokenization import Tokenizer


@dataclass(frozen=True)
class AnswerItem:
  """A prompt with its answer: the last one of a conversation."""

  place: tuple[int, int, int]  # batch, row, and segment of the row, all from 0
  prompt: tuple[int, ...]  # token ids
  answer: tuple[int, ...]  # token ids, without the token that ends it
  alone: bool  # whether its row has no other document, and no other answer


def answer_items(batches: Sequence[Batch], cfg: DataConfig, tokenizer: Tokenizer) -> list[AnswerItem]:
  """The items of the held-out `batches`, in order, except those cut off by a row; [] for data without answers."""
  return [item for k, batch in enumerate(batches) if "answers" in batch
          for item in _batch_items(k, batch, cfg.packing == "stream", tokenizer.stops)]


def _batch_items(number: int, batch: Batch, may_cut: bool, stops: Sequence[int]) -> Iterator[AnswerItem]:
  """The items of batch `number`. With `may_cut`, the first document of a row may have begun in the previous row."""
  for row, segments_T in enumerate(batch["segments"]):
    for segment in range(int(may_cut), int(segments_T.max())):
      where = np.flatnonzero(segments_T == segment + 1)
      answers = np.flatnonzero(batch["answers"][row, where])
      if not len(answers):
        continue
      first = int(answers[np.flatnonzero(np.diff(answers, prepend=-2) > 1)[-1]])  # where the last answer begins
      targets = batch["targets"][row, where][first : int(answers[-1]) + 1].tolist()
      end = next((n for n, token in enumerate(targets) if token in stops), None)
      if end is None:  # the row ends before the answer does
        continue
      prompt = batch["tokens"][row, where][: first + 1].tolist()
      alone = int(segments_T.max()) == 1 and len(answers) == int(answers[-1]) - first + 1
      yield AnswerItem((number, row, segment), tuple(prompt), tuple(targets[:end]), alone)


def chosen_items(halves: Sequence[int], most: int) -> list[int]:
  """The indices of at most `most` evenly spaced items, about equally many of each half, in order.

  `halves`: the half of each item's document.
  """
  numbers = sorted(set(halves))
  chosen: list[int] = []
  for n, half in enumerate(numbers):
    of_half = [index for index, value in enumerate(halves) if value == half]
    count = min(len(of_half), most // len(numbers) + (n < most % len(numbers)))
    chosen += [of_half[k * len(of_half) // count] for k in range(count)]
  return sorted(chosen)
