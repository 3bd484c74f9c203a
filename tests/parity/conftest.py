"""torch on one thread: the test processes share the cores."""

import contextlib

with contextlib.suppress(ImportError):  # without the extra [parity] these tests are skipped
  import torch

  torch.set_num_threads(1)
