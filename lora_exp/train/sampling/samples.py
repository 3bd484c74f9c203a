"""samples.jsonl: texts sampled from the model during training."""

import json
from collections.abc import Sequence
from pathlib import Path

from lora_exp.runtime import console
from lora_exp.runtime.run_files import SAMPLES


def append_samples(run_dir: Path, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
  """Appends samples to samples.jsonl, one line per sample."""
  with open(run_dir / SAMPLES, "a", encoding="utf-8") as file:
    for prompt, text in zip(prompts, texts, strict=True):
      file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")


def show_samples(step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
  """Shows each sample on one line."""
  for prompt, text in zip(prompts, texts, strict=True):
    console.show(f"step {step}: {prompt}│{' '.join(text.split())}", style="dim")
