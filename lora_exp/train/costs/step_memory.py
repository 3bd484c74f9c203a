"""The memory of a training step on one device, by kind, from shapes alone. No jax.

The features that the forward pass keeps for the backward pass are counted as copies of the block's inputs and outputs.
The copies follow from the operations of the modules; those of norms and activations were compared with XLA's buffers
for MiniGPT, GPT-2 and Llama on a CPU, with 1, 2 and 8 devices (tests/train/test_plan_estimate.py). Two Llamas in
bfloat16 took 4.86 and 8.62 GB of an H100 (tests/bench/gpu.py); the estimates are 5.17 and 8.44 GB.
"""

import math
from dataclasses import dataclass, fields

from lora_exp.models.attention_kernel import uses_cudnn
from lora_exp.models.config_rules import arch_of
from lora_exp.models.registry import get_family
from lora_exp.train.compute.chunk_size import chunk_positions
from lora_exp.train.costs.block_shapes import Stage, block_number, blocks_of
from lora_exp.train.costs.workload import BYTES, Workload

LAYER_NORM_COPIES = 6.6  # of D per block: residuals and two layer norms
RMS_NORM_COPIES = 2.7  # the same with two RMS norms
GATED_COPIES = {"gpu": 2}  # of F: gate and up. Elsewhere 4, with sigmoid(gate) and silu(gate)
PLAIN_COPIES = {"relu": 1, "gelu": 2, "gelu_tanh": 2}  # of F: the activation's inputs and derivatives
FINAL_COPIES = 1.5  # of D: the last norm, and the gradient of the features
DROPOUT_BYTES = 3  # a mask, and 16 random bits
SCORE_BYTES = 4  # attention weights are float32
FORMED_SHARE = 0.8  # of the formed kernels is alive at once
GATHERED_SHARE = 0.25  # of the gathered arrays that the backward pass does not need is alive at once
QUANTISED_BITS = {"int8": 8, "int4": 4, "nf4": 4}
SCALE_TILE = 64  # inputs that share a scale


@dataclass(frozen=True)
class StepMemory:
  """Bytes on one device by kind; together they are the peak of a step."""

  base: int  # frozen parameters, quantised or not
  adapters: int  # trained parameters and constants
  optimizer: int  # moments
  batch: int  # tokens, targets, positions, segments, weights
  gradients: int  # of the trained parameters, and their updates
  activations: int  # features kept for the backward pass
  kernels: int  # that are formed: W + s·A·B, a quantised W, or W in float32
  logits: int  # of one chunk, and what its softmax needs
  gathered: int  # parameters gathered over fsdp

  @property
  def total(self) -> int:
    """The bytes of the step."""
    return sum(getattr(self, field.name) for field in fields(self))

  @property
  def state(self) -> int:
    """The bytes of a trial's parameters and moments."""
    return self.adapters + self.optimizer

  @property
  def work(self) -> int:
    """The bytes that are allocated during a step."""
    return self.gradients + self.activations + self.kernels + self.logits + self.gathered


def step_memory(work: Workload, platform: str) -> StepMemory:
  """The memory of one step of one trial on devices of a `platform`: cpu, gpu or tpu.

  On a CPU, XLA computes bfloat16 in float32, and remat saves nothing.
  """
  trained, constants = _trained_bytes(work)
  optim = work.cfg.optim
  moments = int(optim.momentum > 0) if optim.name == "sgd" else 2
  parts = 3 if optim.accumulate > 1 else 2  # gradient, update, and the sum over microbatches
  rows = math.ceil(work.cfg.train.batch_size / work.batch_ways)
  return StepMemory(
    base=0 if work.method.trains_everything else _base_bytes(work),
    adapters=trained + constants,
    optimizer=moments * trained,
    batch=_batch_bytes(work, rows),
    gradients=parts * trained,
    activations=activation_bytes(work, platform, work.cfg.model.remat and platform != "cpu"),
    kernels=_kernel_bytes(work, platform),
    logits=_logit_bytes(work),
    gathered=_gathered_bytes(work),
  )


def _batch_bytes(work: Workload, rows: int) -> int:
  if work.numeric and work.cfg.model.mlp is not None:
    return 4 * rows * (work.cfg.model.mlp.inputs + 2)
  return 5 * 4 * rows * work.length


