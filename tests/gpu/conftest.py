"""Tests that need a CUDA device: all in this folder. `make gpu-check` runs them where there is one.

FASTSAM_TEST_BACKEND leaves those of "triton", of "cuda", or with "others" the rest: after an error that breaks the CUDA
context every later test of that process fails, so check.py gives each of these a process.
"""

import os
from pathlib import Path

import pytest
import torch

from fastsam import backends

BACKENDS = ["triton", "cuda", "foreach", "reference"]


def backend_of(item: pytest.Item) -> str:
    """Which backend with kernels `item` is a test of, as its fixtures say, or "others"."""
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec is not None else {}
    return next(
        (params[name] for name in params if name.endswith("backend") and params[name] in BACKENDS[:2]), "others"
    )


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


def usable(request: pytest.FixtureRequest) -> str:
    reason = backends.missing(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param} is missing: {reason}")
    return request.param


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that serves CUDA tensors."""
    return usable(request)


@pytest.fixture(params=BACKENDS[:3])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that serves CUDA tensors, the reference excepted."""
    return usable(request)


@pytest.fixture(params=BACKENDS[:2])
def fused_backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels of their own."""
    return usable(request)


@pytest.fixture
def free_memory() -> int:
    """Bytes that are free on the current device, cached ones included."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
