"""Tells gradients that a backward pass wrote from those that are done with, and notices a pass that went wrong."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.distributed import is_dtensor, local

__all__ = ["ClearingWatch", "PlainStep", "StaleGradients", "Uncleared"]


class StaleGradients:
    """The gradients that are known and done with. A gradient is *fresh* when its object or version is another.

    A mark is the gradient's version, stored as an attribute of the gradient. A weak reference would not do:
    torch.utils.swap_tensors refuses tensors that have one. A gradient that was converted by swapping counts as fresh.
    """

    def __init__(self) -> None:
        # At random: a gradient that was saved brings its marks along, and must not look stale to another optimizer.
        self._name = f"_fastsam_{secrets.token_hex(8)}"

    def mark(self, params: Iterable[Tensor]) -> None:
        """Marks what gradients there are as stale."""
        name = self._name
        for p in params:
            if (g := p.grad) is not None:
                setattr(g, name, g._version if type(g) is Tensor else _version(g))

    def writes(self, p: Tensor) -> int | None:
        """How often the gradient of p was written to since it was marked; None where it is another one, or gone."""
        marked: int | None = getattr(p.grad, self._name, None)
        return None if p.grad is None or marked is None else _version(p.grad) - marked

    def any_fresh(self, params: Iterable[Tensor]) -> bool:
        """Whether any parameter has a gradient that was not marked, or was written to since."""
        return any(getattr(g, self._name, None) != _version(g) for p in params if (g := p.grad) is not None)


def _version(g: Tensor) -> int:
    """Of a DTensor also its shard's: FSDP2 accumulates into the shard, torch's own ops into the DTensor."""
    return g._version + local(g)._version if is_dtensor(g) else g._version


class PlainStep:
    """A plain step that `first_step` has announced: no second gradient may add to its only one.

    Args:
        params: the parameters. One that has a gradient is watched.

    Attributes:
        doubled: a second gradient was added.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.doubled = False
        self._grad: Tensor | None = None
        self._handle = None
        for p in params:
            if p.grad is not None and p.requires_grad and p.is_leaf:
                self._grad = p.grad
                # Not by its version, which clipping and unscaling change too.
                self._handle = p.register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]
                return

    def _see(self, p: Tensor) -> None:
        self.doubled |= p.grad is self._grad

    def forgive(self) -> None:
        """The gradients were cleared: what comes next is the only one again."""
        self._grad = None
        self.doubled = False

    def end(self) -> None:
        """Stops watching."""
        if self._handle is not None:
            self._handle.remove()


class Uncleared:
    """Gradients at w that `first_step` did not clear: the second backward must not be missing, nor add to them.

    Args:
        params: all of the optimizer's. The first and the last that have a gradient are watched.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._marks = StaleGradients()
        self._params: list[Tensor] = []
        if _reducers_replace_gradients():
            return
        first = next((p for p in params if p.grad is not None), None)
        last = next((p for p in reversed(params) if p.grad is not None), None)
        self._params = [p for p in (first, last) if p is not None]
        self._marks.mark(self._params)

    @property
    def writes(self) -> set[int | None]:
        """How often they were written to since; None stands for another gradient."""
        return set(map(self._marks.writes, self._params))

    def forgive(self) -> None:
        """The gradients were cleared."""
        self._params = []

    end = forgive


class ClearingWatch:
    """Whether a closure clears the gradients for itself, which says that it computes them all, those at w too.

    A closure may clear by `p.grad = None` and call no zero_grad. To see that too, one parameter's gradient is set to
    zeros: if it is another tensor afterwards, the closure cleared it, or set its own. The zeros are left out under
    torch.distributed, whose reducers replace gradients too.

    Args:
        had_grad: a parameter that takes part in backward, its gradient cleared.
    """

    def __init__(self, had_grad: Tensor) -> None:
        self.cleared = False
        self._p = had_grad
        self._accumulated = False
        self._zeros: Tensor | None = None
        if not _reducers_replace_gradients():
            self._zeros = had_grad.grad = torch.zeros_like(had_grad)
            self._handle = had_grad.register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]

    def _see(self, p: Tensor) -> None:
        self._accumulated = True

    def end(self) -> bool:
        """Takes the stand-in away, where no backward added to it; returns what was found."""
        if self._zeros is not None:
            self._handle.remove()
            self.cleared |= self._p.grad is not self._zeros
            if self._p.grad is self._zeros and not self._accumulated:  # zero_grad may have written zeros to it
                self._p.grad = None
        return self.cleared


def _reducers_replace_gradients() -> bool:
    """Whether torch.distributed is in use."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