def _base_bytes(work: Workload) -> int:
  """The bytes of the frozen parameters on one device."""
  dtype, quant = BYTES[work.cfg.model.param_dtype], work.cfg.lora.quant
  total = 0.0
  for path, shape in work.shapes.items():
    size = work.rules.local_size(path, shape)
    adapted = path.removesuffix(".kernel") in work.adapted and path.endswith(".kernel")
    each = QUANTISED_BITS[quant] / 8 + dtype / SCALE_TILE if quant and adapted else dtype
    total += each * size
  return int(total)


def _trained_bytes(work: Workload) -> tuple[int, int]:
  """(trained, constants): bytes of a trial's float32 parameters on one device."""
  if work.method.trains_everything:
    return sum(4 * work.rules.local_size(path, shape) for path, shape in work.shapes.items()), 0
  trained = sum(4 * work.rules.local_size(path, work.shapes[path]) for path in work.full)
  constants, shared = 0, dict[str, int]()
  options = work.cfg.lora.options or {}
  for row in work.table:
    lead = tuple(work.shapes.get(f"{row.path}.kernel", (0, 0))[:-2])
    sizes = work.method.sizes(row)
    for name in work.method.leaf_names(row.path, options):
      leaf = work.method.leaves[name]
      shape = (*lead, *(sizes[axis] for axis in leaf.axes))
      size = 4 * work.rules.local_size(f"{row.path}.{name}", shape)
      if leaf.shared:
        shared[name] = max(shared.get(name, 0), size)
      elif leaf.trained:
        trained += size
      else:
        constants += size
  return trained, constants + sum(shared.values())


def activation_bytes(work: Workload, platform: str, remat: bool) -> int:
  """The bytes of features that one device keeps from the forward to the backward pass of a microbatch."""
  blocks = blocks_of(work)
  width = 4 if platform == "cpu" else BYTES[work.cfg.model.dtype]
  if not blocks:  # a multi-layer perceptron
    features = sum(2 * shape[-1] for path, shape in work.shapes.items() if path.endswith("kernel"))
    return width * work.tokens * features
  lowest = lowest_trained_block(work, blocks)
  norms = LAYER_NORM_COPIES if has_layer_norms(work) else RMS_NORM_COPIES
  kept = [_block_bytes(work, stages, width, norms, platform) for stages in blocks[lowest:]]
  final = int(FINAL_COPIES * width * work.tokens * work.cfg.model.width)
  if _attention_is_fused(work, platform):  # the mask, once for all blocks
    final += int(2 * work.tokens * work.length * work.cfg.model.heads / stage_ways(work, blocks[0][0]))
  if remat and kept:  # the input of each block, and the features of the one that is recomputed
    return len(kept) * width * work.tokens * work.cfg.model.width + max(kept) + final
  return sum(kept) + final


def _attention_is_fused(work: Workload, platform: str) -> bool:
  """Whether cuDNN computes attention, so that no scores are kept."""
  model = work.cfg.model
  if model.arch is None:
    head_dim, cap = model.width // model.heads, None
  else:
    arch = arch_of(model)
    head_dim, cap = arch.head_dim, arch.attn_softcap
  return uses_cudnn(platform, model.dtype, work.length, work.length, head_dim, cap)


def lowest_trained_block(work: Workload, blocks: list[list[Stage]]) -> int:
  """The index of the first block with a trained parameter: no features below it are kept."""
  if work.method.trains_everything or not blocks:
    return 0
  numbers = []
  for path in (*work.adapted, *work.full):
    number = block_number(path)
    if number is None and (path.endswith(".embedding") or f"{path}.embedding" in work.shapes):
      return 0  # the embedding is below all blocks
    if number is not None:
      numbers.append(number)
  return min(numbers, default=len(blocks))


