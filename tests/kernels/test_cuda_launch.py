"""Launching CUDA C++: how arguments reach the driver (a fake one), and small kernels on a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.kernels.cuda import build, launch
from nanovllm.kernels.cuda.launch import Kernel, tensor_map

DEVICE = torch.device("cuda", 0)
REASON = launch.available(DEVICE) if torch.cuda.is_available() else "there is no CUDA device"
needs_nvrtc = pytest.mark.skipif(
    build.unavailable() is not None, reason=build.unavailable() or "NVRTC is there"
)


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(REASON is not None, reason=REASON or "")(test))


SOURCE = """
#include "common.cuh"

// In place: result += scale * b.
extern "C" __global__ void add(float* result, const float* b, float scale, int n) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) result[i] += scale * b[i];
}

// A tile of 32 rows and 64 columns, from (row, column) on, without the swizzle.
extern "C" __global__ void tile(const __grid_constant__ TensorMap map, uint4* out, int column,
                                int row) {
  extern __shared__ unsigned char shared[];
  __shared__ alignas(8) u64 barrier_word;
  u32 barrier = shared_address(&barrier_word);
  u32 start = (shared_address(shared) + 1023) / 1024 * 1024;
  const unsigned char* copied = shared + (start - shared_address(shared));
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(barrier, 32 * 128);
    copy_tile(start, map, column, row, barrier);
  }
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 32 * 8; i += blockDim.x) {
    int r = i / 8, unit = i % 8;
    out[i] = *reinterpret_cast<const uint4*>(copied + r * 128 + (unit ^ (r & 7)) * 16);
  }
}

