"""What a trained model thinks of held-out prompts and answers: the probability of each token, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.data.tokenizers import Tokenizer
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.train.evaluation import map_logits
from lora_exp.train.job import Job
from lora_exp.train.program import Tree, assemble
from lora_exp.train.step import Batch, features
from lora_exp.train.trials import Hyperparameters

MOST, LONGEST = 32, 48  # examples in the picture, and tokens of each


def token_probabilities(model: LanguageModel, batch: Batch) -> jax.Array:
  """The probability (B, T) of each target given the tokens before it."""
  return map_logits(model, features(model, batch), _probability, batch["targets"])


def _probability(logits_BV: jax.Array, target_B: jax.Array) -> jax.Array:
  return jnp.take_along_axis(jax.nn.softmax(logits_BV), target_B[:, None], axis=-1)[:, 0]


def draw(
  run_dir: Path, job: Job, trials: Hyperparameters, params: Tree, held: Sequence[Mapping[str, jax.Array]], tokenizer: Tokenizer
) -> None:
  """plots/answers.png: the first held-out examples, a row each, each token learned with its probability."""
  held = held[: -(-MOST // len(held[0]["tokens"]))]
  one = lambda tree: jax.tree.map(lambda x: x[0], tree)
  call = jax.jit(lambda params, trial, frozen, b: token_probabilities(assemble(job.program, params, trial, frozen, None), b))
  found = [call(one(params), one(trials), job.frozen, dict(batch)) for batch in held]
  join = lambda arrays: np.concatenate([np.asarray(x) for x in arrays])
  rows = np.flatnonzero(join(batch["answers"].any(1) for batch in held))[:MOST]
  counted, targets = (join(batch[name] for batch in held)[rows] for name in ("weights", "targets"))
  places = [np.flatnonzero(row)[:LONGEST] for row in counted]
  words = lambda ids: ["end" if i == tokenizer.eot else tokenizer.decode([i]) for i in ids]
  texts = [words(row[at].tolist()) for row, at in zip(targets, places, strict=True)]
  from lora_exp.report.plots.run_plots import plot_token_probabilities  # matplotlib takes half a second to import

  plot_token_probabilities(run_dir, texts, [row[at] for row, at in zip(join(found)[rows], places, strict=True)])
