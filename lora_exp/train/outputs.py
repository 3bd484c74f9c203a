"""What a run leaves in its directory besides curves and checkpoints, and the table that closes it."""

import importlib.metadata
import json
import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax

from lora_exp import lora
from lora_exp.config import DataConfig, LoraExpError
from lora_exp.lora import methods
from lora_exp.models.weights import store
from lora_exp.runtime import console
from lora_exp.train.compiled_step import CompiledStep
from lora_exp.train.job import Job
from lora_exp.train.memory import nbytes
from lora_exp.train.plan import Plan, naming_of
from lora_exp.train.step import Tree
from lora_exp.train.trials import take_trial

VERSIONS = ("lora_exp", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "wandb")


@dataclass
class Record:
  """What a run learns about itself; part of every checkpoint, so that a resumed run goes on counting."""

  steps: int  # of the whole run
  data: str  # fingerprint of the rows
  base: dict = field(default_factory=dict)  # kind of the base, and its own losses
  tokens: int = 0  # trained on so far
  train_seconds: float = 0.0
  base_loss: float | None = None  # held out, before training
  first: float | None = None  # of the first training step
  final: float | None = None  # held out, at the latest evaluation
  best: float | None = None  # held out, of the states evaluated after step 0
  best_step: int = 0
  held_out_tokens: int = 0
  scores: dict = field(default_factory=dict)  # held out, every metric: {base: {loss, …}, final: {…}, best: {…}}
  retain_base: float | None = None
  retain_final: float | None = None
  exported_step: int | None = None

  def note(self, step: int, scores: dict) -> bool:
    """Keeps held-out scores; returns whether their loss is the best of the trained states so far."""
    loss = scores["loss"]
    self.final, self.held_out_tokens = loss, scores["counted"]
    self.scores["base" if step == 0 else "final"] = scores
    if step == 0:
      self.base_loss = loss
      return False
    if self.best is not None and loss >= self.best:
      return False
    self.best, self.best_step = loss, step
    self.scores["best"] = scores
    return True

  @property
  def forgetting(self) -> float | None:
    """Nats by which the loss on `retain` rose."""
    if self.retain_base is None or self.retain_final is None:
      return None
    return self.retain_final - self.retain_base


def summary(status: str, plan: Plan, step: CompiledStep | None, record: Record, base_digest: str, seconds: float) -> dict:
  """summary.json: what was trained, how far, how well, at what cost, from what."""
  final = record.final
  speed = record.tokens / record.train_seconds if record.train_seconds else None
  tokens = plan.cfg.train.batch_size * plan.cfg.data.seq_len
  return {
    "status": status,
    "name": plan.cfg.name,
    "steps": record.steps,
    "tokens": record.tokens,
    "losses": {
      "base": record.base_loss,
      "first": record.first,
      "final": final,
      "best": record.best,
      "best_step": record.best_step,
      "exported_step": record.exported_step,
      "retain_base": record.retain_base,
      "retain_final": record.retain_final,
      "forgetting": record.forgetting,
    },
    "perplexity": record.scores.get("final", {}).get("perplexity"),
    "held_out_tokens": record.held_out_tokens,
    "scores": record.scores,
    "parameters": plan.parameters(),
    "targets": [asdict(row) for row in plan.table],
    "seconds": {
      "compile": round(step.seconds, 3) if step else 0.0,
      "train": round(record.train_seconds, 3),
      "total": round(seconds, 3),
    },
    "peak_memory_bytes": step.peak_memory_bytes if step else None,
    "process_rss_bytes": process_bytes(),
    "tokens_per_s": speed and round(speed, 1),
    "flops_per_token": round(step.flops / tokens) if step else None,
    "base": record.base,
    "fingerprints": {"base": base_digest, "data": record.data},
    "mesh": dict(plan.layout.mesh.shape),
    "device": jax.devices()[0].device_kind,
    "versions": {"python": platform.python_version(), **{v: importlib.metadata.version(v) for v in VERSIONS}},
  }


def process_bytes() -> int:
  """The largest memory this process has held; the system gives KiB, and macOS bytes."""
  unit = 1 if platform.system() == "Darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def frozen_digest(job: Job) -> str:
  """SHA-256 of every frozen array."""
  return store.digest(job.frozen)


