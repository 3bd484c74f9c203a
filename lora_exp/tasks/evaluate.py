"""How well a run, or a base alone, predicts: the data it was trained on, what it should retain, or any other."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lora_exp.config import Config, DataConfig
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.runtime import console
from lora_exp.runtime.mesh import keep_programs
from lora_exp.train.loaded_run import LoadedRun, open_run
from lora_exp.train.step import Tree
from lora_exp.train.trials import TrialHypers

FILE = "evaluations.jsonl"


@dataclass
class Score:
  """The held-out rows of one source under one model, an entry a batch."""

  loss: np.ndarray  # nats, summed over the batch's tokens; or over examples of numbers, see loss.Sums
  correct: np.ndarray | None
  tokens: np.ndarray  # that count
  bytes: int | None  # of the text that they spell; None of numbers

  @property
  def mean(self) -> float:
    """Nats a token."""
    return float(self.loss.sum() / self.tokens.sum())

  def facts(self) -> dict[str, float | int | None]:
    """What a table and a file say of it."""
    return {
      "loss": self.mean,
      "perplexity": None if self.bytes is None else math.exp(min(self.mean, 700.0)),
      "accuracy": None if self.correct is None else float(self.correct.sum() / self.tokens.sum()),
      "nats_per_byte": float(self.loss.sum() / self.bytes) if self.bytes else None,
      "tokens": int(self.tokens.sum()),
    }


def difference(trained: Score, base: Score) -> tuple[float, float | None]:
  """Nats a token by which `trained` is above `base`, and their standard error over batches; None for one batch.

  The two read the same tokens, so only the difference of each batch varies (a ratio estimate; Cochran, 1977, 6.4).
  """
  gain = trained.mean - base.mean
  n = len(base.loss)
  if n < 2:
    return gain, None
  residual = trained.loss - base.loss - gain * base.tokens
  return gain, float(math.sqrt(n / (n - 1) * (residual**2).sum()) / base.tokens.sum())


def run(cfg: Config) -> None:
  """Prints loss, perplexity and accuracy of `run` beside its base, on `data` and `retain`; of the base without a run.

  What a run scores is also a line of its evaluations.jsonl.
  """
  keep_programs(cfg.cache)
  opened = open_run(cfg, with_base=True)
  method = opened.plan.cfg.lora.method if cfg.lora.init_from else cfg.lora.method
  is_run = (cfg.run is not None and method != "frozen") or cfg.lora.init_from is not None
  table, facts, lines = [], {}, []
  train = cfg.train
  for name, source, most in (("held-out", cfg.data, train.eval_tokens), ("retain", cfg.retain, train.retain_tokens)):
    if source is None:
      continue
    base, *rest = scores(opened, source, most, is_run)
    for who, score in (("base", base), *((method, s) for s in rest)):
      table.append((name, who, *score.facts().values()))
      lines.append({"split": name, "model": who, **score.facts()})
    for trained in rest:
      gain, error = difference(trained, base)
      side = f"{'' if source.numbers else 'nats '}{'above' if gain > 0 else 'below'}"
      facts["forgetting" if name == "retain" else name] = f"{_with_error(abs(gain), error)} {side} the base"
      lines[-1] |= {"above_base": gain, "standard_error": error}
  unit = "examples" if cfg.data.numbers else "tokens"
  columns = ("data", "model", "loss", "perplexity", "accuracy", "nats a byte", unit)
  console.show_table("Evaluation", columns, table)
  if facts:
    console.show_facts("Trained against base", facts)
  if cfg.run is not None:
    _keep(Path(cfg.run) / FILE, cfg, lines)


def scores(run: LoadedRun, source: DataConfig, most: int | None, with_trained: bool) -> Iterator[Score]:
  """The base's score on the held-out rows of `source`, on `most` tokens of them, and that of what was trained."""
  plan, job = run.plan, run.job
  cfg, ways = plan.cfg, plan.layout.batch_ways
  rows = make_rows(source, plan.tokenizer, cfg.cache)
  batch_size = -(-cfg.train.batch_size // ways) * ways  # a run can be evaluated on another mesh
  batches = list(eval_batches(rows, batch_size, most))
  lengths = plan.tokenizer.byte_lengths
  spelt = None if source.numbers else int(sum(lengths[b["targets"][b["weights"] > 0]].sum() for b in batches))
  tokens = np.array([b["weights"].sum(dtype=np.float64) for b in batches])
  put = plan.layout.put_batch if source.teacher is None else job.put
  models: list[tuple[Tree, TrialHypers, Tree]] = [run.base()]
  if with_trained:
    models.append((run.params, job.trials, run.frozen))
  for params, trials, frozen in models:
    sums = [job.evaluate(params, trials, frozen, put(b)) for b in batches]
    column = lambda name, sums=sums: np.array([np.asarray(getattr(s, name), np.float64)[0] for s in sums])
    correct = None if sums[0].correct is None else column("correct")
    yield Score(column("loss"), correct, tokens, spelt)


def _with_error(value: float, error: float | None) -> str:
  return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.2g}"


def _keep(path: Path, cfg: Config, lines: list[dict]) -> None:
  """Appends what was found, and on which data, to the run's file; a directory that is read-only stays as it is."""
  about = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
  settings = {"held-out": asdict(cfg)["data"], "retain": asdict(cfg)["retain"]}
  try:
    with path.open("a", encoding="utf-8") as file:
      for line in lines:
        data = {k: v for k, v in settings[line["split"]].items() if v is not None}
        file.write(json.dumps({**about, **line, "data": data}, ensure_ascii=False) + "\n")
  except PermissionError:
    console.show_warning(f"{path} cannot be written: the figures stay on the screen alone")
