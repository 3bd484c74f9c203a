"""The losses, tokens and seconds of a run so far. Stored in every checkpoint, so that a resumed run continues it."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class TrainingRecord:
  """The record of a run at some step. Losses are means over tokens, in nats, or over examples."""

  steps: int  # of the whole run
  data: str  # fingerprint of the rows
  base: dict = field(default_factory=dict)  # kind of the base, and its losses if it was pretrained
  tokens: int = 0  # number of tokens trained on
  train_seconds: float = 0.0
  base_loss: float | None = None  # held out, before training
  first: float | None = None  # of the first training step
  final: float | None = None  # held out, at the latest evaluation
  best: float | None = None  # lowest held-out loss after step 0
  best_step: int = 0
  held_out_tokens: int = 0
  scores: dict = field(default_factory=dict)  # held-out metrics: {base: {loss, …}, final: {…}, best: {…}}
  retain_base: float | None = None
  retain_final: float | None = None
  exported_step: int | None = None

  def after_step(self, loss: float, tokens: int, seconds: float) -> "TrainingRecord":
    """The record after another training step."""
    return replace(
      self,
      tokens=self.tokens + tokens,
      train_seconds=self.train_seconds + seconds,
      first=loss if self.first is None else self.first,
    )

  def after_evaluation(self, step: int, scores: dict) -> "TrainingRecord":
    """The record after an evaluation with `scores` at `step`; step 0 is the base."""
    loss, at_base = scores["loss"], step == 0
    record = replace(
      self,
      final=loss,
      held_out_tokens=scores["counted"],
      scores={**self.scores, "base" if at_base else "final": scores},
      base_loss=loss if at_base else self.base_loss,
    )
    improved = not at_base and (self.best is None or loss < self.best)
    if not improved:
      return record
    return replace(record, best=loss, best_step=step, scores={**record.scores, "best": scores})

  def after_retention(self, step: int, loss: float) -> "TrainingRecord":
    """The record after an evaluation on `data@retain` at `step`."""
    return replace(self, retain_base=loss if step == 0 else self.retain_base, retain_final=loss)

  @property
  def forgetting(self) -> float | None:
    """The increase of the loss on `data@retain`; None if it was not evaluated."""
    if self.retain_base is None or self.retain_final is None:
      return None
    return self.retain_final - self.retain_base
