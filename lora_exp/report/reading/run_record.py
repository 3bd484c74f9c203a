"""The record of one run of a sweep, read from its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_exp.report.reading.document_losses import DocumentLosses
from lora_exp.report.reading.file_values import finite
from lora_exp.report.reading.method_facts import MethodFacts, method_facts, method_label

SEEDS = ("train.seed", "data.seed", "model.seed")
TUNING, REPORT = "tuning", "report"  # halves of the held-out documents, in summary.json


@dataclass(frozen=True)
class RunRecord:
  """The contents of a run's files. A trial without files has a record too, with the reason.

  The held-out documents are split in two halves: the best step is chosen on the tuning half, and the report scores the
  run on the report half. Runs without halves are scored on all documents (`scores_share_choice`).
  """

  number: int  # of the trial
  path: str  # of the run directory, relative to the sweep
  status: str  # done | pruned | stopped | diverged | failed | unfinished | missing
  reason: str | None = None  # why the run is not counted, or which files are damaged
  config: dict[str, Any] = field(default_factory=dict)  # config.yaml by dotted path
  summary: dict[str, Any] = field(default_factory=dict)  # summary.json
  metrics: list[dict] = field(default_factory=list)  # rows of metrics.jsonl
  # By metric, of the report half, for a run that is done and has held_out.npz.
  documents: Mapping[str, DocumentLosses] = field(default_factory=dict)
  dropped: bool = False  # whether its sweep dropped the setting during training
  tunes: bool = False  # whether it only chose a value of a tuned setting, with a seed that scores nothing

  def __str__(self) -> str:
    return str(self.number)

  def number_at(self, *path: str) -> float | None:
    """The number at `path` in summary.json; None if it is missing or not finite."""
    node: Any = self.summary
    for name in path:
      node = node.get(name) if isinstance(node, dict) else None
    return finite(node)

  @cached_property
  def method(self) -> MethodFacts:
    return method_facts(self.config, self.summary)

  @property
  def method_label(self) -> str | None:
    """The usual name of the method; None without a config."""
    return method_label(self.config, self.method) if self.config else None

  @property
  def base_loss(self) -> float | None:
    """The loss over all held-out documents before training."""
    return self.number_at("losses", "base")

  def base(self, metric: str) -> float | None:
    """A metric on the report half before training."""
    return self._score(REPORT, "base", metric)

  def exported(self, metric: str) -> float | None:
    """A metric of the exported state on the report half."""
    return self._score(REPORT, "exported", metric)

  def result(self, metric: str) -> float | None:
    """`exported` for a finished run, else None, because other runs are not averaged."""
    return self.exported(metric) if self.status == "done" else None

  def tuning_result(self, metric: str) -> float | None:
    """A metric of the exported state on the tuning half, for choices between settings; None unless the run is done."""
    return self._score(TUNING, "exported", metric) if self.status == "done" else None

  @property
  def scores_share_choice(self) -> bool:
    """Whether the best step was chosen on the documents that score the run, as in runs without halves."""
    return self.number_at("halves", REPORT, "base", "loss") is None

  def _score(self, half: str, state: str, metric: str) -> float | None:
    """A metric of the base or the exported state on a half; over all held-out documents if the run has no halves."""
    state = "base" if self.method.trains_nothing else state
    if self.number_at("halves", half, "base", metric) is not None:
      return self.number_at("halves", half, state, metric)
    return self._undivided_score(state, metric)

  def _undivided_score(self, state: str, metric: str) -> float | None:
    """A metric of the base or the exported state over all held-out documents."""
    if state == "base":
      return self.base_loss if metric == "loss" else self.number_at("scores", "base", metric)
    state = "final" if self.config.get("train.export") == "last" else "best"
    if metric == "loss":
      return self.number_at("losses", state)
    if state == "final":
      return self.number_at("scores", "final", metric)
    best = self.number_at("scores", "best", metric)
    return best if best is not None else dict(self.curve("eval", metric)).get(self.best_step)

  @property
  def exported_step(self) -> int:
    """The step of the exported state; 0 for a frozen base."""
    if self.method.trains_nothing:
      return 0
    step = self.number_at("losses", "exported_step")
    return self.best_step if step is None else int(step)

  @property
  def best_step(self) -> int:
    """The step with the lowest held-out loss (on the tuning half, if there is one); 0 if there is none."""
    return int(self.number_at("losses", "best_step") or 0)

  @property
  def forgetting(self) -> float | None:
    """The rise of the loss on the retained text from the base to the exported state; None without a retained text."""
    losses = dict(self.curve("retain"))
    if 0 in losses and self.exported_step in losses:  # version 0.1.0 stated that of the last step
      return losses[self.exported_step] - losses[0]
    return self.number_at("losses", "forgetting")

  @property
  def trainable(self) -> int | None:
    """The number of trainable parameters."""
    count = self.number_at("parameters", "trainable")
    return None if count is None else int(count)

  @property
  def seeds(self) -> tuple:
    """The values of SEEDS. Runs with equal seeds train on the same rows in the same order."""
    return tuple(self.config.get(key) for key in SEEDS)

  @property
  def is_text(self) -> bool:
    """Whether the data is text, with the loss in nats per token; otherwise it is numeric examples."""
    return self.config.get("model.family") != "mlp"

  def curve(self, split: str, metric: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of a metric on `split` (train, eval or retain), only finite values."""
    points = [(row["step"], finite(row.get(metric))) for row in self.metrics if row.get("split") == split]
    return [(step, value) for step, value in points if value is not None]

  def tuning_curve(self, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a held-out metric on the tuning half; over all held-out documents if it is not kept by half."""
    return self.curve("eval", f"{TUNING}_{metric}") or self.curve("eval", metric)

  @property
  def last_step(self) -> int:
    """The last step in metrics.jsonl; 0 if it is empty."""
    return max((row["step"] for row in self.metrics), default=0)
