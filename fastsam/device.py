"""Small things on a device: bringing them there without waiting for it, and sharing them with Python on a CPU."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

__all__ = ["capturing", "shared_zeros", "upload", "wait_for"]

TYPE_CODES = {torch.int32: "i", torch.float32: "f", torch.float64: "d"}


def shared_zeros(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, array[float]]:
    """Zeros, ``[n]``, on a device; and an array of as many, which on a CPU is the same memory.

    Python reads or writes an array in a tenth of a microsecond. A torch call takes one or two microseconds, and ten
    when other code has run in between and the caches are cold.
    """
    host: array[float] = array(TYPE_CODES[dtype], [0] * n)
    tensor = torch.frombuffer(host, dtype=dtype) if device.type == "cpu" else torch.zeros(n, dtype=dtype, device=device)
    return tensor, host


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


def wait_for(stream: torch.cuda.Stream) -> None:
    """Makes the current CUDA stream of `stream`'s device wait for what is queued there.

    Not where one of the two is being captured into a CUDA graph: before a capture torch waits for the whole device, and
    what is only captured runs at no time of its own.
    """
    with torch.cuda.device(stream.device):
        current = torch.cuda.current_stream()
        captured = torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(stream):
            alike = torch.cuda.is_current_stream_capturing() == captured
        if alike:
            current.wait_stream(stream)
