"""Records where tensors lie in memory and tells whether they moved.

In C++ where the library is built, which is 3 to 5 times faster; else in Python.
"""

from __future__ import annotations

import functools
import importlib
from operator import attrgetter
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["Places", "native"]


@functools.cache
def native() -> ModuleType | None:
    """What has ``survey``, ``record`` and ``unmoved``; None without the native library, and with torch < 2.11."""
    try:
        library = importlib.import_module("fastsam._C")
    except ImportError:
        return None
    return library if hasattr(library, "survey") else None


class Places:
    """Where tensors lie: address, dtype, shape and strides of each.

    Args:
        tensors: strided ones.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._sizes = list(map(Tensor.numel, tensors))
        self._dtypes = list(map(_dtype, tensors))
        self._layouts = _layouts(tensors)
        self._table = torch.zeros(sum(5 + 2 * t.dim() for t in tensors), dtype=torch.int64, device="cpu")
        library = native()
        self._library = library if library is not None and library.record(tensors, self._table) else None

    def survey(self, tensors: list[Tensor | None], table: Tensor) -> int:
        """By the native library: whether other tensors lie as these, or are None; if so, writes their addresses.

        Args:
            tensors: as many as recorded.
            table: int64 ``[n]`` on the CPU, for the addresses; 0 for None.

        Returns:
            0: they do not, or it can't be told, and nothing is written; 1: they do, at the addresses that were there;
            2: at others.
        """
        return 0 if self._library is None else int(self._library.survey(tensors, self._table, table))

    def moved(self, tensors: list[Tensor]) -> bool:
        """Whether one of the tensors has another address, dtype, shape or strides than it had."""
        if self._library is not None:
            return not self._library.unmoved(tensors, self._table, True)
        return not self._same_memory(tensors) or _layouts(tensors) != self._layouts

    def in_place(self, tensors: list[Tensor]) -> bool:
        """Whether all have their memory still, in any layout: a freed address may come again with another dtype."""
        if self._library is not None:
            return bool(self._library.unmoved(tensors, self._table, False))
        return self._same_memory(tensors) and list(map(Tensor.numel, tensors)) == self._sizes

    def _same_memory(self, tensors: list[Tensor]) -> bool:
        return list(map(Tensor.data_ptr, tensors)) == self._addresses and list(map(_dtype, tensors)) == self._dtypes


_dtype = attrgetter("dtype")
_shape = attrgetter("shape")


def _layouts(tensors: list[Tensor]) -> tuple[list[torch.Size], list[tuple[int, ...]]]:
    return list(map(_shape, tensors)), list(map(Tensor.stride, tensors))
