"""The native library on CUDA: C++ kernels, one launch each for norm, perturb and restore of a bucket.

The ops are those of the CPU; a second library, which needs CUDA's own, implements them for CUDA tensors.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from fastsam._distribution import build_command, no_gpu
from fastsam.bucket import ParameterBucket

__all__ = ["DEVICE", "chunk_size", "combine", "norm", "obstacle", "perturb", "restore"]

DEVICE: str | None = "cuda"

try:
    from fastsam.backends import cpp

    _library: ModuleType = importlib.import_module("fastsam._C_cuda")
except ImportError as error:
    cause = str(error)
    if error.name is not None:  # not what cpp.py said
        cause = (
            f"the CUDA library cannot be loaded ({cause}). It is built for one major version of CUDA, by nvcc and a "
            f"torch for that CUDA: {build_command()}"
        )
    raise ImportError(no_gpu() or cause) from None

norm = cpp.norm
combine = cpp.combine
perturb = cpp.perturb


def chunk_size(numel: int) -> int:
    """Elements in a chunk: enough blocks to fill a GPU, or fewer, longer ones where there are many anyway."""
    return 4096 if numel < 50_000_000 else 8192


def restore(bucket: ParameterBucket) -> None:
    """w <- saved w, bit for bit; nothing where nothing was saved."""
    cpp.restore(bucket)
    bucket.free_backup()


def obstacle() -> str | None:
    """Why the library cannot serve here, and what to do; None when it can."""
    reason = no_gpu()
    if reason is not None or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return reason
    oldest: int = _library.oldest_architecture()
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if major * 10 + minor < oldest:
            return (
                f"it was built for capability {oldest / 10} and newer, but {torch.cuda.get_device_name(i)} has "
                f"{major}.{minor}: build it again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    return None