// Each block writes the 128 values of the next block of its cluster of four.
extern "C" __global__ void neighbour(const float* in, float4* out) {
  __shared__ alignas(16) float mine[128];
  int block = blockIdx.x + blockIdx.z;
  mine[threadIdx.x] = in[block * 128 + threadIdx.x];
  cluster_sync();
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  u32 there = address_of_rank(shared_address(mine), (rank + 1) % 4);
  if (threadIdx.x < 32) out[block * 32 + threadIdx.x] = load_of_cluster(there + 16 * threadIdx.x);
  cluster_sync();  // nobody leaves while its memory is read
}
"""


def load(name: str, params: str, shared: int = 0) -> Kernel:
    return Kernel(build.compile_cubin(SOURCE, "test.cu"), name, params, DEVICE, shared=shared)


def current_stream() -> int:
    return torch.cuda.current_stream(DEVICE).cuda_stream


class Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)
    )  # fmt: skip


class Config(ctypes.Structure):  # of cuda.h, as the compiler lays it out
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


class FakeDriver(SimpleNamespace):
    """Notes launches as the driver would read them, and answers with `status`."""

    status = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0

    def cuModuleGetFunction(self, function: Any, *_: object) -> int:
        function._obj.value = 0x7FFF12345678
        return 0

    def cuLaunchKernelEx(self, config: int, function: int, values: int, extra: None) -> int:
        self.config, self.function = Config.from_address(config), function
        self.addresses = (ctypes.c_void_p * 5).from_address(values)
        return self.status

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"the reason"
        return 0

    def cuTensorMapEncodeTiled(self, target: int, *_: object) -> int:
        assert target % 128 == 0
        ctypes.memset(target, 7, 128)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(launch, "_driver", lambda: fake)
    return fake


def test_the_driver_finds_every_value(driver: FakeDriver) -> None:
    encoded = tensor_map.__wrapped__(4096, (64, 8), (128,), (64, 8), torch.float16)
    assert encoded == b"\7" * 128
    kernel = Kernel(b"", "any", "iptfl", DEVICE)
    kernel.launch(
        (5, 6, 7), 96, (-3, 2**47 + 1, encoded, 1.5, -(2**40)), stream=85, shared=1024,
        cluster=(1, 1, 4), pdl=True,
    )  # fmt: skip
    i, p, t, f, long = driver.addresses
    assert ctypes.c_int.from_address(i).value == -3
    assert ctypes.c_void_p.from_address(p).value == 2**47 + 1
    assert ctypes.string_at(t, 128) == encoded
    assert t % 64 == 0
    assert ctypes.c_float.from_address(f).value == 1.5
    assert ctypes.c_int64.from_address(long).value == -(2**40)
    config = driver.config
    assert driver.function == 0x7FFF12345678
    assert (*config.grid, *config.block, config.shared) == (5, 6, 7, 96, 1, 1, 1024)
    assert (config.stream, config.count) == (85, 2)
    cluster, pdl = config.attributes[0], config.attributes[1]
    assert (cluster.id, *cluster.value[:3]) == (launch.CLUSTER_DIMENSION, 1, 1, 4)
    assert (pdl.id, pdl.value[0]) == (launch.PROGRAMMATIC_SERIALIZATION, 1)


@pytest.mark.parametrize(("status", "error"), [(2, torch.OutOfMemoryError), (700, RuntimeError)])
def test_a_refused_launch_names_call_and_reason(
    driver: FakeDriver, status: int, error: type[Exception]
) -> None:
    driver.status = status
    with pytest.raises(error, match=f"cuLaunchKernelEx failed: the reason .*{status}"):
        Kernel(b"", "any", "", DEVICE).launch((1, 1, 1), 32, (), stream=0)


def test_other_devices_say_why_not() -> None:
    assert "not an NVIDIA GPU" in str(launch.available(torch.device("cpu")))


@needs_nvrtc
def test_the_kernels_of_this_file_compile() -> None:
    cubin = build.compile_cubin(SOURCE, "test.cu")
    assert all(name in cubin for name in (b"add", b"tile", b"neighbour"))


@on_gpu
def test_numbers_and_pointers_arrive() -> None:
    n = 1000
    result, b = torch.randn(2, n + 24, device=DEVICE)
    wanted = torch.cat([result[:n] + 0.5 * b[:n], result[n:]])
    load("add", "ppfi").launch(
        (8, 1, 1), 128, (result.data_ptr(), b.data_ptr(), 0.5, n), stream=current_stream()
    )
    torch.testing.assert_close(result, wanted)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (32, 8), (96, 64), (200, 0)])
def test_a_tile_arrives_swizzled_and_filled_with_zeros(
    dtype: torch.dtype, row: int, column: int
) -> None:
    tensor = torch.randn(100, 72, device=DEVICE).to(dtype)
    wanted = torch.zeros(32, 64, dtype=dtype, device=DEVICE)
    inside = tensor[row : row + 32, column : column + 64]
    wanted[: inside.shape[0], : inside.shape[1]] = inside
    encoded = tensor_map(tensor.data_ptr(), (72, 100), (144,), (64, 32), dtype)
    out = torch.full_like(wanted, float("nan"))
    shared = 32 * 128 + 1024
    load("tile", "tpii", shared).launch(
        (1, 1, 1), 128, (encoded, out.data_ptr(), column, row), stream=current_stream(),
        shared=shared,
    )  # fmt: skip
    assert torch.equal(out, wanted)


@on_gpu
@pytest.mark.parametrize(("grid", "cluster"), [((8, 1, 1), (4, 1, 1)), ((1, 1, 8), (1, 1, 4))])
def test_a_cluster_reads_its_neighbours_memory(
    grid: tuple[int, int, int], cluster: tuple[int, int, int]
) -> None:
    x = torch.randn(2, 4, 128, device=DEVICE)
    out = torch.full_like(x, float("nan"))
    load("neighbour", "pp").launch(
        grid, 128, (x.data_ptr(), out.data_ptr()), stream=current_stream(), cluster=cluster
    )
    assert torch.equal(out, x.roll(-1, dims=1))


@on_gpu
def test_dependent_launches_in_a_graph_keep_their_order() -> None:
    n, times = 100_000, 20
    start, b = torch.randn(2, n, device=DEVICE)
    result, final = torch.empty_like(start), torch.empty_like(start)
    kernel = load("add", "ppfi")

    def steps() -> None:
        result.copy_(start)
        for _ in range(times):
            arguments = (result.data_ptr(), b.data_ptr(), 0.25, n)
            kernel.launch((-(-n // 256), 1, 1), 256, arguments, stream=current_stream(), pdl=True)
        final.copy_(result)

    wanted = start.clone()
    for _ in range(times):
        wanted += 0.25 * b
    steps()
    torch.testing.assert_close(final, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    for _ in range(3):
        final.zero_()
        graph.replay()
        torch.testing.assert_close(final, wanted)


@on_gpu
def test_a_launch_that_cannot_be_is_an_error_in_words() -> None:
    with pytest.raises(RuntimeError, match="cuFuncSetAttribute failed: invalid argument"):
        load("add", "ppfi", shared=300_000)
    kernel = load("neighbour", "pp")
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed"):
        kernel.launch((8, 1, 1), 128, (0, 0), stream=current_stream(), cluster=(3, 1, 1))
    torch.cuda.synchronize(DEVICE)
    with pytest.raises(RuntimeError, match="cuModuleGetFunction failed: named symbol not found"):
        load("nobody", "")
