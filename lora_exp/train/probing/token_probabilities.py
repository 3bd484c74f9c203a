"""A plot of the probabilities that a trained model assigns to the tokens of held-out responses."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.data.tokenization import Tokenizer
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.host_arrays import on_host
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Tree, assemble
from lora_exp.train.compute.step import Batch, features
from lora_exp.train.evaluating.evaluation import map_logits
from lora_exp.train.job import Job

MAX_EXAMPLES, MAX_TOKENS = 32, 48  # in the plot


def token_probabilities(model: LanguageModel, batch: Batch) -> jax.Array:
  """The probability (B, T) of each target given the preceding tokens."""
  return map_logits(model, features(model, batch), _probability, batch["targets"])


def _probability(logits_BV: jax.Array, target_B: jax.Array) -> jax.Array:
  return jnp.take_along_axis(jax.nn.softmax(logits_BV), target_B[:, None], axis=-1)[:, 0]


def draw(
  run_dir: Path,
  job: Job,
  trials: Hyperparameters,
  params: Tree,
  held_out: Sequence[Mapping[str, jax.Array]],
  tokenizer: Tokenizer,
) -> None:
  """Writes plots/answers.png: one row for each of the first held-out examples, with the probability of each target.

  `params` and `trials` hold one trial, (1, …).
  """

  @jax.jit
  def probabilities(params: Tree, trial: Hyperparameters, frozen: Tree, batch: Batch) -> jax.Array:
    return token_probabilities(assemble(job.program, params, trial, frozen, None), batch)

  trial_params, trial = jax.tree.map(lambda x: x[0], (params, trials))
  batches = held_out[: -(-MAX_EXAMPLES // len(held_out[0]["tokens"]))]
  values_BT = _join(probabilities(trial_params, trial, job.frozen, dict(batch)) for batch in batches)
  examples = np.flatnonzero(_join(batch["answers"].any(1) for batch in batches))[:MAX_EXAMPLES]
  weights_BT, targets_BT = (_join(batch[name] for batch in batches) for name in ("weights", "targets"))
  texts, values = [], []
  for row in examples:
    positions = np.flatnonzero(weights_BT[row])[:MAX_TOKENS]
    texts.append([_token_text(tokenizer, token) for token in targets_BT[row][positions].tolist()])
    values.append(values_BT[row][positions])
  from lora_exp.report.plots.run_plots import plot_token_probabilities  # Altair takes half a second to import

  plot_token_probabilities(run_dir, texts, values)


def _join(arrays: Iterable[jax.Array]) -> np.ndarray:
  return np.concatenate([on_host(x) for x in arrays])


def _token_text(tokenizer: Tokenizer, token: int) -> str:
  return "end" if token == tokenizer.eot else tokenizer.decode([token])
