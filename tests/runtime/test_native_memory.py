"""Freed memory of the C library goes back to the system."""

import ctypes
import platform
from pathlib import Path

import pytest

from lora_exp.runtime.native_memory import release_freed_memory

COUNT, SIZE = 4000, 16_000  # small blocks, which glibc does not map one by one


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_returned_to_the_system():
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
  blocks = [libc.malloc(ctypes.c_size_t(SIZE)) for _ in range(COUNT)]
  for block in blocks:
    ctypes.memset(block, 1, SIZE)
  for block in blocks[:-1]:  # the last block keeps the top of the heap from being trimmed
    libc.free(block)
  before = resident_bytes()
  release_freed_memory()
  assert before - resident_bytes() > COUNT * SIZE / 2
  libc.free(blocks[-1])


def resident_bytes() -> int:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * 4096
