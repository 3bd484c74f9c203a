"""Computation of an answer card; see `card_file` for its contents."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import Config, InputError
from lora_exp.data.chats.guarded_chat import GuardedChat
from lora_exp.data.chats.plain_turns import turns_prompt
from lora_exp.models.tensor_names import layer_of
from lora_exp.runtime import console
from lora_exp.train.compute.program import Weights, assemble
from lora_exp.train.compute.step import features
from lora_exp.train.loaded_run import LoadedRun
from lora_exp.train.sampling.prompt_encoding import prompt_format
from lora_exp.train.sampling.sampler import Sampler
from lora_exp.train.serving.card_file import ADAPTED, BASE, VERSION, WITHOUT, Row, scale_name

PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.", "Once upon a time",
           "List three colors:")  # in addition to those of the run
MOST_PROMPTS = 5
MOST_PROMPT_TOKENS = 96
CONTINUATION = 12  # tokens
SCALES = (-1.0, 1 / 32, 1 / 16, 0.125, 0.25, 0.33, 0.5, 0.7, 0.84, 1.19, 1.41, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)


def make_card(run: LoadedRun, cfg: Config) -> dict[str, Any]:
  """The answer card of a run, computed with activations in float32."""
  tokenizer = run.plan.tokenizer
  format = prompt_format(replace(cfg, sample=replace(cfg.sample, chat="auto")), tokenizer)
  settings = replace(cfg.sample, temperature=0.0, max_tokens=CONTINUATION, stop=[])
  sampler = Sampler(run.job.program, settings, tokenizer, cfg.model.max_len, format)
  texts = _prompts(sampler, cfg)
  prompts = sampler.encode(texts)
  adapted = (*run.single(), run.frozen)
  answers = [ids or tokenizer.encode("Yes, of course.", start=False)
             for ids in sampler.continuations(*adapted, prompts)]
  rows = list(zip(prompts, answers, strict=True))
  score = scorer(run, rows)
  models = {ADAPTED: adapted, BASE: _base(run), **dict(_wrong_models(run, adapted))}
  logprobs = {}
  with console.progress("answer card", len(models), "models") as bar:
    for name, weights in models.items():
      logprobs[name] = [[round(float(x), 5) for x in row] for row in score(weights)]
      bar.advance()
  return {
    "version": VERSION,
    "chat": format.chat,
    "quant": cfg.lora.quant,
    "prompts": [_entry(sampler, text, row) for text, row in zip(texts, rows, strict=True)],
    "logprobs": logprobs,
  }


def scorer(run: LoadedRun, rows: Sequence[Row]) -> Callable[[Weights], list[np.ndarray]]:
  """A function of (params, trial, frozen) that returns the log-probabilities of every continuation, in nats."""
  length = max(len(prompt) + len(answer) for prompt, answer in rows)
  longest = max(len(answer) for _, answer in rows)
  ways = run.plan.layout.batch_ways
  batch = -(-len(rows) // ways) * ways
  tokens_BT = np.zeros((batch, length), np.int32)
  positions_BC, targets_BC = np.zeros((batch, longest), np.int32), np.zeros((batch, longest), np.int32)
  for n, (prompt, answer) in enumerate(rows):
    tokens_BT[n, : len(prompt) + len(answer)] = prompt + answer
    positions_BC[n, : len(answer)] = np.arange(len(answer)) + len(prompt) - 1
    targets_BC[n, : len(answer)] = answer
  position_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)
  arrays = {"tokens": tokens_BT, "positions": np.array(position_BT), "segments": np.ones_like(tokens_BT),
            "at": positions_BC, "targets": targets_BC}

  @jax.jit
  def logprobs(weights: Weights, batch: dict[str, jax.Array]) -> jax.Array:
    model = assemble(run.job.program, *weights, None)
    x_BCD = jnp.take_along_axis(features(model, batch), batch["at"][..., None], axis=1)
    z_BCV = jax.nn.log_softmax(model.logits(x_BCD).astype(jnp.float32))
    return jnp.take_along_axis(z_BCV, batch["targets"][..., None], axis=-1)[..., 0]

  def score(weights: Weights) -> list[np.ndarray]:
    with jax.default_matmul_precision("highest"):
      values_BC = np.asarray(logprobs(weights, run.plan.layout.put_batch(arrays)))
    return [values_BC[n, : len(answer)] for n, (_, answer) in enumerate(rows)]

  return score


def _entry(sampler: Sampler, text: str, row: Row) -> dict[str, Any]:
  """The entry of one prompt."""
  (ids, answer), decode = row, sampler.tokenizer.decode
  return {"prompt": text, "rendered": _rendered(sampler, text), "ids": ids, "continuation": decode(answer, start=False),
          "continuation_ids": answer, "tokens": [decode([i], start=False) for i in answer]}


def _prompts(sampler: Sampler, cfg: Config) -> list[str]:
  """The prompts of the card: the run's own first, without those that are long or not text of the tokenizer."""
  limit = min(MOST_PROMPT_TOKENS, cfg.model.max_len - CONTINUATION - 1)
  fitting = []
  for text in dict.fromkeys([*cfg.sample.prompts[:2], *PROMPTS]):
    try:
      if len(sampler.encode([text])[0]) <= limit:
        fitting.append(text)
    except InputError:
      continue
  if not fitting:
    raise InputError(f"model.max_len={cfg.model.max_len} is too small for an answer card; use export.answers=false")
  return fitting[:MOST_PROMPTS]


