"""Parity tests are skipped without the extra [parity], unless they are required."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  if config.getoption("--require-parity"):
    import peft  # noqa: F401
    import torch

    torch.set_num_threads(1)
