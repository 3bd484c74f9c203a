"""The sizes of the written rows, and the problems found while writing them."""

from dataclasses import dataclass

from lora_exp.data.not_learned import NotLearned


@dataclass(frozen=True, kw_only=True)
class RowCounts:
  """Sizes of the written rows. A token is counted if it is a target with loss."""

  train_rows: int
  eval_rows: int
  train_tokens: int
  eval_tokens: int
  train_bytes: int  # bytes of text of the counted tokens; end-of-text tokens and padding have 0 bytes
  eval_bytes: int
  documents: int  # documents with at least one token to learn
  eval_documents: int  # those that are held out
  truncated: int  # documents that are longer than a row, and are cut
  all_documents: int = 0  # including those without a token to learn
  document_tokens: tuple[int, ...] = ()  # tokens per document: minimum, median, 90th percentile, maximum
  train_positions: int = 0  # of the training rows, without padding
  eval_examples: int  # held-out rows that are a prompt and its answer (packing=pad)
  not_learned: tuple[NotLearned, ...] = ()  # the data that is not learned, by reason
  notes: tuple[str, ...] = ()  # sentences about what was done with the documents

  @property
  def warnings(self) -> list[str]:
    """The warnings to print before training, one line each."""
    return [*self.notes, *(f"not everything is learned: {count.sentence}" for count in self.not_learned)]
