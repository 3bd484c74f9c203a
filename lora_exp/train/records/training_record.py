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
  best: float | None = None  # held out, at `best_step`
  best_step: int = 0  # with the lowest loss after step 0: on the tuning half, if there are halves
  best_tuning: float | None = None  # loss on the tuning half at `best_step`
  held_out_tokens: int = 0
  scores: dict = field(default_factory=dict)  # held-out metrics: {base: {loss, …}, final: {…}, best: {…}}
  halves: dict = field(default_factory=dict)  # the same on each half: {base: {tuning: {loss, …}, report: {…}}, …}
  retain_limit: int | None = 0  # tokens of an evaluation on retain; None: all; 0: train.retain_tokens, in older runs
  retain_base: float | None = None
  retain_final: float | None = None
  retain_best: float | None = None  # at best_step
  exported_step: int | None = None
  skipped: int = 0  # steps that were not finite and changed nothing, or were taken back
  passed_batches: int = 0  # batches that train.on_nan=rewind left out: step n takes batch n + this number

  def after_step(self, loss: float, tokens: int, seconds: float) -> "TrainingRecord":
    """The record after another training step that was finite."""
    return replace(
      self,
      tokens=self.tokens + tokens,
      train_seconds=self.train_seconds + seconds,
      first=loss if self.first is None else self.first,
    )

  def after_evaluation(self, step: int, scores: dict, halves: dict | None = None) -> "TrainingRecord":
    """The record after an evaluation at `step`, over all held-out data and on each half; step 0 is the base.

    The best step is chosen on the tuning half. A run that version 0.1.0 started still chooses on all held-out data.
    """
    loss, at_base = scores["loss"], step == 0
    name = "base" if at_base else "final"
    record = replace(
      self,
      final=loss,
      held_out_tokens=scores["counted"],
      scores={**self.scores, name: scores},
      halves={**self.halves, name: halves} if halves else self.halves,
      base_loss=loss if at_base else self.base_loss,
    )
    tuning = halves["tuning"]["loss"] if halves and (self.best is None or self.best_tuning is not None) else None
    chosen_by, lowest = (loss, self.best) if tuning is None else (tuning, self.best_tuning)
    improved = not at_base and (lowest is None or chosen_by < lowest)
    if not improved:
      return record
    scores, halves = {**record.scores, "best": scores}, {**record.halves, "best": halves} if halves else record.halves
    return replace(record, best=loss, best_step=step, best_tuning=tuning, scores=scores, halves=halves)

  def after_scoring(self, scores: dict, halves: dict | None) -> "TrainingRecord":
    """The record with more metrics of the state at `best_step`, computed after training."""
    best = {**self.scores["best"], **scores}
    by_half = self.halves.get("best", {})
    best_halves = {half: {**values, **(halves or {}).get(half, {})} for half, values in by_half.items()}
    more = {**self.halves, "best": best_halves} if best_halves else self.halves
    return replace(self, scores={**self.scores, "best": best}, halves=more)

  def half_scores(self) -> dict[str, dict]:
    """Metrics on each half, of the base and of the exported state: {tuning: {base: {…}, exported: {…}}, report: …}.

    Without an exported state there is only the base; without halves the result is empty.
    """
    if "base" not in self.halves:
      return {}
    states = {"base": "base"}
    if self.exported_step is not None:
      exported = "best" if self.exported_step == self.best_step else "final"
      states["exported"] = exported if exported in self.halves else "base"
    names = self.halves["base"]
    return {half: {state: self.halves[key][half] for state, key in states.items()} for half in names}

  def after_retention(self, step: int, loss: float) -> "TrainingRecord":
    """The record after an evaluation on `data@retain` at `step`, which follows that on the held-out text."""
    return replace(
      self,
      retain_base=loss if step == 0 else self.retain_base,
      retain_final=loss,
      retain_best=loss if step == self.best_step else self.retain_best,
    )

  @property
  def retain_exported(self) -> float | None:
    """The loss on `data@retain` of the exported state; before the export, at the latest evaluation."""
    exports_best = self.exported_step is not None and self.exported_step == self.best_step
    return self.retain_best if exports_best and self.retain_best is not None else self.retain_final

  @property
  def forgetting(self) -> float | None:
    """The increase of the loss on `data@retain` by training to the exported state; None if it was not evaluated."""
    if self.retain_base is None or self.retain_exported is None:
      return None
    return self.retain_exported - self.retain_base
