"""Kernels that find no memory to work in: an error, and the next call works."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nanovllm.kernels import cpu_ops

SCRIPT = """
import resource, torch
from nanovllm.kernels import cpu_ops

ops = cpu_ops.load(2)
weight = torch.randn(8, 4096)
packed = ops.pack(weight)
x = torch.randn(1, 4096)
expected = ops.linear(x.expand(16, -1), packed)

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for _ in range(2):
    try:
        ops.linear(x.expand(1 << 16, -1), packed)  # a gigabyte of packed activations
        raise SystemExit("there was memory")
    except MemoryError as error:
        assert "65536 rows of 4096" in str(error), error
    assert torch.equal(ops.linear(x.expand(16, -1), packed), expected)
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")
@pytest.mark.skipif(isinstance(cpu_ops.load(), str), reason="no CPU kernels here")
def test_too_little_memory_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
