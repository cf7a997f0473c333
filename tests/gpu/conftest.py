"""Tests that need a CUDA device: all in this folder. `make gpu-check` runs them where there is one."""

from pathlib import Path

import pytest
import torch

from fastsam import backends

BACKENDS = ["triton", "cuda", "foreach"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that serves CUDA tensors, the reference excepted."""
    reason = backends.missing(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param} is missing: {reason}")
    return request.param


@pytest.fixture(params=["triton", "cuda"])
def fused_backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels of their own."""
    reason = backends.missing(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param} is missing: {reason}")
    return request.param


@pytest.fixture
def free_memory() -> int:
    """Bytes that are free on the current device, cached ones included."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
