"""Where many tensors lie in memory, by one call of the native library where it is there: in half of Python's time."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["layouts_of", "native"]

_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
"""Of torch's ScalarType."""


@functools.cache
def native() -> Callable[[list[Tensor], Tensor, Tensor], int] | None:
    """The operator; None without the native library.

    It takes plain strided tensors, their expected layouts and a table of addresses (int64, on CPU). It returns 0 where
    they do not lie so, and then does nothing; else it writes the addresses, and returns 1 where they were the same, 2
    where one was not.
    """
    try:
        importlib.import_module("fastsam._C")
    except ImportError:
        return None
    survey: Callable[[list[Tensor], Tensor, Tensor], int] = torch.ops.fastsam.survey.default
    return survey


def layouts_of(dtype: torch.dtype, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]]) -> Tensor:
    """Layouts as the operator reads them, int64 on CPU: dtype, number of dimensions, sizes, strides of each tensor."""
    code = _CODES[dtype]
    flat = [
        number for shape, stride in zip(shapes, strides, strict=True) for number in (code, len(shape), *shape, *stride)
    ]
    return torch.tensor(flat, dtype=torch.int64, device="cpu")
