"""Bringing small things to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["capturing", "upload"]


def upload(target: Tensor, source: Tensor) -> None:
    """target <- source, from the host's memory, in the order of the current stream.

    To a CUDA device it goes through pinned memory of torch's caching allocator, which is not used again before the copy
    is done: so neither does the host wait, nor may it overwrite what is still to be copied.

    Args:
        target: on any device.
        source: on the CPU; free for other use on return.
    """
    if target.is_cuda:
        target.copy_(source.pin_memory(), non_blocking=True)
    else:
        target.copy_(source)


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
