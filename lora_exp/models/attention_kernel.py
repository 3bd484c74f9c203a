"""Which kernel computes attention. No jax, because plans use it too."""

CUDNN_FROM = 256  # positions. On an H100, XLA is faster with 128, and cuDNN with 512: tests/bench/gpu.py attention


def uses_cudnn(platform: str, dtype: str, queries: int, keys: int, head_dim: int, cap: float | None) -> bool:
  """Whether cuDNN's flash attention can be used, and is faster than XLA's products.

  Args:
    platform: of the devices, as JAX names it: cpu, gpu, tpu.
    dtype: of queries, keys and values.
    queries: the number of their positions, T.
    keys: the number of positions of the keys, S.
    head_dim: h.
    cap: soft cap of the scores, which cuDNN does not have.
  """
  square = queries == keys and queries % 2 == 0 and queries >= CUDNN_FROM
  supported = dtype in ("bfloat16", "float16") and head_dim <= 128 and head_dim % 8 == 0 and cap is None
  return platform == "gpu" and square and supported
