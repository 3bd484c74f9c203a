"""Settings of the evaluation on held-out data."""

from dataclasses import dataclass, field


@dataclass
class EvalConfig:
  """The slow metrics: those of generated answers and of choices; see `config/metrics.py`.

  They are computed before and after training, for the exported state, and with task=evaluate.
  """

  metrics: list[str] = field(default_factory=list)  # exact_match | f1 | numeric_match | rouge_l | chrf | choice | …
  items: int = 32  # held-out prompts that are answered, the same for all runs; half of them score the report
  max_tokens: int = 64  # maximum number of tokens in an answer
  every: int = 0  # steps between these evaluations during training, a multiple of train.eval_every; 0: none
  metric_file: str | None = None  # a Python file with score(prediction, reference, prompt): the metric `custom`. Only
  # the command line can set it, because the file is executed
