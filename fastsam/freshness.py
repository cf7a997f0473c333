"""Tells gradients that a backward pass wrote from those that are done with, and notices a pass that went wrong."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.distributed import is_dtensor, local

__all__ = ["ClearingWatch", "LeftGradients", "StaleGradients"]


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
                try:
                    version = g._version if type(g) is Tensor else _version(g)
                except RuntimeError:  # one of torch.inference_mode
                    version = _version(g)
                setattr(g, name, version)

    def any_fresh(self, params: Iterable[Tensor]) -> bool:
        """Whether any parameter has a gradient that was not marked, or was written to since."""
        return any(getattr(g, self._name, None) != _version(g) for p in params if (g := p.grad) is not None)


def _version(g: Tensor) -> int:
    """Of a DTensor also its shard's: FSDP2 accumulates into the shard, torch's own ops into the DTensor.

    One that was made under torch.inference_mode has none: once marked it is done with until there is another gradient.
    """
    try:
        return g._version + local(g)._version if is_dtensor(g) else g._version
    except RuntimeError:
        return 0


class LeftGradients:
    """The gradients that `first_step` left: the coming backward must not add to them nor, after an ascent, be missing.

    Args:
        params: the parameters. The first and the last that have a gradient and may get another one are looked at.

    Attributes:
        added_to: whether a backward added to them.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.added_to = False
        self._left: list[tuple[Tensor, Tensor, int]] = []
        self._handle = None
        for ordered in (params, reversed(params)):
            for p in ordered:
                if (g := p.grad) is not None and p.requires_grad and p.is_leaf:
                    self._left.append((p, g, _version(g)))
                    break
        if self._left:
            # The last one's, which a backward mostly computes first: under DistributedDataParallel's
            # gradient_as_bucket_view the gradients of a bucket have one version.
            self._handle = self._left[-1][0].register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]

    @property
    def there(self) -> bool:
        """Whether they still are."""
        return any(p.grad is g for p, g, _ in self._left)

    @property
    def touched(self) -> set[bool]:
        """Whether those that are looked at were written to or replaced: one answer, or both; none after a clearing."""
        return {p.grad is not g or _version(g) != version for p, g, version in self._left}

    def _see(self, p: Tensor) -> None:
        """A backward wrote a gradient."""
        if self._left and not self.added_to:
            _, g, version = self._left[-1]
            # Another write before this one may have cleared the gradient in place, as a module's zero_grad does.
            if p.grad is g and _version(g) == version + 1:
                self.added_to = True
            else:
                self.forgive()

    def forgive(self) -> None:
        """The gradients were cleared: what comes next is none of theirs."""
        self._left = []
        self.added_to = False

    def end(self) -> None:
        """Stops looking."""
        if self._handle is not None:
            self._handle.remove()


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
