"""The training step of transformers and PEFT, for comparison with ours on a CPU and on a GPU.

    step = peft_step(model_dir, PeftSettings(tokens, targets, adapter=DIR), compiled=False, dtype="float32")
    losses = step.run(3)          # trains on the one batch three times
    step.peak_memory_bytes()      # on a GPU: of torch's allocator; on a CPU: of the process

It is the step that a Trainer runs: `forward`, `backward`, a fused AdamW, `zero_grad(set_to_none=True)`, scaled dot
product attention, and for a base in bfloat16 autocast around the forward pass, with adapters in float32.
"""

import resource
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class PeftSettings:
  """What is trained on what. Every target counts in the loss."""

  tokens: np.ndarray  # token ids, int32 (B, T)
  labels: np.ndarray  # the token after each, int32 (B, T)
  adapter: Path | None = None  # a directory in PEFT's format to start from; None: a new one of the settings below
  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = ALL_LINEAR
  lr: float = 1e-4
  betas: tuple[float, float] = (0.9, 0.999)
  eps: float = 1e-8
  weight_decay: float = 0.0
  quantised: bool = False  # the base in nf4, by bitsandbytes


class PeftStep:
  """A model with an adapter, its optimizer and one batch."""

  def __init__(self, model: Any, settings: PeftSettings, compiled: bool, dtype: str, device: str):
    import torch

    self.torch, self.model, self.device = torch, model, device
    trained = [p for p in model.parameters() if p.requires_grad]
    self.optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas, eps=settings.eps,
                                       weight_decay=settings.weight_decay, fused=True)  # fmt: skip
    self.tokens, self.labels = (torch.as_tensor(np.asarray(x), dtype=torch.long, device=device)
                                for x in (settings.tokens, settings.labels))  # fmt: skip
    self.forward = torch.compile(model) if compiled else model
    self.autocast = dtype == "bfloat16"

  def train(self) -> Any:
    """Trains once and returns the loss as a tensor, without waiting for the device."""
    self.optimizer.zero_grad(set_to_none=True)
    with self.torch.autocast(self.device, self.torch.bfloat16) if self.autocast else nullcontext():
      # With shift_labels, transformers takes the labels as they are, so that the last position has one too.
      loss = self.forward(input_ids=self.tokens, labels=self.labels, shift_labels=self.labels, use_cache=False).loss
    loss.backward()
    self.optimizer.step()
    return loss.detach()

  def run(self, steps: int) -> list[float]:
    """Trains `steps` times, waits for the device, and returns the loss of each step."""
    return self.torch.stack([self.train() for _ in range(steps)]).float().tolist()

  def trained_parameters(self) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

  def reset_peak_memory(self) -> None:
    """Begins a new peak on a GPU; that of a process cannot be reset."""
    if self.device != "cpu":
      self.torch.cuda.reset_peak_memory_stats()

  def peak_memory_bytes(self) -> int:
    """The peak of torch's allocator on a GPU; on a CPU that of the process, with its libraries."""
    if self.device != "cpu":
      return self.torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peft_step(
  model_dir: str | Path, settings: PeftSettings, compiled: bool, dtype: str = "float32", device: str = "cpu",
  threads: int | None = None,
) -> PeftStep:
  """The step of PEFT on the model in `model_dir`. A directory with only a config.json gives random weights.

  Args:
    model_dir: a model in the format of transformers.
    settings: the batch, the adapter and the optimizer.
    compiled: whether the model goes through torch.compile.
    dtype: of the base: float32 | bfloat16.
    device: cpu | cuda.
    threads: of torch on a CPU; None: as many as the process may use.
  """
  import peft
  import torch

  if device == "cpu" and threads is not None:
    torch.set_num_threads(threads)
  torch.manual_seed(0)
  base = _base(Path(model_dir), settings, dtype, device)
  if settings.adapter is not None:
    model = peft.PeftModel.from_pretrained(base, str(settings.adapter), is_trainable=True)
  else:
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets),
                             task_type="CAUSAL_LM")  # fmt: skip
    model = peft.get_peft_model(base, config)
  model.train()
  return PeftStep(model.to(device), settings, compiled, dtype, device)


def _base(directory: Path, settings: PeftSettings, dtype: str, device: str) -> Any:
  """The frozen model on `device`."""
  import torch
  import transformers

  kind = getattr(torch, dtype)
  if not any(directory.glob("*.safetensors*")):
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device(device):
      return transformers.AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")
  options: dict[str, Any] = {}
  if settings.quantised:
    options["quantization_config"] = transformers.BitsAndBytesConfig(
      load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=kind, attn_implementation="sdpa", device_map=device, **options
  )
