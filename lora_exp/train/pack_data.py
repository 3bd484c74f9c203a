"""The data of a pack, and every check that needs files but no values of the base.

It is made before the base, whose pretraining may take minutes, so that a problem with the files is reported first.
"""

from dataclasses import dataclass

from lora_exp.config import Config
from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import Rows, make_rows
from lora_exp.data.sources import is_numeric
from lora_exp.data.tokenization import Tokenizer
from lora_exp.runtime.process_group import first_process_first
from lora_exp.train.answers.requested_metrics import MetricData, metric_data
from lora_exp.train.base import check_base
from lora_exp.train.evaluating.evaluation import byte_lengths
from lora_exp.train.evaluating.held_out_documents import HeldOutDocuments, held_out_documents
from lora_exp.train.plan import Plan, steps_of
from lora_exp.train.sampling.prompt_encoding import encode_prompts, prompt_format
from lora_exp.train.stop_signals import stop_signals

NOT_BEGUN = "stopped before training, with nothing to save; start the command again"


@dataclass(frozen=True)
class PackData:
  """The rows of a pack, the number of its steps, and what it is evaluated on, on the host."""

  rows: Rows
  retain: Rows | None  # of `data@retain`
  steps: int
  held_out: list[Batch]
  documents: HeldOutDocuments  # of `held_out`
  metrics: MetricData | None  # of the metrics that `eval.metrics` names


@stop_signals(at_once=NOT_BEGUN)
def make_pack_data(plan: Plan) -> PackData:
  """Makes the data of the pack whose first trial is `plan`; shows nothing but progress.

  Raises InputError if the data is unusable, if it gives too many steps or no row to compute a metric on, if a prompt in
  `sample.prompts` is too long, or if the base's checkpoint lacks a parameter.
  """
  cfg = plan.cfg
  check_base(plan)
  _check_prompts(cfg, plan.tokenizer)
  with first_process_first():
    rows = make_rows(cfg.data, plan.tokenizer, cfg.cache)
    retain = None if cfg.retain is None else make_rows(cfg.retain, plan.tokenizer, cfg.cache)
  steps = steps_of(cfg, rows.train_rows)
  held_out = list(eval_batches(rows, cfg.train.batch_size, cfg.train.eval_tokens))
  documents = held_out_documents(plan, rows, held_out, byte_lengths(cfg.data, plan.tokenizer))
  metrics = metric_data(cfg, plan.tokenizer, rows, documents, cfg.train.batch_size)
  return PackData(rows, retain, steps, held_out, documents, metrics)


def _check_prompts(cfg: Config, tokenizer: Tokenizer) -> None:
  """Raises InputError if a sample cannot be made of one of `sample.prompts`."""
  format = prompt_format(cfg, tokenizer)
  if not is_numeric(cfg.data):
    encode_prompts(cfg.sample.prompts, format, tokenizer, cfg.model.max_len)