def _rendered(sampler: Sampler, text: str) -> str:
  """The prompt as text, in the format of prompts."""
  messages = [{"role": "user", "content": text}]
  if sampler.format.lines:
    return turns_prompt(sampler.tokenizer, messages)[0]
  if not sampler.format.chat:
    return text + sampler.format.separator
  chat = GuardedChat(sampler.tokenizer, messages)
  return chat.rendered(chat.messages, True).replace(chat.guard, "")


def _base(run: LoadedRun) -> Weights:
  """The weights of the base without axis of trials."""
  params, trials, frozen = run.base()
  return (*jax.tree.map(lambda x: x[0], (params, trials)), frozen)


def _wrong_models(run: LoadedRun, adapted: Weights) -> list[tuple[str, Weights]]:
  """(name, weights) of models that a server computes with a wrong scale or without some modules."""
  params, trial, frozen = adapted
  modules = run.job.program.modules
  if not modules:
    return []
  changed = [(scale_name(factor), trial.scale * factor) for factor in SCALES]
  changed += [(f"{WITHOUT}{name}", trial.scale * jnp.asarray(mask, jnp.float32)) for name, mask in _masks(modules)]
  return [(name, (params, trial._replace(scale=scale), frozen)) for name, scale in changed]


def _masks(modules: Sequence[str]) -> list[tuple[str, list[bool]]]:
  """(name, which modules remain) of incomplete adapters: half of the layers, or no module of one kind."""
  layers = [_layer(path) for path in modules]
  numbers = sorted({layer for layer in layers if layer >= 0})
  masks = []
  if len(numbers) > 1:
    middle = numbers[len(numbers) // 2]
    masks.append(("the first half of the layers", [layer < 0 or layer >= middle for layer in layers]))
    masks.append(("the second half of the layers", [layer < middle for layer in layers]))
    masks.append(("every other layer", [layer < 0 or numbers.index(layer) % 2 == 0 for layer in layers]))
  parts = [path.split(".") for path in modules]
  kinds = list(dict.fromkeys(names[-2] for names in parts if len(names) > 2 and not names[-2].isdigit()))
  if len(kinds) > 1:
    masks += [(kind, [kind not in names for names in parts]) for kind in kinds]
  return masks


def _layer(path: str) -> int:
  """The number of the layer that the module at `path` belongs to; -1 for none."""
  return next((int(part) for part in path.split(".") if part.isdigit()), layer_of(path))
