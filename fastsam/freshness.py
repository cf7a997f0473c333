"""Tells gradients that a backward pass wrote from those that are done with, and notices a pass that went wrong."""

from __future__ import annotations

import functools
import secrets
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import is_dtensor, local
from fastsam.profiler import recording

__all__ = ["ClearingWatch", "PlainStep", "StaleGradients", "after_zero_grad", "around_step"]


class StaleGradients:
    """The gradients that are known and done with. A gradient is *fresh* when its object or version is another.

    A mark is an attribute of the gradient, its version: it lives and dies with the object, and is no reference. (A weak
    one would keep torch.utils.swap_tensors from converting a model; so converted, a gradient counts as fresh.)
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
        self.forgive()
        if self._handle is not None:
            self._handle.remove()


class ClearingWatch:
    """Whether a closure clears the gradients for itself, which says that it computes them all, those at w too.

    Where nobody calls an optimizer's zero_grad it takes a stand-in to see it: zeros, that a closure which clears
    replaces. They go where torch.distributed is not in use, whose reducers replace gradients too.

    Args:
        had_grad: a parameter that takes part in backward, its gradient cleared.
    """

    def __init__(self, had_grad: Tensor) -> None:
        self.cleared = False
        self._p = had_grad
        self._zeros: Tensor | None = None
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self._zeros = had_grad.grad = torch.zeros_like(had_grad)

    def end(self) -> bool:
        """Takes the stand-in away, where no gradient was added to it; returns what was found."""
        if self._zeros is not None:
            self.cleared |= self._p.grad is not self._zeros
            if self._p.grad is self._zeros and self._zeros._version == 0:
                self._p.grad = None
        return self.cleared


_ZERO_GRAD = Optimizer.zero_grad


def around_step(base: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Makes base.step call `before` and, where it succeeds, `after`.

    Args:
        base: the optimizer inside.
        before: a method of the FusedSAM around it, which is not kept alive.
        after: another one.
    """
    base_ref, before_ref, after_ref = weakref.ref(base), weakref.WeakMethod(before), weakref.WeakMethod(after)

    def call(ref: weakref.WeakMethod[Callable[[], None]], optimizer: object) -> None:
        method = ref()
        if method is not None and optimizer is base_ref():  # not a copy of it, which brought its hooks along
            method()

    if getattr(type(base).step, "hooked", False) and hasattr(base, "_optimizer_step_pre_hooks"):
        base.register_step_pre_hook(lambda optimizer, args, kwargs: call(before_ref, optimizer))
        base.register_step_post_hook(lambda optimizer, args, kwargs: call(after_ref, optimizer))
        return
    own = base.step

    @functools.wraps(type(base).step)
    def step(base: Optimizer, *args: Any, **kwargs: Any) -> Any:
        call(before_ref, base)
        result = own(*args, **kwargs) if base is base_ref() else type(base).step(base, *args, **kwargs)
        call(after_ref, base)
        return result

    base.step = MethodType(step, base)  # type: ignore[method-assign]


def after_zero_grad(base: Optimizer, mark: Callable[[bool], None]) -> None:
    """Makes base.zero_grad call `mark` afterwards: the zeros that it writes are no gradient of a new backward.

    Args:
        base: the optimizer inside.
        mark: a method of the FusedSAM around it, which is not kept alive; it is told whether all gradients are gone.
    """
    base_ref, mark_ref = weakref.ref(base), weakref.WeakMethod(mark)
    own = vars(base).get("zero_grad")  # somebody else's, or another FusedSAM's, put there before
    if getattr(own, "base", base_ref)() is not base:
        own = None  # of the optimizer that this one was copied from

    @functools.wraps(type(base).zero_grad)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        base = cast(Optimizer, base_ref())
        lets_go = type(base).zero_grad is _ZERO_GRAD and (args[0] if args else kwargs.get("set_to_none", True))
        if own is not None:
            own(*args, **kwargs)
        elif lets_go and not recording():
            # As torch does, but for its label.
            for group in base.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            type(base).zero_grad(base, *args, **kwargs)
        mark = mark_ref()
        if mark is not None:
            mark(bool(lets_go))

    zero_grad.base = base_ref  # type: ignore[attr-defined]
    base.zero_grad = zero_grad  # type: ignore[method-assign]
