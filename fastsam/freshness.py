"""Tells gradients that a backward pass wrote from those that an earlier step left behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

from fastsam.distributed import is_dtensor, local

__all__ = ["StaleGradients"]


class StaleGradients:
    """The gradients that are known and done with. A gradient is *fresh* when its object or version is another.

    Holds no gradient alive. An object's id alone would not do: the next backward often gets the memory of a freed one.
    """

    def __init__(self) -> None:
        self._refs: list[weakref.ref[Tensor]] = []
        self._versions: list[int] = []

    def mark(self, params: Iterable[Tensor]) -> None:
        """Marks what gradients there are as stale. Every step does, so the sorting is left to `any_fresh`."""
        grads = [g for p in params if (g := p.grad) is not None]
        refs = list(map(weakref.ref, grads))
        versions = [g._version if type(g) is Tensor else _version(g) for g in grads]
        self._refs, self._versions = refs, versions  # at once: an exception or a signal handler may strike in between

    def any_fresh(self, params: Iterable[Tensor]) -> bool:
        """Whether any parameter has a gradient that was not marked, or was written to since."""
        marked = zip(self._refs, self._versions, strict=True)
        known = {id(g): version for ref, version in marked if (g := ref()) is not None}
        return any(known.get(id(g)) != _version(g) for p in params if (g := p.grad) is not None)


def _version(g: Tensor) -> int:
    """Of a DTensor also its shard's: FSDP2 accumulates into the shard, torch's own ops into the DTensor."""
    return g._version + local(g)._version if is_dtensor(g) else g._version
