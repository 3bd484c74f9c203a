"""PiSSA: A and B are initialized with the largest singular directions of W, which are subtracted (arXiv 2404.02948).

The paper replaces W by W − s·A₀·B₀. Here W is not changed. y = x·W + s·(x·A)·B − s·(x·A₀)·B₀, with frozen A₀ and B₀, is
the same function, and equals the base bit for bit before the first step. For PEFT it is written as a LoRA of twice the
rank, [A, A₀] and [B; −B₀].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.initialization import is_abstract
from lora_exp.lora.methods.base import Array, Factors, InitSettings, Leaf, Leaves, Modules
from lora_exp.lora.methods.lora import LoRA
from lora_exp.lora.quantization import dense


class PiSSA(LoRA):
  """LoRA with A and B initialized from the singular value decomposition of W."""

  name = "pissa"
  title = "PiSSA"
  paper = "2404.02948"
  cost = "R·(I + O) parameters, as many constants, and one singular value decomposition of every kernel"
  init_of = "lora"
  peft = None
  leaves = LoRA.leaves | {"start_a": Leaf("IR", trained=False), "start_b": Leaf("RO", trained=False)}

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """Computes A and B from W, and copies them to A₀ and B₀. All are zeros if W is abstract."""
    initialized = {}
    for row in modules.rows:
      a, b = self._decomposed(modules.kernels[row.path], row)
      initialized[row.path] = {"lora_a": a, "lora_b": b, "start_a": a, "start_b": b}
      done()
    return initialized

  def complete(self, leaves: Leaves, kernel: Array, module: AdaptedModule) -> dict[str, Array]:
    """Adds A₀ and B₀, which files of PEFT omit. They are computed from W, as PEFT does when it loads such a file."""
    if "start_a" in leaves:
      return dict(leaves)
    a, b = self._decomposed(kernel, module)
    return {**leaves, "start_a": a, "start_b": b}

  def _decomposed(self, kernel: Array, module: AdaptedModule) -> tuple[Array, Array]:
    """A (…, I, R) and B (…, R, O) of W; zeros if W is abstract."""
    if is_abstract(kernel):
      return jnp.zeros(self.shape("lora_a", kernel, module)), jnp.zeros(self.shape("lora_b", kernel, module))
    thin_a, thin_b = self.decompose(np.asarray(dense(kernel), np.float32), module.rank, module.scale)
    surplus = module.rank - thin_a.shape[-1]  # the rank may exceed min(I, O)
    lead = [(0, 0)] * (len(kernel.shape) - 2)
    a = jnp.pad(thin_a, [*lead, (0, 0), (0, surplus)])
    return a, jnp.pad(thin_b, [*lead, (0, surplus), (0, 0)])

  def decompose(self, w_IO: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns A (…, I, R) and B (…, R, O) such that s·A·B is the best approximation of W at `rank`."""
    u, sigma, vt = np.linalg.svd(w_IO, full_matrices=False)
    root = np.sqrt(sigma[..., :rank] / scale)
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
    return a.astype(w_IO.dtype), b.astype(w_IO.dtype)

  def peft_leaves(self, leaves: Leaves, needed: bool) -> dict[str, Array]:
    """Returns [A, A₀] and [B; −B₀], a LoRA of twice the rank. Raises ValueError if A₀ and B₀ are not computed yet."""
    if "start_a" not in leaves:
      raise ValueError("A₀ and B₀ must be computed from the base first; see `completed`")
    a = np.concatenate([leaves["lora_a"], leaves["start_a"]], -1)
    return {"lora_a": a, "lora_b": np.concatenate([leaves["lora_b"], -leaves["start_b"]], -2)}

  def start(self, leaves: Leaves) -> Factors:
    """Returns A₀ and B₀."""
    return leaves["start_a"], leaves["start_b"]
