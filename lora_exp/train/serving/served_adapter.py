"""The adapter that is exported: that of the run, or its conversion to plain LoRA (`export.rank`)."""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp import lora
from lora_exp.config import Config, InputError, LoraConfig
from lora_exp.lora import methods
from lora_exp.lora.peft_files.adapter_files import read_metadata
from lora_exp.lora.resizing import columns
from lora_exp.models.registry import get_family
from lora_exp.models.weights.gguf_writer import AdapterTensor
from lora_exp.runtime import console
from lora_exp.runtime.mesh import flatten
from lora_exp.runtime.run_files import ADAPTER
from lora_exp.train.base import make_base
from lora_exp.train.loaded_run import LoadedRun, open_run, plan_of
from lora_exp.train.merging.merge_check import compare_outputs, held_out_batches, model_outputs
from lora_exp.train.merging.merged_run import merge
from lora_exp.train.plan import Plan

DTYPE = "float32"  # of activations, for answers and comparisons


@dataclass(frozen=True)
class ServedAdapter:
  """An adapter to export."""

  plan: Plan
  adapter: lora.Adapter
  metadata: dict[str, Any]
  run: LoadedRun | None = None  # loaded on the unquantised base; None if it is not needed
  conversion: dict[str, Any] = field(default_factory=dict)  # facts of `export.rank`

  def problems(self) -> list[str]:
    """Why the adapter is not plain LoRA, the only form that every server can load."""
    kind, adapter = self.adapter.kind, self.adapter
    found = []
    if not kind.additive:
      found.append(f"{kind.title} does not add its update to the kernel")
    elif any(columns(kind, adapter.leaves[row.path], row.scale) is None for row in adapter.rows):
      found.append(f"the update of {kind.title} is no product of two thin matrices")
    if adapter.full:
      example = next(iter(adapter.full))
      part = "biases" if example.endswith(".bias") else "modules that were trained in full"
      found.append(f"it contains {part}, such as {example}")
    if adapter.base:
      found.append("it changes embeddings or other parameters of the base")
    if not adapter.rows and not adapter.full:
      found.append("it adapts no module")
    return found

  def factors(self) -> dict[str, AdapterTensor]:
    """The factors of each module's update by path. Raises InputError if the adapter is not plain LoRA."""
    problems = self.problems()
    if problems:
      raise InputError(f"this format holds plain LoRA only, and this adapter is another kind: {'; '.join(problems)}. "
                       f"Convert it with export.rank={self.suggested_rank()}, or use the merged model")
    return {row.path: self._factor(row) for row in self.adapter.rows}

  def suggested_rank(self) -> int:
    """The rank for a conversion: twice that of the adapter."""
    return 2 * max((row.rank for row in self.adapter.rows), default=8)

  def _factor(self, row: lora.AdaptedModule) -> AdapterTensor:
    product = columns(self.adapter.kind, self.adapter.leaves[row.path], row.scale)
    assert product is not None, "`problems` refuses it"
    a, b = product
    if a.ndim != 2:
      raise InputError(f"{row.path} is a stack of kernels (experts), which adapters in this format do not have; "
                       "use format=gguf_merged or format=merged")
    return AdapterTensor(self._stored_name(row.path), a, b / row.scale, row.scale)

  def _stored_name(self, path: str) -> str:
    """The tensor of the adapted module in Hugging Face's checkpoints."""
    model = self.plan.cfg.model
    is_table = f"{path}.embedding" in self.plan.shapes
    if is_table:
      raise InputError(f"{path} is an embedding, which adapters in this format do not have; use the merged model")
    shapes = {name: x.shape for name, x in self.plan.shapes.items()}
    parts = get_family(model.family).stored_names(model).parts(f"{path}.kernel", shapes)
    if len(parts) != 1 or parts[0].width != parts[0].size:
      raise InputError(f"{path} is stored as several tensors or as a part of one; use the merged model")
    return parts[0].name


def open_served(cfg: Config) -> ServedAdapter:
  """The adapter of the run `cfg.run`, converted if `export.rank` is set. The model is loaded for the answer card.

  It is loaded without quantisation (`lora.quant`), as servers load it. Raises InputError for a run without an adapter.
  """
  cfg = replace(cfg, lora=replace(cfg.lora, quant=None, compute="factored"))
  if cfg.export.rank is not None:
    return _converted(cfg, cfg.export.rank)
  plan = plan_of(cfg)
  assert plan.start is not None
  metadata = read_metadata(Path(str(cfg.run)) / ADAPTER)
  run = open_run(cfg, dtype=DTYPE) if cfg.export.answers and plan.naming() is not None else None
  return ServedAdapter(plan, plan.start, metadata, run)


def _converted(cfg: Config, rank: int) -> ServedAdapter:
  """The plain LoRA of rank `rank` that is nearest to the run's update, and how far its predictions are."""
  run = open_run(cfg, with_base=True, dtype=DTYPE)
  original = plan_of(replace(cfg, run=None, lora=LoraConfig(method="frozen")))
  base = {path: np.asarray(x) for path, x in flatten(make_base(original)[0]).items()}
  family = get_family(cfg.model.family)
  everything = methods.of(cfg.lora).trains_everything
  merged = run if everything else merge(run, DTYPE)[0]
  tuned = {path: np.asarray(x) for path, x in flatten(merged.frozen).items()}
  targets = "all_linear" if everything or not run.plan.table else [row.path for row in run.plan.table]
  extracted = lora.extract(base, tuned, rank, targets, presets=family.presets)
  batches = held_out_batches(run, cfg)
  before = model_outputs(run, batches, DTYPE)
  metadata = {"family": cfg.model.family, "scaling": "standard", "converted_from": cfg.lora.method}
  with tempfile.TemporaryDirectory() as temporary:
    lora.save_adapter(temporary, extracted.adapter, original.naming(), metadata)
    converted = replace(cfg, run=None, lora=LoraConfig(init_from=temporary))
    served = open_run(converted, dtype=DTYPE)
  difference = compare_outputs(before, model_outputs(served, batches, DTYPE))
  error = max(extracted.errors.values())
  facts = {"from": cfg.lora.method, "rank": rank, "kl_mean": difference.kl_mean, "kl_most": difference.kl_most,
           "tokens": difference.count, "loss": difference.loss, "largest_error": error,
           "left_out": list(extracted.rest)}
  _show_conversion(facts)
  return ServedAdapter(served.plan, extracted.adapter, metadata, served, facts)


def _show_conversion(facts: dict[str, Any]) -> None:
  """Shows how far the converted adapter is from the original."""
  before, after = facts["loss"]
  console.show_facts(f"Plain LoRA of rank {facts['rank']}, converted from {facts['from']}", {
    "KL divergence from the original": f"mean {facts['kl_mean']:.2g} nats, maximum {facts['kl_most']:.2g}, over "
                                       f"{facts['tokens']:,} held-out tokens",
    "held-out loss": f"{before:.6g} → {after:.6g}",
    "largest error of an update": f"{facts['largest_error']:.2g} ‖ΔW‖",
    "parameters left out": ", ".join(facts["left_out"][:3]) + (", …" if len(facts["left_out"]) > 3 else "") or "none",
  })
