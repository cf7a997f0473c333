"""Tells gradients that a backward pass wrote from those that an earlier step left behind."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import is_dtensor, local

__all__ = ["StaleGradients", "after_zero_grad"]


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


def after_zero_grad(base: Optimizer, mark: Callable[[], None]) -> None:
    """Makes base.zero_grad call `mark` afterwards: the zeros that it writes are no gradient of a new backward.

    Args:
        base: the optimizer inside.
        mark: a method of the FusedSAM around it, which is not kept alive.
    """
    base_ref, mark_ref = weakref.ref(base), weakref.WeakMethod(mark)
    own = vars(base).get("zero_grad")  # somebody else's, or another FusedSAM's, put there before
    if getattr(own, "base", base_ref)() is not base:
        own = None  # of the optimizer that this one was copied from

    @functools.wraps(type(base).zero_grad)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        base = cast(Optimizer, base_ref())
        if own is None:
            type(base).zero_grad(base, *args, **kwargs)
        else:
            own(*args, **kwargs)
        mark = mark_ref()
        if mark is not None:
            mark()

    zero_grad.base = base_ref  # type: ignore[attr-defined]
    base.zero_grad = zero_grad  # type: ignore[method-assign]