def _block_bytes(work: Workload, stages: list[Stage], width: int, norms: float, platform: str) -> int:
  """The bytes that one block keeps on one device; `norms` are the copies of D.

  q, k and v; the attention's output before its division; the attention weights, unless cuDNN computes them; what norms
  and activations need; and the input of every trained kernel.
  """
  model = work.cfg.model
  whole = norms * model.width
  split = 0.0  # features that `tensor` splits
  thin = 0  # features x·A
  for stage in stages:
    ways = stage_ways(work, stage)
    if stage.attention:
      split += (stage.fan_in if stage.last else stage.fan_out) / ways
    elif stage.last:
      gated = sum(other.fan_out for other in stages if not other.attention and not other.last) >= 2 * stage.fan_in
      copies = GATED_COPIES.get(platform, 4) if gated else PLAIN_COPIES.get(activation_of(work), 2)
      split += copies * stage.fan_in / ways
    rows = [work.adapted[product.path] for product in stage.products if product.path in work.adapted]
    thin += sum(row.rank for row in rows if not work.merges(row))
    if rows or work.method.trains_everything:
      split += stage.fan_in / (ways if stage.last else 1)
  drops = 2 * DROPOUT_BYTES * model.width if model.dropout > 0 else 0
  weights = SCORE_BYTES * model.heads * work.length / stage_ways(work, stages[0])
  if _attention_is_fused(work, platform):
    weights = 0
  return int(work.tokens * (width * (whole + split + thin) + drops + weights))


def stage_ways(work: Workload, stage: Stage) -> float:
  """The number of devices over which `tensor` splits the kernels of a stage."""
  path = f"{stage.products[0].path}.kernel"
  shape = work.shapes[path]
  return math.prod(shape) / work.rules.local_size(path, shape, gathered=True)


def has_layer_norms(work: Workload) -> bool:
  """Whether the norms have biases, as layer norms do and RMS norms do not."""
  scales = [path for path in work.shapes if path.endswith(".scale")]
  return any(path.replace(".scale", ".bias") in work.shapes for path in scales)


def activation_of(work: Workload) -> str:
  """The name of the feed-forward's activation."""
  return "relu" if work.cfg.model.arch is None else arch_of(work.cfg.model).activation


def _kernel_bytes(work: Workload, platform: str) -> int:
  """The bytes of kernels that one device forms: merged ones, the largest quantised one, or float32 copies on a CPU."""

  def size(path: str) -> int:
    return work.rules.local_size(path, work.shapes[path], gathered=True)

  adapted = [f"{row.path}.kernel" for row in work.table if f"{row.path}.kernel" in work.shapes]
  if work.cfg.lora.quant and adapted:
    return 2 * (4 if platform == "cpu" else BYTES[work.cfg.model.dtype]) * max(map(size, adapted))
  if platform == "cpu" and work.cfg.model.param_dtype == "bfloat16":
    return int(FORMED_SHARE * 4 * sum(size(path) for path in work.shapes if path.endswith(".kernel")))
  return int(FORMED_SHARE * 4 * sum(size(f"{row.path}.kernel") for row in work.table if work.merges(row)))


def _logit_bytes(work: Workload) -> int:
  """The bytes of a chunk of logits, with a second copy if the head has a bias."""
  if work.numeric:
    return 0
  positions = chunk_positions(work.microbatch, work.length, work.vocab_size)
  head, shape = head_of(work)
  columns = work.rules.local_size(head, shape, gathered=True) // work.cfg.model.width
  has_bias = head.replace(".kernel", ".bias") in work.shapes and head.endswith(".kernel")
  return 4 * work.rows * positions * columns * (2 if has_bias else 1)


def head_of(work: Workload) -> tuple[str, tuple[int, ...]]:
  """The path and shape of the vocabulary projection: a kernel (D, V), or the table (V, D) if it is tied."""
  table = f"{get_family(work.cfg.model.family).presets['embeddings'][0]}.embedding"
  kernels = [path for path, shape in work.shapes.items() if len(shape) == 2 and path.endswith(".kernel")
             and block_number(path) is None and shape[1] == work.vocab_size]  # fmt: skip
  path = kernels[-1] if kernels else table
  return path, work.shapes[path]


def _gathered_bytes(work: Workload) -> int:
  """The bytes of parameters gathered over fsdp, which are kept until the backward pass unless they are merged."""
  if work.rules.sizes["fsdp"] == 1:
    return 0
  width = 4 if work.method.trains_everything else BYTES[work.cfg.model.param_dtype]
  total = 0.0
  for path, shape in work.shapes.items():
    whole, own = (work.rules.local_size(path, shape, gathered) for gathered in (True, False))
    row = work.adapted.get(path.removesuffix(".kernel"))
    in_block = block_number(path) is not None
    released = not in_block or (row is not None and work.merges(row))
    share = GATHERED_SHARE if released else 1.0
    total += share * width * whole if whole > own else 0
  return int(total)


