"""Log-probabilities from transformers, with PEFT or of a merged model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_exp.config import InputError
from lora_exp.train.serving.card_file import Row
from lora_exp.train.serving.diagnosis import Measured

INSTALL = "pip install torch transformers peft"


def measure_peft(directory: Path, base: str | None, card: Mapping[str, Any], rows: Sequence[Row]) -> Measured:
  """What PEFT computes with the adapter in `directory`, and its base. Raises InputError if one cannot be loaded.

  `base` replaces the base that adapter_config.json names.
  """
  try:
    import peft
    from transformers import AutoModelForCausalLM
  except ImportError:
    raise InputError(f"verify.backend=peft needs {INSTALL}") from None
  try:
    name = base or peft.PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    if name is None:
      raise InputError(f"{directory}/adapter_config.json names no base; give verify.model=DIRECTORY")
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
    bare = _logprobs(model, rows)
    adapted = _logprobs(peft.PeftModel.from_pretrained(model, str(directory)).eval(), rows)
  except (OSError, ValueError, RuntimeError) as error:
    raise InputError(f"PEFT cannot load {directory}: {' '.join(str(error).split())[:500]}") from None
  return Measured(adapted, bare, template_problem(directory, card))


def measure_merged(directory: Path, card: Mapping[str, Any], rows: Sequence[Row]) -> Measured:
  """What transformers computes with the merged model in `directory`. Raises InputError if it cannot be loaded."""
  try:
    from transformers import AutoModelForCausalLM
  except ImportError:
    raise InputError(f"verify.backend=transformers needs {INSTALL}") from None
  try:
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype="float32").eval()
  except (OSError, ValueError, RuntimeError) as error:
    raise InputError(f"transformers cannot load {directory}: {' '.join(str(error).split())[:500]}") from None
  return Measured(_logprobs(model, rows), None, template_problem(directory, card))


def _logprobs(model: Any, rows: Sequence[Row]) -> list[list[float]]:
  """The log-probability of every token of the continuations."""
  import torch

  values = []
  with torch.no_grad():
    for prompt, answer in rows:
      z_TV = model(torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
      at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
      values.append([float(z_TV[t, token]) for t, token in zip(at, answer, strict=True)])
  return values


def template_problem(directory: Path, card: Mapping[str, Any]) -> str | None:
  """How transformers' tokenizer in `directory` renders or tokenises the card's prompts differently, or None."""
  from transformers import AutoTokenizer

  try:
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
  except (OSError, ValueError, KeyError) as error:
    return f"there is no tokenizer in {directory} that transformers can load ({type(error).__name__})"
  for prompt in card["prompts"]:
    if card["chat"]:
      if tokenizer.chat_template is None:
        return "the chat template is missing"
      text = tokenizer.apply_chat_template([{"role": "user", "content": prompt["prompt"]}], tokenize=False,
                                           add_generation_prompt=True)
      ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
      ids = tokenizer(prompt["rendered"])["input_ids"]
    if list(ids) != prompt["ids"]:
      what = "chat template" if card["chat"] else "tokenizer (or the token that begins a text)"
      at = next((n for n, (a, b) in enumerate(zip(ids, prompt["ids"], strict=False)) if a != b), len(ids))
      return f"another {what}: {prompt['prompt']!r} becomes other tokens, from number {at + 1} on"
  return None