def check_frozen(job: Job, before: str) -> None:
  """Raises LoraExpError if training changed a byte of the base: never expected, always checked."""
  if store.digest(job.frozen) != before:
    raise LoraExpError("the frozen base changed during training; this is a bug of lora_exp, please report it")


def export(run_dir: Path, plan: Plan, params: Tree, step: int, base_digest: str) -> lora.Adapter | None:
  """adapter/ in PEFT's format, which is returned; model.safetensors for lora=full; nothing for lora=frozen.

  `params` are one trial's (1, …).
  """
  cfg = plan.cfg
  method = methods.of(cfg.lora)
  if method.trains_everything:
    store.save(run_dir, jax.tree.map(lambda x: x[0], params))
  if not plan.table and not plan.full:
    return None
  metadata = {
    "family": cfg.model.family,
    "base": base_digest,
    "step": step,
    "scaling": cfg.lora.scaling,
    "quant": cfg.lora.quant,
  }
  adapter = take_trial(jax.device_get(params), plan.table, plan.full, method.name, 0)
  where = cfg.model.weights if cfg.model.base == "weights" else None
  lora.save_adapter(
    run_dir / "adapter", adapter, naming_of(cfg.model), metadata, base=where, dropout=cfg.lora.dropout
  )
  return adapter


def add_samples(run_dir: Path, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
  """Appends samples to samples.jsonl, a line each."""
  with open(run_dir / "samples.jsonl", "a", encoding="utf-8") as file:
    for prompt, text in zip(prompts, texts, strict=True):
      file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")


def show_samples(step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
  """Samples on the screen, each on one line."""
  for prompt, text in zip(prompts, texts, strict=True):
    console.show(f"step {step}: {prompt}│{' '.join(text.split())}", style="dim")


def show_result(found: dict, run_dir: Path, data: DataConfig, prompt: str) -> None:
  """The table that closes a run, and how to go on: with `prompt`, if it makes text."""
  losses, counts, seconds = found["losses"], found["parameters"], found["seconds"]
  nats = lambda value: "-" if value is None else f"{value:.4f}"
  against = lambda gain: f"{abs(gain):.4f} {'below' if gain > 0 else 'above'} the base"
  gain = None if losses["base"] is None or losses["best"] is None else losses["base"] - losses["best"]
  text = not data.numbers
  counted, unit = ("nats a token over", "tokens") if text else ("over", "examples")
  loss = "held-out loss" if text else "loss"  # examples are evaluated on what they teach
  perplexity = f", perplexity {found['perplexity']:.4g}" if found["perplexity"] else ""
  loss = "held-out KL from the teacher" if data.teacher else loss
  facts = {
    f"{loss}, base": f"{nats(losses['base'])} {counted} {found['held_out_tokens']:,} {unit}",
    "first training loss": nats(losses["first"]),
    f"{loss}, final": nats(losses["final"]) + perplexity,
    f"{loss}, best": "-"
    if gain is None
    else f"{nats(losses['best'])} at step {losses['best_step']}, {against(gain)}",
    "forgetting": "-"
    if losses["forgetting"] is None
    else f"{losses['forgetting']:+.4f}{' nats' if text else ''} on retain "
    f"({nats(losses['retain_base'])} → {nats(losses['retain_final'])})",
    "trainable parameters": f"{counts['trainable']:,} of {counts['total']:,} ({counts['percent']:.3g} %)",
    "time": f"{seconds['total']:.1f} s: {seconds['compile']:.1f} s compile, {seconds['train']:.1f} s train",
    "speed": f"{found['tokens_per_s']:,.0f} {unit}/s" if found["tokens_per_s"] else "-",
    "memory": f"{nbytes(found['peak_memory_bytes'])} in the step" if found["peak_memory_bytes"] else "-",
    "run directory": short(run_dir),
  }
  if "exact" in found["scores"].get("final", {}):
    base, after = found["scores"]["base"], found["scores"]["final"]
    facts["answers that are right"] = f"{base['exact']:.1%} → {after['exact']:.1%} of {after['examples']:,} held out"
  console.show_facts("Result", facts)
  use = f"task=generate run={short(run_dir)} 'prompt=\"{prompt}\"'" if text else f"task=evaluate run={short(run_dir)}"
  console.show(f"Use it: python -m lora_exp {use}")


def short(path: Path) -> str:
  """A path as a person would type it here."""
  return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
