"""When cuDNN computes attention."""

import pytest

from lora_exp.models.attention_kernel import CUDNN_FROM, uses_cudnn

SUPPORTED = {"platform": "gpu", "dtype": "bfloat16", "queries": 512, "keys": 512, "head_dim": 64, "cap": None}


@pytest.mark.parametrize("change", [
  {"platform": "cpu"}, {"platform": "tpu"}, {"dtype": "float32"}, {"cap": 50.0}, {"head_dim": 256}, {"head_dim": 20},
  {"queries": 1}, {"queries": 511, "keys": 511}, {"queries": CUDNN_FROM - 2, "keys": CUDNN_FROM - 2},
])  # fmt: skip
def test_what_cudnn_does_not_support_or_is_slower_is_left_to_xla(change):
  assert uses_cudnn(**SUPPORTED)
  assert not uses_cudnn(**SUPPORTED | change)
