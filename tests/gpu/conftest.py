"""Tests that need a CUDA device: all in this folder. `make gpu-check` runs them where there is one.

FASTSAM_TEST_BACKEND leaves those of one backend, or with "none" those that name no backend: after an error that breaks
the CUDA context every later test of that process fails, so check.py gives each backend a process.
"""

import os
from pathlib import Path

import pytest
import torch

from fastsam import backends

BACKENDS = ["triton", "cuda", "foreach"]


def backend_of(item: pytest.Item) -> str:
    """The backend that `item` is a test of, as its fixtures say, or "none"."""
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec is not None else {}
    return next((params[name] for name in params if name.endswith("backend") and params[name] in BACKENDS), "none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = os.environ.get("FASTSAM_TEST_BACKEND")
    others = []
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if chosen is not None and backend_of(item) != chosen:
                others.append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


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
